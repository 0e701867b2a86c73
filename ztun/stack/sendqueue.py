"""The bytes of one connection that the peer has not acknowledged yet, in the buffers they were read into."""

from __future__ import annotations

from collections import deque
from typing import Final

from ztun.stack.buffers import BufferPool
from ztun.stack.memory import PIECE, Memory

_MOST_PIECES: Final = 256  # the kernel takes at most 1024 at once (IOV_MAX), headers included
Bytes = bytes | memoryview
_Chunk = tuple[int, Bytes, memoryview | None]  # end, bytes, the pool's buffer that they lie in
_NOTHING: Final[deque[_Chunk]] = deque()  # shared: an empty deque is 600 bytes, and idle flows are many


class SendQueue:
    """A byte stream from sequence number `start` to `end`. Buffers go back to the pool when they are acknowledged."""

    __slots__ = ("_chunks", "_memory", "_pool", "end", "start")

    def __init__(self, first: int, pool: BufferPool, memory: Memory) -> None:
        self._memory = memory
        self._chunks = _NOTHING
        self._pool = pool
        self.start = first
        self.end = first

    def append(self, data: Bytes, owner: memoryview | None) -> None:
        """Add bytes. owner: the pool's buffer that `data` is a part of, or None."""
        self.end += len(data)
        self._memory.used += len(data) + PIECE if owner is None else self._pool.size
        if not self._chunks:
            self._chunks = deque()
        self._chunks.append((self.end, data, owner))

    def acknowledge(self, sequence: int) -> None:
        """Drop every chunk that ends at or before `sequence`."""
        chunks = self._chunks
        while chunks and chunks[0][0] <= sequence:
            _, data, owner = chunks.popleft()
            if owner is None:
                self._memory.used -= len(data) + PIECE
            else:
                self._memory.used -= self._pool.size
                self._pool.retire(owner)
        if not chunks:
            self._chunks = _NOTHING
        self.start = sequence

    def views(self, sequence: int, count: int) -> list[Bytes]:
        """The `count` bytes from `sequence` on, as the pieces they lie in."""
        last_end, last, _ = self._chunks[-1]
        if sequence >= last_end - len(last):  # new data: no walk over what is in flight
            offset = sequence - (last_end - len(last))
            return [last[offset : offset + count]] if offset or count < len(last) else [last]
        found: list[Bytes] = []
        for end, data, _ in self._chunks:
            if end <= sequence:
                continue
            offset = sequence - (end - len(data))
            piece = data[offset : offset + count]
            found.append(piece)
            sequence += len(piece)
            count -= len(piece)
            if not count:
                break
        return found if len(found) <= _MOST_PIECES else [b"".join(found)]

    def clear(self) -> None:
        """Give everything back."""
        self.acknowledge(self.end)
