"""What two ends of TCP agree on in their SYNs, for a connection that somebody else than the stack carries."""

from __future__ import annotations

from typing import NamedTuple


class Offer(NamedTuple):
    """A client's SYN. key: see FlowKey; number: of its next segment, 32 bits; scale: window scale, None without the
    option (RFC 7323 section 2.2); stamp: its timestamp, None without (section 3)."""

    key: bytes
    number: int
    mss: int
    scale: int | None
    sack: bool
    stamp: int | None


class Terms(NamedTuple):
    """Our SYN-ACK. number: of the first byte after it, 32 bits; scale, sack, stamps: only what was offered; window:
    bytes."""

    number: int
    mss: int
    scale: int | None
    sack: bool
    stamps: bool
    window: int
