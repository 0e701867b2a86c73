"""ICMP (RFC 792) and ICMPv6 (RFC 4443): echo and errors."""

from __future__ import annotations

import struct
from enum import Enum
from typing import Final

from ztun.wire import checksum, ip

ECHO_REPLY: Final = 0
UNREACHABLE: Final = 3
ECHO_REQUEST: Final = 8
TIME_EXCEEDED: Final = 11
PARAMETER: Final = 12
UNREACHABLE6: Final = 1
TOO_BIG6: Final = 2
TIME_EXCEEDED6: Final = 3
PARAMETER6: Final = 4
ECHO_REQUEST6: Final = 128
ECHO_REPLY6: Final = 129
FRAGMENTATION_NEEDED: Final = 4  # code of UNREACHABLE

_ERROR: Final = struct.Struct("!BBHI")
_QUOTE4: Final = 576 - 20 - 8  # RFC 1812 section 4.3.2.3
_QUOTE6: Final = ip.MINIMUM_MTU6 - 40 - 8  # RFC 4443 section 2.4 (c)


_PROTOCOL: Final = 2  # code of UNREACHABLE


class Reason(Enum):
    """Why something cannot be reached: (ICMP code, ICMPv6 code) of Destination Unreachable."""

    NETWORK = (0, 0)
    HOST = (1, 3)
    PORT = (3, 4)
    PROHIBITED = (13, 1)


def is_error(version: int, kind: int) -> bool:
    """True for errors, to which no error is ever sent (RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e))."""
    if version == 6:
        return kind < 128
    return kind in (UNREACHABLE, 4, 5, TIME_EXCEEDED, PARAMETER)


def unreachable(source: bytes, destination: bytes, reason: Reason, invoking: bytes | memoryview) -> bytes:
    """An IP packet with Destination Unreachable that quotes `invoking` (an IP packet) as far as the RFCs allow."""
    code4, code6 = reason.value
    if len(source) == 4:
        return _error(source, destination, UNREACHABLE, code4, 0, invoking[:_QUOTE4])
    return _error(source, destination, UNREACHABLE6, code6, 0, invoking[:_QUOTE6])


def protocol_unreachable(source: bytes, destination: bytes, invoking: bytes | memoryview) -> bytes:
    """An IPv4 packet with Destination Unreachable: nobody here speaks the protocol of `invoking` (RFC 1122 3.2.2.1)."""
    return _error(source, destination, UNREACHABLE, _PROTOCOL, 0, invoking[:_QUOTE4])


def too_big(source: bytes, destination: bytes, mtu: int, invoking: bytes | memoryview) -> bytes:
    """An IP packet with Packet Too Big, or over IPv4 Fragmentation Needed: no more than `mtu` bytes get through
    (RFC 4443 section 3.2, RFC 1191 section 4)."""
    if len(source) == 4:
        return _error(source, destination, UNREACHABLE, FRAGMENTATION_NEEDED, mtu, invoking[:_QUOTE4])
    return _error(source, destination, TOO_BIG6, 0, mtu, invoking[:_QUOTE6])


def parameter_problem(
    source: bytes, destination: bytes, code: int, pointer: int, invoking: bytes | memoryview
) -> bytes:
    """An IPv6 packet with Parameter Problem. pointer: offset of what is wrong in `invoking`, maybe beyond the quote."""
    return _error(source, destination, PARAMETER6, code, pointer, invoking[:_QUOTE6])


def reassembly_time_exceeded(source: bytes, destination: bytes, invoking: bytes | memoryview) -> bytes:
    """An IP packet with Time Exceeded, code 1: the fragments after `invoking`, the first, did not come in time."""
    if len(source) == 4:
        return _error(source, destination, TIME_EXCEEDED, 1, 0, invoking[:_QUOTE4])
    return _error(source, destination, TIME_EXCEEDED6, 1, 0, invoking[:_QUOTE6])


def _error(source: bytes, destination: bytes, kind: int, code: int, rest: int, quote: bytes | memoryview) -> bytes:
    body = _ERROR.pack(kind, code, 0, rest) + bytes(quote)
    protocol, start = ip.ICMP, 0
    if len(source) == 16:
        protocol = ip.ICMPV6
        start = checksum.pseudo_sum(source + destination, protocol, len(body))
    check = checksum.finish(checksum.ones_sum(body, start))
    body = body[:2] + check.to_bytes(2, "big") + body[4:]
    return ip.header(source, destination, protocol, len(body)) + body


def echo_reply(request: ip.IpHeader, message: memoryview) -> bytes:
    """The IP packet that answers an echo request. message: the ICMP message, checksum included."""
    version6 = request.version == 6
    kind = ECHO_REPLY6 if version6 else ECHO_REPLY
    body = bytes((kind, 0, 0, 0)) + bytes(message[4:])
    start = checksum.pseudo_sum(request.source + request.destination, ip.ICMPV6, len(body)) if version6 else 0
    check = checksum.finish(checksum.ones_sum(body, start))
    head = ip.header(request.destination, request.source, request.protocol, len(body))
    return head + body[:2] + check.to_bytes(2, "big") + body[4:]
