"""The Internet checksum (RFC 1071).

Since 2**16 is 1 modulo 65535, the one's complement sum of 16-bit words equals the whole buffer, read as one big-endian
integer, modulo 65535. CPython does that in C, which makes it by far the fastest way to sum in Python.
"""

from __future__ import annotations

from typing import Final

_M: Final = 0xFFFF


def ones_sum(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """One's complement sum of `data`, padded with a zero byte when its length is odd, added to `start`.

    Returns 0..65534; 0 stands for both zeros of one's complement arithmetic.
    """
    value = int.from_bytes(data, "big")
    if len(data) & 1:
        value <<= 8
    return (value + start) % _M


def finish(total: int) -> int:
    """The 16-bit checksum field for a sum: its complement."""
    return _M - total % _M


def is_valid(data: bytes | bytearray | memoryview, start: int = 0) -> bool:
    """True when `data`, its checksum field included, sums to zero."""
    return ones_sum(data, start) == 0


def pseudo_sum(addresses: bytes | memoryview, protocol: int, length: int) -> int:
    """Sum of the pseudo-header (RFC 9293 section 3.1, RFC 8200 section 8.1).

    addresses: source and destination, packed, 8 or 32 bytes; length: of the transport header and payload in bytes.
    """
    return ones_sum(addresses, protocol + (length >> 16) + (length & _M))
