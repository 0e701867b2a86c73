"""ztun's own sockets, marked so that nothing captures them."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
from typing import Final

from ztun.errors import ZtunError

# Descriptors that flows leave alone: making the TUN again, netlink, the log, the control socket and DNS need them when
# it matters most. Of them, datagrams (DNS above all) may have those that streams leave.
_RESERVE: dict[int, int] = {socket.SOCK_STREAM: 64, socket.SOCK_DGRAM: 32}
_FLAGS: Final[int] = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_STREAM: Final[int] = int(socket.SOCK_STREAM)
_SOCKET: Final[int] = socket.SOL_SOCKET
_MARK: Final[int] = socket.SO_MARK


_MOST_SPARE: Final = 128  # of each family
_HIGHEST_SPARE: Final = 512  # descriptor: where more are in use, others may need it more
_NOWHERE: Final = bytes(16)  # struct sockaddr with sa_family AF_UNSPEC
_libc = ctypes.CDLL(None)


def disconnect(fd: int) -> bool:
    """Have a TCP socket be connected to nothing (connect(2) to AF_UNSPEC). It gives up its port, and resets what it was
    connected to unless it is in repair mode. Whether the kernel did it.
    """
    return bool(_libc.connect(fd, _NOWHERE, len(_NOWHERE)) == 0)


class SpareSockets:
    """A ztun.ports.Spares: TCP sockets with our mark. Making and closing one costs as much as connecting it."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[socket.socket]] = {socket.AF_INET: [], socket.AF_INET6: []}

    def keep(self, sock: socket.socket) -> bool:
        """See ztun.ports.Spares.keep. The numbers of descriptors tell how many are in use, at least."""
        waiting = self._waiting[sock.family]
        if len(waiting) == _MOST_SPARE or sock.fileno() >= _HIGHEST_SPARE:
            return False
        waiting.append(sock)
        return True

    def take(self, family: int) -> socket.socket | None:
        """One of them, None when there is none."""
        waiting = self._waiting[family]
        return waiting.pop() if waiting else None

    def close(self) -> None:
        """See ztun.ports.Spares.close."""
        for waiting in self._waiting.values():
            while waiting:
                waiting.pop().close()


class MarkedSockets:
    """A ztun.ports.SocketFactory: non-blocking sockets with SO_MARK (socket(7)).

    dead: our addresses, as text, from which nothing can be reached now: their interfaces have no carrier.
    """

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.dead: frozenset[str] = frozenset()
        # The kernel gives the lowest number that is free (open(2)), so a number says how many are in use at least.
        limit, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        ends = {kind: limit - min(reserve, limit // 4) for kind, reserve in _RESERVE.items()}
        self.spares = SpareSockets()
        self._stream_end, self._datagram_end = ends[socket.SOCK_STREAM], ends[socket.SOCK_DGRAM]

    def __call__(self, family: int, type: int) -> socket.socket:
        """Make a socket. Raises OSError as socket(2) does, EMFILE already when a reserve is left; ZtunError without
        CAP_NET_ADMIN.
        """
        if type == _STREAM and (spare := self.spares.take(family)) is not None:
            return spare
        made = socket.socket(family, type | _FLAGS)
        try:
            if made.fileno() >= (self._stream_end if type == _STREAM else self._datagram_end):
                made.close()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            if self.mark:
                made.setsockopt(_SOCKET, _MARK, self.mark)
        except PermissionError as error:
            made.close()
            raise ZtunError("cannot mark sockets: not permitted; run as root or with CAP_NET_ADMIN") from error
        return made
