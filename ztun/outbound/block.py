"""The outbound that refuses everything."""

from __future__ import annotations

from ztun.outbound.base import BaseOutbound, FailureHandler, Link, Tools
from ztun.outbound.verdict import Datagrams
from ztun.ports import Connected, DatagramHandler, Destination, Dialling, Failed, Failure, UnreachableHandler


class BlockOutbound(BaseOutbound):
    type = "block"

    def __init__(self, tools: Tools, tag: str = "block") -> None:
        super().__init__(tag, tools, Datagrams(tag, "reject"))

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        """See `ztun.ports.Outbound.dial`."""
        return self._refuse(
            self._error(Failure.PROHIBITED, f"{destination.host} port {destination.port} is blocked"), failed
        )

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        raise self._error(Failure.PROHIBITED, "datagrams are blocked")
