"""A pool of packet-sized buffers, so that the hot path neither allocates nor zeroes memory."""

from __future__ import annotations


class BufferPool:
    """Hands out writable views of `size` bytes and takes them back. At most `keep` are held for reuse."""

    __slots__ = ("_free", "allocated", "keep", "released", "reused", "size")

    def __init__(self, size: int = 65536 + 64, keep: int = 32) -> None:
        self.size = size
        self.keep = keep
        self._free: list[memoryview] = []
        self.allocated = 0
        self.reused = 0
        self.released = 0

    def get(self) -> memoryview:
        """A buffer with undefined content."""
        if self._free:
            self.reused += 1
            return self._free.pop()
        self.allocated += 1
        return memoryview(bytearray(self.size))

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back. The caller promises that no view of it is read any more."""
        self.released += 1
        if len(self._free) < self.keep:
            self._free.append(buffer)
