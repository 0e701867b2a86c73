"""Where a host is, from what the kernel knows anyway: the route to it, and the neighbour at the other end of the link.

Two questions on a socket of their own, some 20 microseconds: pyroute2 would take a thread and a hundred times as long.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

from ztun.ports import Origin

# rtnetlink(7), linux/rtnetlink.h, linux/neighbour.h.
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, dst_len, then what stays zero
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # struct ndmsg: family, ifindex, state, flags, type
_ATTRIBUTE = struct.Struct("=HH")
_NLM_F_REQUEST = 1
_NEW_NEIGHBOUR, _GET_NEIGHBOUR = 28, 30
_NEW_ROUTE, _GET_ROUTE = 24, 26
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 4, 5, 18
_NDA_DST, _NDA_LLADDR = 1, 2
_MAC = 6


def find(address: bytes) -> Origin | None:
    """The interface by which a host (packed address) is reached, and the MAC address of it or of the router before it.

    None where there is no route to it. The MAC address is None where the link has none, or nobody asked for it yet.
    """
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    with suppress(OSError), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as sock:
        route = _ask(sock, _GET_ROUTE, _ROUTE.pack(family, len(address) * 8, *bytes(6), 0), {_RTA_DST: address})
        if route is None:
            return None
        [index] = struct.unpack("=I", route[_RTA_OIF])
        next_hop = route.get(_RTA_GATEWAY, address)
        if _RTA_VIA in route:  # struct rtvia: a gateway of the other family (RFC 5549)
            [family] = struct.unpack_from("=H", route[_RTA_VIA])
            next_hop = route[_RTA_VIA][2:]
        neighbour = _ask(sock, _GET_NEIGHBOUR, _NEIGHBOUR.pack(family, index, 0, 0, 0), {_NDA_DST: next_hop}) or {}
        mac = neighbour.get(_NDA_LLADDR)
        return Origin(socket.if_indextoname(index), mac if mac and len(mac) == _MAC else None)
    return None


def _ask(sock: socket.socket, kind: int, body: bytes, attributes: dict[int, bytes]) -> dict[int, bytes] | None:
    """One question and the attributes of its answer, None when the kernel has none. Raises OSError."""
    tail = b"".join(
        _pad(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), key) + value) for key, value in attributes.items()
    )
    sock.send(_HEADER.pack(_HEADER.size + len(body) + len(tail), kind, _NLM_F_REQUEST, 0, 0) + body + tail)
    answer = sock.recv(8192)
    length, answered, *_ = _HEADER.unpack_from(answer)
    if answered != (_NEW_ROUTE if kind == _GET_ROUTE else _NEW_NEIGHBOUR):
        return None  # NLMSG_ERROR
    return dict(_attributes(answer[_HEADER.size + len(body) : length]))


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start + _ATTRIBUTE.size <= len(data):
        length, key = _ATTRIBUTE.unpack_from(data, start)
        if length < _ATTRIBUTE.size:
            return
        yield key & 0x3FFF, data[start + _ATTRIBUTE.size : start + length]
        start += (length + 3) & ~3


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
