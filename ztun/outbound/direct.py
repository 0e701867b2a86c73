"""The outbound without a proxy: ztun's own marked sockets."""

from __future__ import annotations

from ztun.outbound import tcp
from ztun.outbound.base import BaseOutbound, FailureHandler, Link, Tools
from ztun.outbound.dial import Dial
from ztun.outbound.errors import unreachable
from ztun.outbound.verdict import Datagrams
from ztun.ports import (
    Connected,
    DatagramHandler,
    Destination,
    Dialling,
    Failed,
    Failure,
    OutboundError,
    UnreachableHandler,
)


class DirectOutbound(BaseOutbound):
    """Connects itself; names are resolved by `Tools.resolve`, which must give real addresses."""

    type = "direct"

    def __init__(self, tools: Tools, tag: str = "direct") -> None:
        super().__init__(tag, tools, Datagrams(tag, "direct"))

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        """See `ztun.ports.Outbound.dial`."""
        host, port = destination
        return self._start(Dial(self, host, port, None, connected, failed), [host] if tcp.is_literal(host) else ())

    def _describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        return unreachable(Destination(dial.host, dial.port), error) if isinstance(error, OSError) else error

    def _too_late(self, dial: Dial) -> OutboundError:
        what = f"{dial.host} port {dial.port} did not answer within {self._dial_timeout:g} s"
        return self._error(Failure.TIMED_OUT, what)

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        return self._open_direct_link(on_datagram, on_unreachable)
