"""Lines that repeat: a token bucket for each kind, and a count of what it held back. No clock in here.

A kind is what tells lines apart: the component and the event. When a kind is held back for the first time a window
opens; when it ends, its count is due.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeVar

WINDOW = 10.0  # seconds that one count covers
_MOST_KINDS = 1024

K = TypeVar("K", bound=Hashable)


class Limit(NamedTuple):
    """At most `burst` lines at once, `per_second` in the long run."""

    burst: int
    per_second: float


class _Kind:
    __slots__ = ("at", "ends", "limit", "suppressed", "tokens")

    def __init__(self, limit: Limit, now: float) -> None:
        self.limit = limit
        self.tokens = float(limit.burst)
        self.at = now
        self.suppressed = 0
        self.ends = 0.0


class Repeats(Generic[K]):
    """suppressed: lines held back so far. next_end: when the first open window ends, None where none is open."""

    def __init__(self, window: float = WINDOW) -> None:
        self.suppressed = 0
        self.next_end: float | None = None
        self._window = window
        self._kinds: dict[K, _Kind] = {}

    def admit(self, key: K, limit: Limit, now: float) -> bool:
        """Whether a line of this kind may be written now (seconds). A kind keeps the limit that it came with."""
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._add(key, limit, now)
        tokens = kind.tokens + (now - kind.at) * kind.limit.per_second
        kind.at = now
        if tokens >= 1.0:
            kind.tokens = min(tokens, kind.limit.burst) - 1.0
            return True
        kind.tokens = tokens
        self._suppress(kind, now)
        return False

    def ended(self, now: float) -> list[tuple[K, int]]:
        """(kind, lines held back) of each window that has ended; they are closed by this."""
        found = []
        ends = []
        for key, kind in self._kinds.items():
            if not kind.suppressed:
                continue
            if kind.ends <= now:
                found.append((key, kind.suppressed))
                kind.suppressed = 0
            else:
                ends.append(kind.ends)
        self.next_end = min(ends, default=None)
        return found

    def _suppress(self, kind: _Kind, now: float) -> None:
        self.suppressed += 1
        kind.suppressed += 1
        if kind.suppressed == 1:
            kind.ends = now + self._window
            if self.next_end is None or kind.ends < self.next_end:
                self.next_end = kind.ends

    def _add(self, key: K, limit: Limit, now: float) -> _Kind:
        """Events are fixed texts, nearly all of them: the bound is for those that are not."""
        if len(self._kinds) >= _MOST_KINDS:
            self._kinds = {key: kind for key, kind in self._kinds.items() if kind.suppressed}
        kind = self._kinds[key] = _Kind(limit, now)
        return kind
