"""Deadlines of many connections, cheap to move.

A connection's deadline moves with nearly every packet, mostly to later. So the heap is touched only when it moves to
earlier than what is armed; an entry that comes up too early is put back at the real deadline.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Protocol


class Timed(Protocol):
    armed: float

    def deadline(self) -> float:
        """When it wants to be called, in seconds; NEVER when it does not."""
        ...

    def expired(self, now: float) -> None: ...


NEVER = float("inf")


class TimerQueue:
    __slots__ = ("_heap", "_serial")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timed]] = []
        self._serial = 0

    def arm(self, timed: Timed, when: float) -> None:
        """Make sure that `timed` is looked at no later than `when`."""
        if when < timed.armed:
            timed.armed = when
            self._serial += 1
            heappush(self._heap, (when, self._serial, timed))

    def next(self) -> float | None:
        """The earliest moment at which something may expire."""
        return self._heap[0][0] if self._heap else None

    def run(self, now: float) -> None:
        """Call `expired` of everything whose deadline has passed."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            when, _, timed = heappop(heap)
            if when != timed.armed:
                continue  # replaced by an earlier entry
            timed.armed = NEVER
            if timed.deadline() <= now:
                timed.expired(now)
            following = timed.deadline()
            if following != NEVER:
                self.arm(timed, following)
