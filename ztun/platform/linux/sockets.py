"""ztun's own sockets, marked so that nothing captures them."""

from __future__ import annotations

import socket

from ztun.errors import ZtunError


class MarkedSockets:
    """A ztun.ports.SocketFactory: non-blocking sockets with SO_MARK (socket(7)).

    dead: our addresses, as text, from which nothing can be reached now: their interfaces have no carrier.
    """

    def __init__(self, mark: int) -> None:
        self.mark = mark
        self.dead: frozenset[str] = frozenset()

    def __call__(self, family: int, type: int) -> socket.socket:
        """Make a socket. Raises OSError as socket(2) does, ZtunError without CAP_NET_ADMIN."""
        made = socket.socket(family, type | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if self.mark:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
        except PermissionError as error:
            made.close()
            raise ZtunError("cannot mark sockets: not permitted; run as root or with CAP_NET_ADMIN") from error
        return made
