"""The numbers that a flow begins with (RFC 6528, RFC 7323 section 5.4): a keyed hash of its addresses, and a clock."""

from __future__ import annotations

import os
import sys
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
    if not has_keyed_hash():
        return lambda flow, now: _number(int.from_bytes(blake2s(flow, key=key, digest_size=8).digest(), "big"), now)
    # What Linux takes for this as well (net/core/secure_seq.c), and a tenth of the time of the other.
    return lambda flow, now: _number(hash(key + flow), now)


def has_keyed_hash() -> bool:
    """Whether hash() of bytes is SipHash, under a key that this process made up (PEP 456, PYTHONHASHSEED)."""
    return sys.hash_info.algorithm.startswith("siphash") and sys.hash_info.width == 64 and _is_random()


def _is_random() -> bool:
    return sys.flags.hash_randomization != 0 and os.environ.get("PYTHONHASHSEED", "random") == "random"


def _number(digest: int, now: float) -> int:
    return digest & _UPPER | (digest + int(now * 250000)) & MASK
