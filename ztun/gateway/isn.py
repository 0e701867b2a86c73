"""Initial sequence numbers (RFC 6528): a clock of 4 microseconds plus a keyed hash of the connection's addresses."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable


def make_isn(secret: bytes | None = None) -> Callable[[bytes, float], int]:
    """A generator for `Stack`. secret: 32 bytes, random when None."""
    key = secret or os.urandom(32)

    def isn(flow: bytes, now: float) -> int:
        digest = hashlib.blake2s(flow, key=key, digest_size=4).digest()
        return (int.from_bytes(digest, "big") + int(now * 250000)) & 0xFFFFFFFF

    return isn
