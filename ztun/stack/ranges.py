"""A set of integers kept as disjoint, sorted half-open ranges: what a peer has SACKed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class RangeSet:
    """Sorted, disjoint, non-touching ranges [start, end)."""

    __slots__ = ("_ends", "_starts", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.total = 0  # integers in the set

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        """How many ranges."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __reversed__(self) -> Iterator[tuple[int, int]]:
        return zip(reversed(self._starts), reversed(self._ends), strict=True)

    @property
    def first(self) -> tuple[int, int]:
        """The first range. Only for a set that is not empty."""
        return self._starts[0], self._ends[0]

    @property
    def highest(self) -> int:
        """The end of the last range. Only for a set that is not empty."""
        return self._ends[-1]

    def add(self, start: int, end: int) -> None:
        """Add [start, end), merging what it touches."""
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
            self.total -= sum(self._ends[low:high]) - sum(self._starts[low:high])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]
        self.total += end - start

    def containing(self, number: int) -> tuple[int, int] | None:
        """The range that `number` lies in."""
        index = bisect_right(self._starts, number) - 1
        if index < 0 or self._ends[index] <= number:
            return None
        return self._starts[index], self._ends[index]

    def discard_below(self, bound: int) -> None:
        """Remove every integer below `bound`."""
        while self._starts and self._starts[0] < bound:
            start, end = self._starts[0], self._ends[0]
            if end <= bound:
                del self._starts[0], self._ends[0]
                self.total -= end - start
            else:
                self._starts[0] = bound
                self.total -= bound - start

    def remove(self, start: int, end: int) -> None:
        """Remove every integer of [start, end)."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last or start >= end:
            return
        self.total -= self.count_between(start, end)
        left, right = self._starts[first], self._ends[last - 1]
        starts, ends = ([left], [start]) if left < start else ([], [])
        if right > end:
            starts.append(end)
            ends.append(right)
        self._starts[first:last] = starts
        self._ends[first:last] = ends

    def discard_from(self, bound: int) -> None:
        """Remove every integer from `bound` on."""
        while self._starts and self._ends[-1] > bound:
            start, end = self._starts[-1], self._ends[-1]
            if start >= bound:
                del self._starts[-1], self._ends[-1]
                self.total -= end - start
            else:
                self._ends[-1] = bound
                self.total -= end - bound

    def clear(self) -> None:
        self._starts.clear()
        self._ends.clear()
        self.total = 0

    def next_gap(self, position: int, limit: int) -> tuple[int, int] | None:
        """The first range [a, b) of missing integers with position <= a < b <= limit."""
        index = bisect_right(self._starts, position) - 1
        if index >= 0 and self._ends[index] > position:
            position = self._ends[index]
        index += 1
        if position >= limit:
            return None
        if index < len(self._starts):
            limit = min(limit, self._starts[index])
        return position, limit

    def count_between(self, start: int, end: int) -> int:
        """How many integers of the set lie in [start, end)."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        if first >= last or start >= end:
            return 0
        total = sum(self._ends[first:last]) - sum(self._starts[first:last])
        return total - max(start - self._starts[first], 0) - max(self._ends[last - 1] - end, 0)
