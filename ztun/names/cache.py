"""Answers of upstream servers, kept for as long as their TTLs allow. Bounded; the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from ztun.names.answer import Answer
from ztun.names.message import Query

# A longer answer is asked again each time, so that no one zone can fill the memory.
_MAX_KEPT = 4096


class CacheKey(NamedTuple):
    """What makes two queries the same question: with DO or CD set, the answer may be another one."""

    name: str
    type: int
    dnssec_ok: bool
    checking_disabled: bool

    @classmethod
    def of(cls, query: Query) -> CacheKey:
        return cls(query.name, query.type, query.dnssec_ok, query.checking_disabled)


class AnswerCache:
    """At most `size` answers; 0 keeps none. `now` is in seconds of a clock that never runs backwards."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._entries: OrderedDict[CacheKey, tuple[Answer, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: CacheKey, answer: Answer, now: float) -> None:
        """Keep an answer that came now, if it has a lifetime."""
        if answer.lifetime <= 0 or len(answer.body) > _MAX_KEPT or not self.size:
            return
        self._entries[key] = (answer, now)
        self._entries.move_to_end(key)
        if len(self._entries) > self.size:
            self._entries.popitem(last=False)

    def get(self, key: CacheKey, now: float) -> tuple[Answer, float] | None:
        """The answer and its age in seconds, or None. One whose lifetime is over is forgotten."""
        found = self._entries.get(key)
        if found is None:
            return None
        answer, since = found
        if now - since >= answer.lifetime:
            del self._entries[key]
            return None
        self._entries.move_to_end(key)
        return answer, now - since
