"""BPF maps that are memory of this process as well: what every carried connection needs, without system calls.

Python writes words and octets that are aligned, which programs on other CPUs see whole or not at all. bpf/shared.h says
what is where.
"""

from __future__ import annotations

import mmap
import struct
import sys
from typing import Final

_PRIME: Final = 0x7FFFFFFF
_FACTOR: Final = 1640531527
_WORDS = struct.Struct("=9I")
_PLACE: Final = 0x7FFF
_FULL: Final = -1


def flow_hash(key: bytes) -> int:
    """As flow_hash() of bpf/carry.h, of a key in the layout of struct flow (36 bytes): 31 bits."""
    if sys.byteorder == "little":
        number = int.from_bytes(key, "little")  # all of its digits at once
    else:
        number = sum(word << place for place, word in enumerate(_WORDS.unpack(key)))
    return number % _PRIME * _FACTOR % _PRIME


class Carried:
    """The flows that are carried. fd: of the map `carried`; buckets, slots: CARRIED_BUCKETS and CARRIED_SLOTS.

    Raises OSError.
    """

    def __init__(self, fd: int, buckets: int, slots: int) -> None:
        self._buckets = buckets
        self._size = slots
        self._memory = mmap.mmap(fd, buckets * slots * 4)
        self._slots = memoryview(self._memory).cast("I")

    def enter(self, key: bytes, place: int, *, down: bool) -> int:
        """Say at which place among the splices a flow is. Returns its slot, -1 when its bucket is full."""
        hashed = flow_hash(key)
        first = hashed % self._buckets * self._size
        slots = self._slots
        for slot in range(first, first + self._size):
            if not slots[slot]:
                slots[slot] = (hashed >> 15 | 1) << 16 | place << 1 | down
                return slot
        return _FULL

    def likely(self, key: bytes, *, down: bool) -> list[int]:
        """Places of flows that have the hash of this one: its own is among them, if it was entered."""
        hashed = flow_hash(key)
        first = hashed % self._buckets * self._size
        words = self._slots[first : first + self._size].tolist()
        return [word >> 1 & _PLACE for word in words if word >> 16 == hashed >> 15 | 1 and bool(word & 1) is down]

    def leave(self, slot: int) -> None:
        """The opposite of `enter`; -1 is none."""
        if slot != _FULL:
            self._slots[slot] = 0

    def forget_all(self) -> None:
        """As if nothing had ever been entered."""
        self._memory[:] = bytes(len(self._memory))

    def close(self) -> None:
        self._slots.release()
        self._memory.close()


class News:
    """Places of which there is news. fd: of the map `ended`; most: MAX_SPLICES. Raises OSError."""

    def __init__(self, fd: int, most: int) -> None:
        self._memory = mmap.mmap(fd, most)

    def take(self) -> list[int]:
        """Those that were told of since the last time, in order."""
        found = []
        told = self._memory[:]
        place = told.find(1)
        while place >= 0:
            self._memory[place] = 0  # before anybody looks at what the news is, or newer ones were lost
            found.append(place)
            place = told.find(1, place + 1)
        return found

    def close(self) -> None:
        self._memory.close()
