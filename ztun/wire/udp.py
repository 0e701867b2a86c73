"""UDP header (RFC 768)."""

from __future__ import annotations

import struct

from ztun.wire.ip import MalformedError

LENGTH = 8
CHECKSUM_OFFSET = 6
_HEADER = struct.Struct("!HHHH")


def parse(packet: memoryview, start: int, end: int) -> tuple[int, int, int, int]:
    """(source port, destination port, end of payload, checksum) of the header at `start`. Raises MalformedError."""
    if end - start < LENGTH:
        raise MalformedError("udp-truncated")
    source, destination, length, check = _HEADER.unpack_from(packet, start)
    if length < LENGTH or start + length > end:
        raise MalformedError("udp-length")
    return source, destination, start + length, check


def header(source: int, destination: int, payload_length: int, check: int) -> bytes:
    """A header with the given checksum field."""
    return _HEADER.pack(source, destination, LENGTH + payload_length, check)
