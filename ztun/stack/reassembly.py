"""Out-of-order data of one direction, held until the gap before it is filled."""

from __future__ import annotations

from bisect import bisect_right

# Below this a copy is cheaper than keeping the 64 KiB buffer that the bytes arrived in.
_COPY_BELOW = 16384


class Reassembly:
    """Disjoint pieces [start, end) with their bytes, sorted by start. Bounded by the window that was advertised."""

    __slots__ = ("_pieces", "_recent", "size")

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, memoryview | bytes]] = []
        self._recent = 0
        self.size = 0

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def insert(self, start: int, data: memoryview) -> bool:
        """Keep the parts of `data` that are new. Returns True when a view of the buffer itself was kept.

        Bytes that are already here win over later ones for the same place, as RFC 9293 3.10.7.4 trims new segments.
        """
        self._recent = start
        kept = False
        end = start + len(data)
        index = bisect_right(self._pieces, start, key=lambda piece: piece[0])
        position = start
        if index and self._pieces[index - 1][1] > position:
            position = self._pieces[index - 1][1]
        while position < end:
            stop = min(end, self._pieces[index][0]) if index < len(self._pieces) else end
            if position < stop:
                part = data[position - start : stop - start]
                copy = len(part) < _COPY_BELOW
                self._pieces.insert(index, (position, stop, bytes(part) if copy else part))
                self.size += stop - position
                kept = kept or not copy
                index += 1
            if index >= len(self._pieces):
                break
            position = max(position, self._pieces[index][1])
            index += 1
        return kept

    def take(self, next_sequence: int) -> memoryview | None:
        """The bytes that start at `next_sequence`, if they are here."""
        while self._pieces and self._pieces[0][0] <= next_sequence:
            start, end, data = self._pieces.pop(0)
            self.size -= end - start
            if end > next_sequence:
                return memoryview(data)[next_sequence - start :]
        return None

    def sack_blocks(self, limit: int) -> tuple[tuple[int, int], ...]:
        """Up to `limit` ranges for the SACK option, the one with the latest arrival first (RFC 2018 section 4)."""
        ranges: list[tuple[int, int]] = []
        for start, end, _ in self._pieces:
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((start, end))
        ranges.sort(key=lambda r: not r[0] <= self._recent < r[1])
        return tuple(ranges[:limit])
