"""Out-of-order data of one direction, held until the gap before it is filled."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Final

from ztun.stack.memory import PIECE
from ztun.stack.ranges import RangeSet

# Below this the bytes are copied, so that no piece keeps a buffer alive that is more than twice as large.
_COPY_BELOW: Final = 32768


# Arrivals that are remembered to order SACK blocks by.
_RECENT: Final = 8


class Reassembly:
    """Disjoint pieces [start, end) with their bytes, sorted by start.

    Their bytes are bounded by the window that was advertised, their number by `most`: beyond it new ones are not kept,
    which a receiver may do with whatever it has not acknowledged (RFC 9293 section 3.10.7.4, RFC 2018 section 8).
    """

    __slots__ = ("_most", "_pieces", "_ranges", "_recent")

    def __init__(self, most: int) -> None:
        self._most = most
        self._pieces: list[tuple[int, int, memoryview | bytes]] = []
        self._ranges = RangeSet()
        self._recent: deque[int] = deque(maxlen=_RECENT)

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return self._ranges.total

    @property
    def cost(self) -> int:
        """Bytes of memory that this takes, near enough."""
        return self._ranges.total + PIECE * len(self._pieces)

    def insert(self, start: int, data: memoryview) -> bool:
        """Keep the parts of `data` that are new. Returns True when a view of the buffer itself was kept.

        Bytes that are already here win over later ones for the same place, as RFC 9293 3.10.7.4 trims new segments.
        """
        self._recent.appendleft(start)
        kept = False
        end = start + len(data)
        index = bisect_right(self._pieces, start, key=lambda piece: piece[0])
        position = start
        if index and self._pieces[index - 1][1] > position:
            position = self._pieces[index - 1][1]
        while position < end and len(self._pieces) < self._most:
            stop = min(end, self._pieces[index][0]) if index < len(self._pieces) else end
            if position < stop:
                part = data[position - start : stop - start]
                copy = len(part) < _COPY_BELOW
                self._pieces.insert(index, (position, stop, bytes(part) if copy else part))
                self._ranges.add(position, stop)
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
            self._ranges.discard_below(end)
            if end > next_sequence:
                return memoryview(data)[next_sequence - start :]
        return None

    def cut(self, end: int) -> None:
        """Let go of everything from `end` on."""
        while self._pieces and self._pieces[-1][1] > end:
            start, _, data = self._pieces.pop()
            if start < end:
                self._pieces.append((start, end, data[: end - start]))
        self._ranges.discard_from(end)

    def sack_blocks(self, limit: int) -> list[tuple[int, int]]:
        """Up to `limit` ranges for the SACK option, those with the latest arrivals first (RFC 2018 section 4)."""
        blocks: list[tuple[int, int]] = []
        for number in self._recent:
            block = self._ranges.containing(number)
            if block is not None and block not in blocks:
                blocks.append(block)
                if len(blocks) == limit:
                    return blocks
        for block in self._ranges:
            if block not in blocks:
                blocks.append(block)
                if len(blocks) == limit:
                    break
        return blocks
