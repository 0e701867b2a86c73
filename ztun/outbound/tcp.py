"""TCP connections over marked sockets: several addresses of one host are tried as RFC 8305 says, kept small."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ztun.outbound.errors import most_telling, os_error
from ztun.ports import Poller, SocketFactory

# Seconds between two attempts: the recommended Connection Attempt Delay (RFC 8305, section 5).
ATTEMPT_DELAY: Final = 0.25

_MAX_KEEPALIVE: Final = 32767  # seconds: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL, net/tcp.h
_KEEP_INTERVALS: Final = ("TCP_KEEPIDLE", "TCP_KEEPALIVE", "TCP_KEEPINTVL")  # the second is macOS's name of the first
_TCP: Final = socket.IPPROTO_TCP
_NODELAY: Final = socket.TCP_NODELAY
_QUICKACK: Final[int] = getattr(socket, "TCP_QUICKACK", 0)  # Linux's, see tcp(7); 0 elsewhere
_SOCKET: Final = socket.SOL_SOCKET
_OOBINLINE: Final = socket.SO_OOBINLINE
_IN_PROGRESS: Final = errno.EINPROGRESS
_ALREADY: Final = errno.EALREADY
_CONNECTED: Final = errno.EISCONN


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
    for name, value in (*((name, interval) for name in _KEEP_INTERVALS), ("TCP_KEEPCNT", 3)):
        option = getattr(socket, name, None)  # each system has its own
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def relay_all(sock: socket.socket) -> None:
    """Have a connection say everything at once, and hand over urgent bytes like others, or they are missing."""
    sock.setsockopt(_TCP, _NODELAY, 1)
    sock.setsockopt(_SOCKET, _OOBINLINE, 1)


def _leads_nowhere(factory: SocketFactory, sock: socket.socket) -> bool:
    """Whether the link that the kernel chose for `sock` has no carrier: nobody would ever say so."""
    dead: frozenset[str] = getattr(factory, "dead", frozenset())
    return bool(dead) and sock.getsockname()[0] in dead


def begin(factory: SocketFactory, address: str, port: int, *, speaks: bool = False) -> tuple[socket.socket, int]:
    """Begin to connect to a literal address. Returns the socket and what `progress` would say of it now.

    speaks: something will be said as soon as there is a connection. The last ACK of the handshake then waits for that
    (at most 200 ms): it is a packet less, and the server wakes up once, with something to read.

    Raises OSError when there is no socket to be had, or no such address.
    """
    sock = factory(family_of(address), socket.SOCK_STREAM)
    try:
        if speaks and _QUICKACK:
            sock.setsockopt(_TCP, _QUICKACK, 0)
        number = sock.connect_ex((address, port))
        if number == _IN_PROGRESS:
            # On a path without delay the answer came within connect(2). If it was an ICMP error of a router on this
            # very machine, the kernel noted it and wakes nobody before the SYN is sent again, a second later.
            number = sock.connect_ex((address, port))
            if number == _ALREADY:
                number = sock.getsockopt(_SOCKET, socket.SO_ERROR) or number
    except OSError:
        sock.close()
        raise
    if number == _ALREADY and _leads_nowhere(factory, sock):
        number = errno.ENETDOWN
    return sock, 0 if number == _CONNECTED else number


def progress(sock: socket.socket, address: str, port: int) -> int:
    """0 once `sock` is connected, EALREADY while it is being connected, else the errno of its failure."""
    number = sock.connect_ex((address, port))
    if number == _IN_PROGRESS:
        return errno.ENETDOWN  # it began anew: the network monitor had reset it
    return 0 if number == _CONNECTED else number


class Race:
    """Connection attempts of which the first to be established wins; the others are closed.

    won(sock, mask): a connected socket that `poller` watches, to be handed over, and the event that told of it (0 where
    none did); lost(error): the most telling one, when all failed. There is no deadline here. Either may be called from
    within `start`. speaks: see `begin`.
    """

    def __init__(
        self,
        poller: Poller,
        factory: SocketFactory,
        addresses: Sequence[str],
        port: int,
        won: Callable[[socket.socket, int], None],
        lost: Callable[[OSError], None],
        delay: float = ATTEMPT_DELAY,
        *,
        speaks: bool = False,
    ) -> None:
        self._poller = poller
        self._factory = factory
        self._waiting = deque(interleave(addresses) if len(addresses) > 1 else addresses)
        self._port = port
        self._won = won
        self._lost = lost
        self._delay = delay
        self._speaks = speaks
        self._pending: dict[socket.socket, str] = {}
        self._errors: list[OSError] = []
        self._over = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start attempts until one is under way: one that fails at once makes room for the next at once."""
        self._stop_timer()
        while self._waiting and not self._over:
            if self._attempt(self._waiting.popleft()):
                break
        if self._over:
            return
        if self._waiting:
            self._timer = asyncio.get_running_loop().call_later(self._delay, self.start)
        elif not self._pending:
            self._over = True
            self._lost(most_telling(self._errors) if self._errors else os_error(errno.EADDRNOTAVAIL))

    def cancel(self) -> None:
        """Close every attempt; nobody is told."""
        self._over = True
        self._stop_timer()
        for sock in self._pending:
            self._poller.closing(sock.fileno())
            sock.close()
        self._pending.clear()

    def _attempt(self, address: str) -> bool:
        """Begin one attempt. False when it failed at once."""
        try:
            sock, number = begin(self._factory, address, self._port, speaks=self._speaks)
        except OSError as error:  # or an address that only looked like one
            self._errors.append(error)
            return False
        if number not in (0, errno.EALREADY):
            sock.close()
            self._errors.append(os_error(number))
            return False
        self._pending[sock] = address
        try:
            self._poller.watch(sock.fileno(), lambda mask: self._look(sock, mask), writing=True)
        except OSError as error:
            del self._pending[sock]
            sock.close()
            self._errors.append(error)
            return False
        if number == 0:
            self._win(sock, 0)
        return True

    def _look(self, sock: socket.socket, mask: int) -> None:
        address = self._pending.get(sock)
        if address is None:
            return  # an event of a descriptor that had this number before
        number = progress(sock, address, self._port)
        if number == _ALREADY:
            return
        if number == 0:
            self._win(sock, mask)
            return
        del self._pending[sock]
        self._poller.closing(sock.fileno())
        sock.close()
        self._errors.append(os_error(number))
        self.start()

    def _win(self, sock: socket.socket, mask: int) -> None:
        del self._pending[sock]
        self.cancel()
        self._won(sock, mask)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
