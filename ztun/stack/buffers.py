"""A pool of packet-sized buffers, so that the hot path neither allocates nor zeroes memory."""

from __future__ import annotations

from collections.abc import Sized


class BufferPool:
    """Hands out writable views of `size` bytes and takes them back.

    Up to `most` free ones are held while there is work; `trim`, called now and then, lets go of those that nobody
    needed since the last call, down to `keep`.

    outbox: packets that wait to be sent. A buffer that was part of a packet (`retire`) is not handed out again before
    it is empty: an ACK or a reset may end the need for bytes that still lie there, and whoever got the buffer next
    would put a stranger's bytes into that packet.
    """

    __slots__ = ("_free", "_retired", "_spare", "allocated", "freed", "keep", "most", "outbox", "reused", "size")

    def __init__(self, size: int = 65536 + 64, keep: int = 32, most: int = 1024) -> None:
        self.size = size
        self.keep = keep
        self.most = max(most, keep)
        self.allocated = 0
        self.reused = 0
        self.freed = 0
        self.outbox: Sized = ()
        self._free: list[memoryview] = []
        self._retired: list[memoryview] = []
        self._spare = 0  # the fewest that were free since the last trim

    def __len__(self) -> int:
        """How many are free, or will be when the outbox is empty."""
        return len(self._free) + len(self._retired)

    def get(self) -> memoryview:
        """A buffer with undefined content."""
        if not self._free and self._retired:
            self._settle()
        if self._free:
            self.reused += 1
            buffer = self._free.pop()
            if len(self._free) < self._spare:
                self._spare = len(self._free)
            return buffer
        self.allocated += 1
        return memoryview(bytearray(self.size))

    def release(self, buffer: memoryview) -> None:
        """Give a buffer back. The caller promises that no view of it is read any more."""
        if len(self._free) + len(self._retired) < self.most:
            self._free.append(buffer)
        else:
            self.freed += 1

    def retire(self, buffer: memoryview) -> None:
        """Give back a buffer whose views only the packets in the outbox may still hold."""
        if len(self._free) + len(self._retired) < self.most:
            self._retired.append(buffer)
        else:
            self.freed += 1

    def _settle(self) -> None:
        if not self.outbox:
            self._free += self._retired
            self._retired.clear()

    def trim(self) -> None:
        """Let go of what was not needed since the last call."""
        self._settle()
        surplus = min(self._spare, len(self._free) - self.keep)
        if surplus > 0:
            del self._free[:surplus]
            self.freed += surplus
        self._spare = len(self._free)
