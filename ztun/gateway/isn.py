"""The numbers that a flow begins with (RFC 6528, RFC 7323 section 5.4): a keyed hash of its addresses, and a clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import blake2s
from typing import Final

from ztun.wire.sequence import MASK

_UPPER: Final = MASK << 32


def make_isn(secret: bytes | None = None) -> Callable[[bytes, float], int]:
    """A generator for `Stack`. secret: 32 bytes, random when None.

    The lower half of its 64 bits is the initial sequence number, which grows by one every 4 microseconds.
    """
    key = secret or os.urandom(32)

    def isn(flow: bytes, now: float) -> int:
        digest = int.from_bytes(blake2s(flow, key=key, digest_size=8).digest(), "big")
        return digest & _UPPER | (digest + int(now * 250000)) & MASK

    return isn
