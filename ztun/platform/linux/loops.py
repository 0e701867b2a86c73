"""Finding out whether a flow that came in by the TUN was begun by a socket of our own.

The kernel is asked for the socket with both endpoints of the flow (sock_diag(7)), and for its mark. Sources:
include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_INET_DIAG_MARK = 15
_ALL_STATES = 0xFFFFFFFF
_PROTOCOLS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_REQUEST = struct.Struct("=BBBxI")  # struct inet_diag_req_v2 up to the id
_ID = struct.Struct("!HH16s16s")  # ports and addresses of struct inet_diag_sockid
_NOWHERE = struct.pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # any interface, INET_DIAG_NOCOOKIE
_MESSAGE_LENGTH = 72  # struct inet_diag_msg
_ATTRIBUTE = struct.Struct("=HH")
_MAX_ANSWER = 8192


class OwnFlows:
    """Knows flows of sockets with `mark`. To be used from one thread.

    addresses: the packed addresses that this host may send from, the TUN's included; others are not looked at.
    """

    def __init__(self, mark: int, addresses: Iterable[bytes] = ()) -> None:
        self.addresses = frozenset(addresses)
        self._mark = mark
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )

    def __call__(self, protocol: str, source: bytes, source_port: int, destination: bytes, port: int) -> bool:
        """Whether one of our sockets sends from `source` to `destination` (packed)."""
        if source not in self.addresses:
            return False
        return self._find_mark(_PROTOCOLS[protocol], source, source_port, destination, port) == self._mark

    def _find_mark(self, protocol: int, source: bytes, source_port: int, destination: bytes, port: int) -> int | None:
        """The mark of the socket with these endpoints; None when there is none, or none that the kernel tells of."""
        family = socket.AF_INET if len(source) == 4 else socket.AF_INET6
        ends = [(source_port, source.ljust(16, b"\0")), (port, destination.ljust(16, b"\0"))]
        if protocol == socket.IPPROTO_UDP:
            ends.reverse()  # udp_dump_one() takes the id for that of a packet that comes in
        (first_port, first), (second_port, second) = ends
        body = _REQUEST.pack(family, protocol, 0, _ALL_STATES)
        body += _ID.pack(first_port, second_port, first, second) + _NOWHERE
        header = _HEADER.pack(_HEADER.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
        try:
            self._sock.send(header + body)  # the answer is there when this returns
            answer = self._sock.recv(_MAX_ANSWER)
        except OSError:
            return None
        return _read_mark(answer)

    def close(self) -> None:
        self._sock.close()


def _read_mark(answer: bytes) -> int | None:
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _SOCK_DIAG_BY_FAMILY:
        return None  # NLMSG_ERROR: no such socket
    at = _HEADER.size + _MESSAGE_LENGTH
    while at + _ATTRIBUTE.size <= min(length, len(answer)):
        size, name = _ATTRIBUTE.unpack_from(answer, at)
        if name == _INET_DIAG_MARK:
            return int(struct.unpack_from("=I", answer, at + _ATTRIBUTE.size)[0])
        at += max((size + 3) & ~3, _ATTRIBUTE.size)
    return None
