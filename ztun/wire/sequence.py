"""Sequence number arithmetic (RFC 9293 section 3.4).

Inside a connection sequence numbers are plain integers that never wrap; only the 32 low bits go on the wire.
"""

from __future__ import annotations

from typing import Final

MASK: Final = 0xFFFFFFFF
_HALF: Final = 0x80000000


def unwrap(wire: int, near: int) -> int:
    """The full sequence number closest to `near` whose low 32 bits are `wire`."""
    return near + ((wire - near + _HALF) & MASK) - _HALF
