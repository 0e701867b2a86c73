"""A fuzzer's bytes, spent as decisions. When they run out, every decision is the first one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Source:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        """Something is left."""
        return self._position < len(self._data)

    def bytes(self, count: int) -> bytes:
        """Up to `count` bytes."""
        taken = self._data[self._position : self._position + count]
        self._position += count
        return taken

    def rest(self) -> bytes:
        return self.bytes(len(self._data))

    def integer(self, size: int) -> int:
        """An unsigned number of `size` bytes."""
        return int.from_bytes(self.bytes(size), "big")

    def below(self, bound: int) -> int:
        """0 <= n < bound <= 65536."""
        return self.integer(1 if bound <= 256 else 2) % bound

    def pick(self, choices: Sequence[_T]) -> _T:
        return choices[self.below(len(choices))]
