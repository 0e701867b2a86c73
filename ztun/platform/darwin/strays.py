"""Resetting ztun's own connections that a change of the network left behind.

macOS has no way to reset a connection of one's own but to close it with SO_LINGER and no time. Its owner still has the
descriptor, so a socket that is not connected is put in its place: whoever reads or writes gets an error (ENOTCONN), as
if the other side had reset.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

from ztun.platform.darwin.sockets import BoundSocket, BoundSockets

_AT_ONCE = struct.pack("ii", 1, 0)  # struct linger: on, no time


def reset_stranded(sockets: BoundSockets, disturb: Callable[[int], None]) -> int:
    """Reset the TCP connections whose source address is gone, or whose destination is reached by another interface now.

    disturb: has the owner of a descriptor look at it. Returns how many were reset. A connection without any way waits
    for it to come back; one that is only being made does not.
    """
    stranded = [sock for sock in list(sockets.made) if _is_stranded(sockets, sock)]
    return sum(_reset(sockets, sock, disturb) for sock in stranded)


def _is_stranded(sockets: BoundSockets, sock: BoundSocket) -> bool:
    if sock.fileno() < 0 or sock.type != socket.SOCK_STREAM or sock.remote is None or not sock.bound:
        return False
    try:
        index = sockets.interface_for(sock.remote)
        if index:
            return index != sock.bound or not sockets.owns(sock.getsockname()[0])
        sock.getpeername()
    except OSError:
        return True  # it is being connected, and there is no way
    return False


def _reset(sockets: BoundSockets, sock: BoundSocket, disturb: Callable[[int], None]) -> bool:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        with socket.socket(sock.family, socket.SOCK_STREAM) as nowhere:
            nowhere.setblocking(False)
            os.dup2(nowhere.fileno(), sock.fileno(), inheritable=False)
    except OSError:
        return False
    sockets.made.discard(sock)
    disturb(sock.fileno())
    return True
