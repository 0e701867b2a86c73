"""Packet Too Big about segments that the kernel carries: the TCP that holds their port takes no interest in them.

Whoever sent the segment has to hear of it, and that is the client (RFC 1191, RFC 8201).
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

from ztun.platform.linux import tables
from ztun.platform.linux.layout import FLOW
from ztun.wire import icmp, ip

_MOST: Final = 64  # messages of one turn
_LONGEST: Final = 2048
# linux/icmp.h, linux/icmpv6.h: what is to be kept from a socket, by type; a bit that is set is kept from it.
_SOL_RAW, _ICMP_FILTER = 255, 1
_SOL_ICMPV6, _ICMP6_FILTER = 58, 1
_MASK: Final = 0xFFFFFFFF


class TooBig(NamedTuple):
    """flow: of the packets that come back, as a key of the map `carried`; number: of the segment; mtu: bytes."""

    flow: bytes
    number: int
    mtu: int


class PathErrors:
    """Hears them on two raw sockets. Raises OSError where they cannot be had."""

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        four = socket.socket(socket.AF_INET, flags, socket.IPPROTO_ICMP)
        six = socket.socket(socket.AF_INET6, flags, socket.IPPROTO_ICMPV6)
        self._sockets = {four.fileno(): four, six.fileno(): six}
        self.descriptors = tuple(self._sockets)
        four.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << icmp.UNREACHABLE) & _MASK))
        words = [_MASK] * 8
        words[icmp.TOO_BIG6 >> 5] &= ~(1 << (icmp.TOO_BIG6 & 31)) & _MASK
        six.setsockopt(_SOL_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *words))

    def read(self, descriptor: int) -> list[TooBig]:
        """What there is to read on one of `descriptors`. What is about something else is left out."""
        sock = self._sockets[descriptor]
        found = []
        for _ in range(_MOST):
            try:
                data = sock.recv(_LONGEST)
            except OSError:  # nothing more, or an error of the socket's own
                break
            told = _read4(data) if sock.family == socket.AF_INET else _read6(data)
            if told is not None:
                found.append(told)
        return found

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def _read4(data: bytes) -> TooBig | None:
    """An IPv4 packet, as raw(7) gives it. An MTU of 0 is that of a router older than RFC 1191."""
    start = (data[0] & 15) * 4 if data else 0
    message = data[start:]
    if len(message) < 8 or message[:2] != bytes((icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED)):
        return None
    quote = message[8:]
    size = (quote[0] & 15) * 4 if quote else 0
    if size < 20 or len(quote) < size + 8 or quote[9] != ip.TCP:
        return None
    return _told(quote[12:16], quote[16:20], quote[size:], int.from_bytes(message[6:8], "big"))


def _read6(message: bytes) -> TooBig | None:
    """An ICMPv6 message, without the header in front."""
    quote = message[8:]
    if len(quote) < 48 or message[0] != icmp.TOO_BIG6 or quote[6] != ip.TCP:
        return None
    return _told(quote[8:24], quote[24:40], quote[40:], int.from_bytes(message[4:8], "big"))


def _told(local: bytes, proxy: bytes, segment: bytes, mtu: int) -> TooBig:
    local_port, proxy_port, number = struct.unpack_from("!HHI", segment)
    return TooBig(FLOW.pack(tables.widen(proxy), tables.widen(local), proxy_port, local_port), number, mtu)
