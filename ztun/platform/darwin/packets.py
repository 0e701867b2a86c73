"""What the classifier has to know of a packet: the twin of bpf/parse.h, with the same reasons to drop."""

from __future__ import annotations

import struct

# Counter names of bpf/shared.h.
TRUNCATED = "drop_truncated"
BAD_VERSION = "drop_bad_version"
BAD_HEADER = "drop_bad_header"
BAD_LENGTH = "drop_bad_length"
BAD_EXTENSION = "drop_bad_extension"
SHORT_TRANSPORT = "drop_short_transport"

_V4 = struct.Struct("!BxHxxHxBxx4s4s")  # version and length, total length, fragment, protocol, addresses
_V6 = struct.Struct("!BxxxHBx16s16s")  # version, payload length, next header, addresses
_PORT = struct.Struct("!H")
_TCP, _UDP, _NONE = 6, 17, 59
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION, _MOBILITY = 0, 43, 44, 51, 60, 135
_EXTENSIONS = frozenset({_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION, _MOBILITY})
_MOST_EXTENSIONS = 8

Parsed = tuple[bytes, bytes, int, bool, int]
"""(source, destination, destination port or 0, is a fragment, length of the IP packet)."""


class Refused(Exception):  # noqa: N818 (it reads as what it says)
    """The packet is to be dropped: the counter's name, and the length that is counted."""

    def __init__(self, reason: str, length: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.length = length


def parse(packet: memoryview) -> Parsed:
    """Read a packet that begins at the IP header. Raises Refused."""
    version = packet[0] >> 4 if len(packet) else 0
    if version == 4:
        return _parse4(packet)
    if version == 6:
        return _parse6(packet)
    raise Refused(BAD_VERSION if len(packet) >= _V4.size else TRUNCATED, len(packet))


def _parse4(packet: memoryview) -> Parsed:
    if len(packet) < _V4.size:
        raise Refused(TRUNCATED, len(packet))
    first, total, fragment, protocol, source, destination = _V4.unpack_from(packet)
    header = (first & 15) * 4
    if header < _V4.size or header > len(packet):
        raise Refused(BAD_HEADER, len(packet))
    if total < header or total > len(packet):
        raise Refused(BAD_LENGTH, len(packet))
    if fragment & 0x1FFF:  # beyond the first fragment there is payload where the ports would be
        protocol = _NONE
    port = _port(packet, header, total) if protocol in (_TCP, _UDP) else 0
    return source, destination, port, bool(fragment & 0x3FFF), total


def _parse6(packet: memoryview) -> Parsed:
    if len(packet) < _V6.size:
        raise Refused(TRUNCATED, len(packet))
    _first, length, protocol, source, destination = _V6.unpack_from(packet)
    total = _V6.size + length
    if total > len(packet):
        raise Refused(BAD_LENGTH, len(packet))
    offset, is_fragment = _V6.size, False
    if protocol in _EXTENSIONS:
        protocol, offset, is_fragment = _walk(packet, protocol, total)
    port = _port(packet, offset, total) if protocol in (_TCP, _UDP) else 0
    return source, destination, port, is_fragment, total


def _walk(packet: memoryview, protocol: int, total: int) -> tuple[int, int, bool]:
    """(what comes behind the extension headers, where, whether one is a fragment header) (RFC 8200, section 4)."""
    offset, is_fragment = _V6.size, False
    for _ in range(_MOST_EXTENSIONS):
        if protocol not in _EXTENSIONS:
            break
        if offset + 8 > total:
            raise Refused(BAD_EXTENSION, total)
        following, size = packet[offset], packet[offset + 1]
        length = (size + 2) * 4 if protocol == _AUTHENTICATION else (size + 1) * 8
        if protocol == _FRAGMENT:
            length = 8
            (fragment,) = _PORT.unpack_from(packet, offset + 2)
            is_fragment |= bool(fragment & 0xFFF9)  # else it is an atomic one (RFC 6946)
            if fragment & 0xFFF8:
                following = _NONE
        protocol = following
        offset += length
        if offset > total:
            raise Refused(BAD_EXTENSION, total)
    if protocol in _EXTENSIONS:
        raise Refused(BAD_EXTENSION, total)
    return protocol, offset, is_fragment


def _port(packet: memoryview, offset: int, total: int) -> int:
    """The destination port, which TCP (RFC 9293, section 3.1) and UDP (RFC 768) have in the same place."""
    if offset + 4 > total:
        raise Refused(SHORT_TRANSPORT, total)
    return int(_PORT.unpack_from(packet, offset + 2)[0])


def is_bad_source(source: bytes) -> bool:
    """Whether no answer can reach it: loopback, multicast, unspecified (RFC 1122, 3.2.1.3; RFC 4291, 2.5)."""
    if len(source) == 4:
        return source[0] == 0 or source[0] == 127 or source[0] >= 224
    return source[0] == 0xFF or (not any(source[:15]) and source[15] <= 1)
