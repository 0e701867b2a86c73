"""The outbound without a proxy: ztun's own marked sockets."""

from __future__ import annotations

import asyncio
import socket

from ztun.outbound import tcp
from ztun.outbound.base import BaseOutbound, FailureHandler, Link, Resolve, resolved
from ztun.outbound.datagrams import DirectLink
from ztun.outbound.errors import unreachable
from ztun.ports import DatagramHandler, Destination, Failure, SocketFactory, UnreachableHandler


class DirectOutbound(BaseOutbound):
    """Connects itself; names are resolved by `resolve`, which must give real addresses."""

    type = "direct"

    def __init__(self, factory: SocketFactory, resolve: Resolve, dial_timeout: float, tag: str = "direct") -> None:
        super().__init__(tag, dial_timeout)
        self._factory = factory
        self._resolve = resolve

    async def _dial(self, destination: Destination) -> socket.socket:
        try:
            async with asyncio.timeout(self._dial_timeout):
                addresses = await resolved(self._resolve, destination.host)
                return await tcp.connect(self._factory, addresses, destination.port)
        except TimeoutError:
            what = f"{destination.host} port {destination.port} did not answer within {self._dial_timeout:g} s"
            raise self._error(Failure.TIMED_OUT, what) from None
        except OSError as error:
            raise unreachable(destination, error) from None

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        return DirectLink(self._factory, self._resolve, on_datagram, on_unreachable, self.drops)
