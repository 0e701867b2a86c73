"""TCP connections over marked sockets: several addresses of one host are tried as RFC 8305 says, kept small."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Iterable, Sequence

from ztun.outbound.errors import most_telling, os_error
from ztun.ports import SocketFactory

ATTEMPT_DELAY = 0.25  # seconds between two attempts: the recommended Connection Attempt Delay (RFC 8305, section 5)

_MAX_KEEPALIVE = 32767  # seconds: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL, net/tcp.h


def family_of(address: str) -> int:
    """AF_INET or AF_INET6 of an address literal."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def is_literal(host: str) -> bool:
    """True for an IPv4 or IPv6 address, False for a name."""
    try:
        socket.inet_pton(family_of(host), host.partition("%")[0])
    except (OSError, ValueError):
        return False
    return True


def interleave(addresses: Iterable[str]) -> list[str]:
    """Order addresses by turns, IPv6 first (RFC 8305, section 4), each once and otherwise as they came."""
    unique = list(dict.fromkeys(addresses))
    six = deque(address for address in unique if ":" in address)
    four = deque(address for address in unique if ":" not in address)
    ordered = []
    while six or four:
        ordered += [queue.popleft() for queue in (six, four) if queue]
    return ordered


def keep_alive(sock: socket.socket, interval: int) -> None:
    """Probe a silent peer after `interval` seconds, and give it up after three more unanswered probes."""
    interval = min(max(interval, 1), _MAX_KEEPALIVE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", interval), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", 3)):
        option = getattr(socket, name, None)  # macOS has not all of them
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def connect(
    factory: SocketFactory, addresses: Sequence[str], port: int, delay: float = ATTEMPT_DELAY
) -> socket.socket:
    """Connect to the first of `addresses` (literals) that answers; the other attempts are closed.

    There is no deadline here; cancelling closes every attempt. Raises OSError, the most telling one, when all failed.
    """
    race = _Race(factory, addresses, port, delay)
    try:
        return await race.run()
    finally:
        race.close()


class _Race:
    """Connection attempts of which the first to be established wins.

    Written with callbacks instead of tasks: the usual race has one runner, and costs one task switch.
    """

    def __init__(self, factory: SocketFactory, addresses: Sequence[str], port: int, delay: float) -> None:
        self._factory = factory
        self._waiting = deque(interleave(addresses) if len(addresses) > 1 else addresses)
        self._port = port
        self._delay = delay
        self._loop = asyncio.get_running_loop()
        self._pending: set[socket.socket] = set()
        self._errors: list[OSError] = []
        self._winner: socket.socket | None = None
        self._over: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> socket.socket:
        self._start_next()
        if self._winner is None and self._pending:
            self._over = self._loop.create_future()
            await self._over
        if self._winner is None:
            raise most_telling(self._errors) if self._errors else os_error(errno.EADDRNOTAVAIL)
        winner, self._winner = self._winner, None
        return winner

    def close(self) -> None:
        """Close what is left: the losers, and the winner too if nobody took it because we were cancelled."""
        self._stop_timer()
        for sock in self._pending:
            self._loop.remove_writer(sock.fileno())
            sock.close()
        self._pending.clear()
        if self._winner is not None:
            self._winner.close()

    def _start_next(self) -> None:
        """Start attempts until one is under way: one that fails at once makes room for the next at once."""
        self._stop_timer()
        while self._waiting and self._winner is None:
            if self._start(self._waiting.popleft()):
                break
        if self._waiting and self._winner is None:
            self._timer = self._loop.call_later(self._delay, self._start_next)
        if self._over is not None and not self._over.done() and (self._winner is not None or not self._pending):
            self._over.set_result(None)

    def _start(self, address: str) -> bool:
        """Begin one attempt. False when it failed at once."""
        try:
            sock = self._factory(family_of(address), socket.SOCK_STREAM)
        except OSError as error:
            self._errors.append(error)
            return False
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = sock.connect_ex((address, self._port))
            if number == errno.EINPROGRESS:
                # An ICMP error from a router on this very machine arrives within connect(2), with the socket locked:
                # the kernel notes it and wakes nobody before the SYN is sent again, a second later.
                number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or errno.EINPROGRESS
        except OSError as error:  # an address that only looked like one
            self._errors.append(error)
            sock.close()
            return False
        if number == errno.EINPROGRESS:
            self._pending.add(sock)
            self._loop.add_writer(sock.fileno(), self._on_writable, sock)
            return True
        return self._settle(sock, number)

    def _on_writable(self, sock: socket.socket) -> None:
        self._loop.remove_writer(sock.fileno())
        self._pending.discard(sock)
        self._settle(sock, sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        self._start_next()

    def _settle(self, sock: socket.socket, number: int) -> bool:
        """Note the end of one attempt. True when it won."""
        if number == 0 and self._winner is None:
            self._winner = sock
            self._stop_timer()
            return True
        sock.close()
        if number:
            self._errors.append(os_error(number))
        return False

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
