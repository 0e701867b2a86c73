"""The outbound that refuses everything."""

from __future__ import annotations

import socket

from ztun.outbound.base import BaseOutbound, FailureHandler, Link
from ztun.ports import DatagramHandler, Destination, Failure, UnreachableHandler


class BlockOutbound(BaseOutbound):
    type = "block"

    def __init__(self, tag: str = "block") -> None:
        super().__init__(tag, dial_timeout=0)

    async def _dial(self, destination: Destination) -> socket.socket:
        raise self._error(Failure.PROHIBITED, f"{destination.host} port {destination.port} is blocked")

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        raise self._error(Failure.PROHIBITED, "datagrams are blocked")
