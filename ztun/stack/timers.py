"""Deadlines of many connections, cheap to move.

A connection's deadline moves with nearly every packet, mostly to later. So the heap is touched only when it moves to
earlier than what is armed; an entry that comes up too early is put back at the real deadline. The heap holds numbers,
not connections: one that is closed is gone, however far ahead its deadline was.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Final, Protocol


class Timed(Protocol):
    """armed: when it will be looked at, NEVER at first; timer: the number of that entry. Both are the queue's."""

    armed: float
    timer: int

    def deadline(self) -> float:
        """When it wants to be called, in seconds; NEVER when it does not."""
        ...

    def expired(self, now: float) -> None: ...


NEVER: Final = float("inf")
_SPARE: Final = 64  # dead entries that are not worth a look


class TimerQueue:
    """earliest: nothing expires before; NEVER when there is nothing. What was cancelled may still be in it."""

    __slots__ = ("_heap", "_live", "_serial", "earliest")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._live: dict[int, Timed] = {}
        self._serial = 0
        self.earliest = NEVER

    def __len__(self) -> int:
        """Entries, of which some may be dead."""
        return len(self._heap)

    def arm(self, timed: Timed, when: float) -> None:
        """Make sure that `timed` is looked at no later than `when`."""
        if when < timed.armed:
            if timed.armed != NEVER:
                del self._live[timed.timer]
            self._serial += 1
            timed.armed, timed.timer = when, self._serial
            self._live[self._serial] = timed
            heappush(self._heap, (when, self._serial))
            if when < self.earliest:
                self.earliest = when
            self._tidy()

    def cancel(self, timed: Timed) -> None:
        """Forget `timed`."""
        if timed.armed != NEVER:
            timed.armed = NEVER
            del self._live[timed.timer]
            self._tidy()

    def _tidy(self) -> None:
        """Throw the dead entries out before they are most of the heap."""
        if len(self._heap) > 2 * len(self._live) + _SPARE:
            self._heap[:] = [entry for entry in self._heap if entry[1] in self._live]
            heapify(self._heap)

    def next(self) -> float | None:
        """The earliest moment at which something may expire."""
        heap = self._heap
        while heap and heap[0][1] not in self._live:
            heappop(heap)
        return heap[0][0] if heap else None

    def run(self, now: float) -> None:
        """Call `expired` of everything whose deadline has passed."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, serial = heappop(heap)
            timed = self._live.pop(serial, None)
            if timed is None:
                continue  # cancelled, or replaced by an earlier entry
            timed.armed = NEVER
            if timed.deadline() <= now:
                timed.expired(now)
            following = timed.deadline()
            if following != NEVER:
                self.arm(timed, following)
        earliest = self.next()
        self.earliest = NEVER if earliest is None else earliest
