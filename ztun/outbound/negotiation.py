"""Runs a dialogue with a proxy over a connected socket, and takes nothing from it that is not the proxy's.

The first bytes of the destination may share a segment with the proxy's last reply. So every read peeks first, and only
what the dialogue claims is then taken from the socket.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from ztun.ports import Failure, OutboundError

_CHUNK = 4096  # bytes to peek at; longer headers take several turns


class Dialogue(Protocol):
    """One exchange with a proxy, sans-IO: bytes go in, bytes come out, and a failure is raised as OutboundError."""

    done: bool  # the proxy agreed; the next byte is the destination's
    asked: bool  # the request is on its way, so what is awaited is the destination, not the proxy

    def start(self) -> bytes:
        """The first message."""
        ...

    def receive(self, data: bytes) -> tuple[int, bytes]:
        """Read `data`, at least one byte. Returns how many of its bytes were the proxy's, and what to send next."""
        ...


async def negotiate(sock: socket.socket, dialogue: Dialogue) -> None:
    """Carry `dialogue` out over `sock`, which is connected and non-blocking and stays open in every case.

    There is no deadline here. Raises OutboundError; one task switch in all, however many messages there are.
    """
    negotiation = _Negotiation(sock, dialogue)
    try:
        await negotiation.run()
    finally:
        negotiation.stop()


class _Negotiation:
    def __init__(self, sock: socket.socket, dialogue: Dialogue) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._fd = sock.fileno()  # asyncio formats a socket object for every one it does not know yet
        self._dialogue = dialogue
        self._unsent = b""
        self._over: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        self._send(self._dialogue.start())
        self._loop.add_reader(self._fd, self._on_readable)
        await self._over

    def stop(self) -> None:
        self._loop.remove_reader(self._fd)
        if self._unsent:
            self._loop.remove_writer(self._fd)

    def _on_readable(self) -> None:
        if self._over.done():
            return
        try:
            self._read()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._over.set_exception(_failed(f"it broke the connection: {error.strerror}"))
        except OutboundError as error:
            self._over.set_exception(error)
        else:
            if self._dialogue.done:
                self._over.set_result(None)

    def _read(self) -> None:
        data = self._sock.recv(_CHUNK, socket.MSG_PEEK)
        if not data:
            raise _failed("it closed the connection instead of answering")
        taken, answer = self._dialogue.receive(data)
        self._sock.recv(taken)
        if answer:
            self._send(answer)

    def _send(self, data: bytes) -> None:
        """Send all of `data`, now or as the socket takes it. A new connection has room for it, as a rule."""
        if not self._unsent:
            try:
                data = data[self._sock.send(data) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                raise _failed(f"it broke the connection: {error.strerror}") from None
            if data:
                self._loop.add_writer(self._fd, self._on_writable)
        self._unsent += data

    def _on_writable(self) -> None:
        data, self._unsent = self._unsent, b""
        self._loop.remove_writer(self._fd)
        try:
            self._send(data)
        except OutboundError as error:
            if not self._over.done():
                self._over.set_exception(error)


def _failed(what: str) -> OutboundError:
    return OutboundError(Failure.PROXY_FAILED, what)
