"""Bounds per client: how much of one kind of state each source address holds."""

from __future__ import annotations


def source_of(address: bytes) -> bytes:
    """Whom the state of a packed address is charged to: an IPv4 address, of IPv6 the /64.

    A host has a whole /64 to make addresses in (RFC 4862; privacy addresses change by themselves, RFC 8981), so a
    bound per IPv6 address would be none.
    """
    return address if len(address) == 4 else address[:8]


class SourceCounts:
    """A counter for each source that holds something; those that hold nothing take no memory."""

    __slots__ = ("_counts", "_limit")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: dict[bytes, int] = {}

    def __len__(self) -> int:
        """How many sources hold something."""
        return len(self._counts)

    def is_full(self, source: bytes, more: int = 1) -> bool:
        """True when `more` would be beyond the limit."""
        return self._counts.get(source, 0) + more > self._limit

    def add(self, source: bytes, count: int = 1) -> None:
        self._counts[source] = self._counts.get(source, 0) + count

    def remove(self, source: bytes, count: int = 1) -> None:
        left = self._counts[source] - count
        if left:
            self._counts[source] = left
        else:
            del self._counts[source]
