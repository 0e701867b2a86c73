"""A datagram link with what it reported, and somebody to talk to through it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

from ztun.ports import DatagramLink, Destination, Failure, Outbound, OutboundError


class Link:
    """A datagram link with what it reported."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, bytes]] = []
        self.died: list[OutboundError] = []
        self.unreachable: list[tuple[Destination, Failure]] = []

    async def open(self, way: Outbound, *, tell: bool = True) -> DatagramLink:
        return await way.open_datagrams(self._on_datagram, self.died.append, self._on_unreachable if tell else None)

    def _on_datagram(self, host: str, port: int, payload: memoryview, size: int) -> None:
        for at in range(0, len(payload) or 1, size or 1):
            self.heard.append((host, port, bytes(payload[at : at + size])))

    def _on_unreachable(self, destination: Destination, error: OutboundError) -> None:
        self.unreachable.append((destination, error.failure))


@contextlib.contextmanager
def echo(host: str = "127.0.0.1", sock: socket.socket | None = None) -> Iterator[tuple[str, int]]:
    """Sends every datagram back. Gives its address."""
    if sock is None:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind((host, 0))

    def answer() -> None:
        payload, address = sock.recvfrom(65535)
        sock.sendto(payload, address)

    loop = asyncio.get_running_loop()
    loop.add_reader(sock, answer)
    try:
        yield sock.getsockname()[:2]
    finally:
        loop.remove_reader(sock)
        sock.close()
