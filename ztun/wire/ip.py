"""IPv4 (RFC 791) and IPv6 (RFC 8200) headers.

Packets are memoryviews; every offset counts from the start of the view, whatever stands in front of the IP header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from ztun.wire import checksum, extensions
from ztun.wire.extensions import Fragment
from ztun.wire.malformed import MalformedError as MalformedError

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMPV6: Final = 58

MINIMUM_MTU6: Final = 1280
DEFAULT_TTL: Final = 64

_V4: Final = struct.Struct("!BBHHHBBH4s4s")
_V6: Final = struct.Struct("!IHBB16s16s")
_FRAGMENT6: Final = struct.Struct("!BBHI")
_NOT_ON_A_WIRE6: Final = (bytes(16), bytes(15) + b"\1")  # unspecified and loopback
_DONT_FRAGMENT: Final = 0x4000
_MORE: Final = 0x2000


class IpHeader(NamedTuple):
    """What the layers above need. payload and end are offsets into the packet; fragment is None for a whole packet;
    pointer is the offset, from the IP header, of the field that says the protocol."""

    version: int
    source: bytes
    destination: bytes
    protocol: int
    payload: int
    end: int
    hop_limit: int
    fragment: Fragment | None
    pointer: int


def parse(packet: memoryview, start: int) -> IpHeader:
    """Parse the IP header at `start`. Raises MalformedError."""
    if len(packet) <= start:
        raise MalformedError("ip-truncated")
    version = packet[start] >> 4
    if version == 4:
        return _parse4(packet, start)
    if version == 6:
        return _parse6(packet, start)
    raise MalformedError("ip-version")


def _parse4(packet: memoryview, start: int) -> IpHeader:
    if len(packet) < start + 20:
        raise MalformedError("ip-truncated")
    first, _, total, ident, frag, ttl, protocol, _, source, destination = _V4.unpack_from(packet, start)
    header = (first & 15) * 4
    if header < 20 or total < header or start + total > len(packet):
        raise MalformedError("ip-length")
    if not checksum.is_valid(packet[start : start + header]):
        raise MalformedError("ip-checksum")
    fragment = Fragment(ident, (frag & 0x1FFF) * 8, bool(frag & _MORE)) if frag & 0x3FFF else None
    if header > 20:
        extensions.check_options4(packet[start + 20 : start + header])
    return IpHeader(4, source, destination, protocol, start + header, start + total, ttl, fragment, 9)


def _parse6(packet: memoryview, start: int) -> IpHeader:
    if len(packet) < start + 40:
        raise MalformedError("ip-truncated")
    _, length, _, hops, source, destination = _V6.unpack_from(packet, start)
    end = start + 40 + length
    if end > len(packet):
        raise MalformedError("ip-length")
    offset, protocol, pointer, fragment = extensions.walk(packet, start, end)
    return IpHeader(6, source, destination, protocol, offset, end, hops, fragment, pointer)


def header(source: bytes, destination: bytes, protocol: int, length: int, ttl: int = DEFAULT_TTL) -> bytes:
    """An IPv4 (DF set, ID 0: RFC 6864) or IPv6 header, by the size of the addresses, for `length` bytes of payload."""
    if len(source) == 16:
        return _V6.pack(0x60000000, length, protocol, ttl, source, destination)
    return _header4(source, destination, protocol, length, ttl, 0, _DONT_FRAGMENT)


def _header4(source: bytes, destination: bytes, protocol: int, length: int, ttl: int, ident: int, frag: int) -> bytes:
    raw = _V4.pack(0x45, 0, 20 + length, ident, frag, ttl, protocol, 0, source, destination)
    return raw[:10] + checksum.finish(checksum.ones_sum(raw)).to_bytes(2, "big") + raw[12:]


def fragments(
    source: bytes, destination: bytes, protocol: int, payload: memoryview, mtu: int, identification: int
) -> Iterator[tuple[bytes, memoryview]]:
    """Cut a transport payload, its checksum complete, into fragments of at most `mtu` bytes: (header, piece)."""
    overhead = 20 if len(source) == 4 else 48
    step = (mtu - overhead) // 8 * 8
    for offset in range(0, len(payload), step):
        piece = payload[offset : offset + step]
        more = offset + step < len(payload)
        if len(source) == 4:
            frag = offset // 8 | (_MORE if more else 0)
            head = _header4(source, destination, protocol, len(piece), DEFAULT_TTL, identification & 0xFFFF, frag)
        else:
            head = _V6.pack(0x60000000, len(piece) + 8, extensions.FRAGMENT, DEFAULT_TTL, source, destination)
            head += _FRAGMENT6.pack(protocol, 0, offset | more, identification & 0xFFFFFFFF)
        yield head, piece


def is_unicast(address: bytes) -> bool:
    """False for what no host on a wire has as its address, and which is never answered: unspecified, loopback,
    multicast and broadcast addresses (RFC 1122 section 3.2.1.3, RFC 4291 section 2.5)."""
    if len(address) == 4:
        return 0 < address[0] < 224 and address[0] != 127
    return address[0] != 0xFF and address not in _NOT_ON_A_WIRE6
