"""One dial: resolve, connect, talk to the proxy. Callbacks all the way, since a task costs as much as the rest.

Nothing is taken from the socket that is not the proxy's. The first bytes of the destination may share a segment with
the proxy's last reply, so reads peek, and what the dialogue claims is taken when it is done. Where the dialogue knows
how much will come at least, that much is read at once, and nobody is woken before it is there.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from typing import Final, Protocol

from ztun.outbound import tcp
from ztun.outbound.errors import os_error
from ztun.ports import (
    ENDED,
    READABLE,
    WRITABLE,
    Carry,
    Connected,
    Failed,
    Failure,
    OutboundError,
    Poller,
    SocketFactory,
)

# Bytes to peek at: what Python has small objects for. Longer headers take several turns.
_CHUNK: Final = 448
_MOST_KNOWN: Final = 224  # bytes that are peeked at again and again before they are taken
_MAY_READ: Final = READABLE | ENDED
_PEEK: Final = int(socket.MSG_PEEK)


class Dialogue(Protocol):
    """One exchange with a proxy, sans-IO: bytes go in, bytes come out, and a failure is raised as OutboundError."""

    done: bool  # the proxy agreed; the next byte is the destination's
    asked: bool  # the request is on its way, so what is awaited is the destination, not the proxy
    least: int  # bytes that a proxy which agrees says before anything is to be sent again, at least; 0: not known

    def start(self) -> bytes:
        """The first message."""
        ...

    def receive(self, data: bytes) -> tuple[int, bytes]:
        """Read `data`, at least one byte. Returns how many of its bytes were the proxy's, and what to send next."""
        ...


class Stage(Enum):
    """How far a dial came."""

    RESOLVING = 0
    CONNECTING = 1
    NEGOTIATING = 2
    OVER = 3


class Dialler(Protocol):
    """What a dial asks of its outbound."""

    poller: Poller
    factory: SocketFactory

    def ended(self, dial: Dial) -> None:
        """It is over, well or not."""
        ...

    def describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        """The error to report, in words that name the outbound."""
        ...


class Dial:
    """See ztun.ports.Dialling.

    host, port: what to connect to; dialogue: with the proxy that is there, None for the destination itself;
    counted: in the outbound's statistics. cold: begins anew, should the proxy have given up an adopted connection.
    """

    __slots__ = (
        "_address", "_connected", "_dialler", "_failed", "_fd", "_known", "_least", "_race", "_sock", "_task",
        "_unsent", "carry", "cold", "counted", "dialogue", "host", "port", "stage",
    )  # fmt: skip

    def __init__(
        self,
        dialler: Dialler,
        host: str,
        port: int,
        dialogue: Dialogue | None,
        connected: Connected,
        failed: Failed,
        *,
        counted: bool = True,
    ) -> None:
        self.counted = counted
        self.host = host
        self.port = port
        self.dialogue = dialogue
        self.stage = Stage.RESOLVING
        self._dialler = dialler
        self._connected = connected
        self._failed = failed
        self._sock: socket.socket | None = None
        self._fd = -1
        self._address = ""
        self._race: tcp.Race | None = None
        self._task: asyncio.Task[None] | None = None
        self._unsent = b""
        self._least = 0
        self._known = 0  # bytes that the dialogue has read, and nobody has taken from the socket yet
        self.carry: Carry | None = None
        self.cold: Callable[[], None] | None = None

    @property
    def over(self) -> bool:
        """See ztun.ports.Dialling.over."""
        return self.stage is Stage.OVER

    def start(self, addresses: Sequence[str], resolve: Callable[[str], Awaitable[Sequence[str]]]) -> None:
        """Go on as far as is possible at once; a callback may come from within.

        addresses: literals, where they are known; else `resolve` tells them.
        """
        if addresses:
            self._connect(addresses)
        else:
            self._task = asyncio.get_running_loop().create_task(self._resolve(resolve))

    def adopt(self, sock: socket.socket) -> None:
        """Go on over a socket that is connected already, and watched."""
        self._established(sock)

    def cancel(self) -> None:
        """Close everything; nobody is told any more. Without effect when it is over."""
        if self.stage is Stage.OVER:
            return
        self._end()
        if self._sock is not None:
            self._dialler.poller.closing(self._fd)
            self._sock.close()

    def fail(self, error: OSError | OutboundError) -> None:
        """End it, and say why."""
        if self.stage is not Stage.OVER:
            described = self._dialler.describe(self, self._heard() or error)
            self.cancel()
            self._failed(described)

    def _end(self) -> None:
        self.stage = Stage.OVER
        self._dialler.ended(self)
        if self._race is not None:
            self._race.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    # Resolving and connecting.

    async def _resolve(self, resolve: Callable[[str], Awaitable[Sequence[str]]]) -> None:
        try:
            addresses = await resolve(self.host)
        except OutboundError as error:
            self.fail(error)
            return
        if self.stage is Stage.RESOLVING:
            self._connect(addresses)

    def _connect(self, addresses: Sequence[str]) -> None:
        self.stage = Stage.CONNECTING
        dialler, speaks = self._dialler, self.dialogue is not None
        if len(addresses) != 1:
            self._race = tcp.Race(
                dialler.poller, dialler.factory, addresses, self.port, self._established, self.fail, speaks=speaks
            )
            self._race.start()
            return
        self._address = addresses[0]
        try:
            sock, number = tcp.begin(dialler.factory, self._address, self.port, speaks=speaks)
        except OSError as error:
            self.fail(error)
            return
        self._sock = sock
        if number not in (0, errno.EALREADY):
            self.fail(os_error(number))
            return
        self._fd = sock.fileno()
        try:
            dialler.poller.watch(self._fd, self._on_event, writing=number != 0)
        except OSError as error:
            self.fail(error)
            return
        if number == 0:
            self._established(sock)

    def _on_event(self, mask: int) -> None:
        if self.stage is Stage.CONNECTING:
            assert self._sock is not None
            number = tcp.progress(self._sock, self._address, self.port)
            if number == 0:
                self._established(self._sock, mask)
            elif number != errno.EALREADY:
                self.fail(os_error(number))
        elif self.stage is Stage.NEGOTIATING:
            self._go_on(mask)

    def _established(self, sock: socket.socket, mask: int = 0) -> None:
        """Go on over a connection. mask: of the event that told of it, which may have been the proxy's first word."""
        if self._sock is not sock:
            self._sock = sock
            self._fd = sock.fileno()
            self._dialler.poller.hand_over(self._fd, self._on_event)
        if self.dialogue is None:
            self._finish(sock, bool(mask & _MAY_READ))
            return
        self.stage = Stage.NEGOTIATING
        least = self.dialogue.least
        self._least = least if least and self._dialler.poller.at_least(sock, least) else 0
        self._send(self.dialogue.start())
        self._go_on(mask)

    def _finish(self, sock: socket.socket, more: bool) -> None:
        self._end()
        if self.carry is not None and not more and self.carry(sock, self._address, self.port, self._known):
            return
        try:
            self._take_known(sock)
            tcp.relay_all(sock)
        except OSError:
            more = True  # it is broken, as who reads it next will hear
        self._connected(sock, more)

    def _take_known(self, sock: socket.socket) -> None:
        if self._known:
            sock.recv(self._known)
            self._known = 0

    # The dialogue with the proxy.

    def _go_on(self, mask: int) -> None:
        if self._unsent and mask & WRITABLE:
            data, self._unsent = self._unsent, b""
            self._send(data)
        if mask & _MAY_READ and self.stage is Stage.NEGOTIATING:
            self._read(bool(mask & ENDED))

    def _read(self, ended: bool) -> None:
        """Take every message that is there, and look for the end if it is near: what is left unread is no news."""
        sock, dialogue = self._sock, self.dialogue
        assert sock is not None
        assert dialogue is not None
        try:
            more = True
            if self._least:
                self._read_least(sock, dialogue)
                if dialogue.done:
                    self._finish(sock, ended)
                    return
            while more:
                known = self._known
                data = sock.recv(_CHUNK, _PEEK)
                if not data:
                    raise OutboundError(Failure.PROXY_FAILED, "it closed the connection instead of answering")
                if len(data) == known:
                    if not ended:
                        return  # the event was that of bytes which were there before
                    self._take_known(sock)
                    continue
                taken, answer = dialogue.receive(data[known:] if known else data)
                self._known += taken
                self.cold = None
                if answer:
                    self._send(answer)
                if self.stage is Stage.OVER:
                    return
                more = ended or len(data) > self._known or len(data) == _CHUNK
                if dialogue.done:
                    self._finish(sock, more)
                    return
                if self._known > _MOST_KNOWN:
                    self._take_known(sock)
        except (BlockingIOError, InterruptedError):
            return
        except OutboundError as error:
            self._break(error)
        except OSError as error:
            self._break(OutboundError(Failure.PROXY_FAILED, f"it broke the connection: {error.strerror}"))

    def _read_least(self, sock: socket.socket, dialogue: Dialogue) -> None:
        """Take the shortest answer with one call. From then on every byte is news, also those that came meanwhile."""
        data = sock.recv(self._least)
        if not data:
            raise OutboundError(Failure.PROXY_FAILED, "it closed the connection instead of answering")
        self._least = 0
        self._dialler.poller.at_least(sock, 1)
        taken, _ = dialogue.receive(data)
        if taken < len(data):
            raise OutboundError(Failure.PROXY_FAILED, "its answer is shorter than any that says where it listens")
        self.cold = None

    def _heard(self) -> OutboundError | None:
        """It is too late. What lies there unread, since it was too little, tells who is silent, or what is wrong."""
        if not self._least or self.stage is not Stage.NEGOTIATING:
            return None
        assert self._sock is not None
        assert self.dialogue is not None
        try:
            self.dialogue.receive(self._sock.recv(self._least))
        except OutboundError as error:
            return error
        except OSError:
            pass
        return None

    def _break(self, error: OutboundError) -> None:
        """The dialogue failed. Nobody is to blame for what a connection does that had waited too long."""
        again, self.cold = self.cold, None
        if again is None or self._sock is None:
            self.fail(error)
            return
        self._dialler.poller.closing(self._fd)
        self._sock.close()
        self._sock = None
        self._known = 0
        self._unsent = b""
        self.stage = Stage.RESOLVING
        again()

    def _send(self, data: bytes) -> None:
        """Send all of `data`, now or as the socket takes it. A new connection has room for it, as a rule."""
        assert self._sock is not None
        if not self._unsent:
            try:
                sent = self._sock.send(data)
                if sent == len(data):
                    return
                data = data[sent:]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._break(OutboundError(Failure.PROXY_FAILED, f"it broke the connection: {error.strerror}"))
                return
            if data:
                self._dialler.poller.want_write(self._fd)
        self._unsent += data
