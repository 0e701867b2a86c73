"""IPv6 extension headers (RFC 8200 section 4) and IPv4 options (RFC 791 section 3.1), as far as an end host has to
look at them."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from ztun.wire.malformed import MalformedError, ParameterError

# Next Header values.
HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
NO_NEXT: Final = 59
OPTIONS: Final = 60
_TCP: Final = 6
_UDP: Final = 17
_ICMPV6: Final = 58

# Codes of ICMPv6 Parameter Problem (RFC 4443 section 3.4, RFC 7112 section 5).
ERRONEOUS_FIELD: Final = 0
UNKNOWN_HEADER: Final = 1
UNKNOWN_OPTION: Final = 2
INCOMPLETE_CHAIN: Final = 3

_FRAGMENT: Final = struct.Struct("!BBHI")
_MORE: Final = 1
_OFFSET: Final = 0xFFF8
_PAD1: Final = 0
_PADN: Final = 1
_MAX_HEADERS: Final = 8  # RFC 8504 section 5.3 lets a host bound them
_MAX_OPTIONS: Final = 64  # of one header, padding included
_SMALLEST: Final = {_TCP: 20, _UDP: 8, _ICMPV6: 8}  # transport headers

# IPv4 options
_END: Final = 0
_NO_OPERATION: Final = 1
_LOOSE_ROUTE: Final = 131
_STRICT_ROUTE: Final = 137


class Fragment(NamedTuple):
    """offset: of this piece in the payload, in bytes; more: another one follows; identification: of the datagram."""

    identification: int
    offset: int
    more: bool


class Chain(NamedTuple):
    """Where the extension headers end. payload: offset in the packet; protocol: what begins there; pointer: offset
    from the IP header of the field that says so; fragment: then the payload is a piece of a datagram."""

    payload: int
    protocol: int
    pointer: int
    fragment: Fragment | None = None


def walk(packet: memoryview, start: int, end: int) -> Chain:
    """Follow the extension headers of the IPv6 packet from `start` to `end`. They may come in any order and number,
    except that Hop-by-Hop Options come first (RFC 8200 section 4.1). Raises MalformedError, also ParameterError."""
    return _walk(packet, start, end, start + 40, packet[start + 6], 6, False)


def _walk(
    packet: memoryview, start: int, end: int, offset: int, following: int, pointer: int, is_fragment: bool
) -> Chain:
    for _ in range(_MAX_HEADERS):
        if following not in (HOP_BY_HOP, ROUTING, OPTIONS, FRAGMENT):
            return Chain(offset, following, pointer)
        if following == HOP_BY_HOP and offset != start + 40:
            raise ParameterError("ip-extension", UNKNOWN_HEADER, pointer)
        if offset + 8 > end:
            raise MalformedError("ip-extension")
        if following == FRAGMENT:
            protocol, _, word, identification = _FRAGMENT.unpack_from(packet, offset)
            if word & (_OFFSET | _MORE):
                if is_fragment:
                    raise MalformedError("ip-extension")  # a fragment of a fragment
                fragment = Fragment(identification, word & _OFFSET, bool(word & _MORE))
                if not fragment.offset:
                    _check_first(packet, start, end, offset, protocol)
                return Chain(offset + 8, protocol, offset - start, fragment)
            size = 8  # an atomic fragment is a whole packet (RFC 6946)
        else:
            size = (packet[offset + 1] + 1) * 8
            if offset + size > end:
                raise MalformedError("ip-extension")
            if following == ROUTING:
                _check_routing(packet, start, offset)
            else:
                _check_options(packet, start, offset, offset + size)
        following, pointer = packet[offset], offset - start
        offset += size
    raise MalformedError("ip-extension")


def _check_first(packet: memoryview, start: int, end: int, offset: int, protocol: int) -> None:
    """The first fragment has all headers, the transport's included (RFC 7112 section 3)."""
    try:
        rest = _walk(packet, start, end, offset + 8, protocol, offset - start, True)
    except ParameterError:
        raise
    except MalformedError:
        raise ParameterError("ip-fragment-tiny", INCOMPLETE_CHAIN, 0) from None
    if end - rest.payload < _SMALLEST.get(rest.protocol, 0):
        raise ParameterError("ip-fragment-tiny", INCOMPLETE_CHAIN, 0)


def _check_routing(packet: memoryview, start: int, offset: int) -> None:
    """No type of routing is known here, least of all type 0 (RFC 5095 section 3): fine where the route is at its end,
    else an error (RFC 8200 section 4.4)."""
    if packet[offset + 3]:
        raise ParameterError("ip-source-route", ERRONEOUS_FIELD, offset + 2 - start)


def _check_options(packet: memoryview, start: int, offset: int, end: int) -> None:
    """No option asks anything of a host here; the two upper bits of one's type say what it means that it is unknown
    (RFC 8200 section 4.2)."""
    position = offset + 2
    for _ in range(_MAX_OPTIONS):
        if position >= end:
            return
        kind = packet[position]
        if kind == _PAD1:
            position += 1
            continue
        if position + 2 > end or position + 2 + packet[position + 1] > end:
            break
        action = kind >> 6
        if action == 1:
            raise MalformedError("ip-option")
        if action:
            raise ParameterError("ip-option", UNKNOWN_OPTION, position - start)
        position += 2 + packet[position + 1]
    raise MalformedError("ip-extension")


def check_options4(options: memoryview) -> None:
    """Options that IPv4 packets may carry are passed over. One that breaks its format is not, nor is a source route
    (RFC 7126 sections 4.3 and 4.4 want it dropped). Raises MalformedError."""
    position = 0
    while position < len(options) and options[position] != _END:
        kind = options[position]
        if kind == _NO_OPERATION:
            position += 1
            continue
        if kind in (_LOOSE_ROUTE, _STRICT_ROUTE):
            raise MalformedError("ip-source-route")
        length = options[position + 1] if position + 1 < len(options) else 0
        if length < 2 or position + length > len(options):
            raise MalformedError("ip-option")
        position += length
