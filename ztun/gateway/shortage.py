"""The process can have no more memory, though `limits.memory` would allow it: what flows may hold is made less."""

from __future__ import annotations

import asyncio
import mmap

import structlog

from ztun.stack.memory import Memory

log = structlog.get_logger("ztun.engine")

# Bytes that are given back to the system at the first sign, so that small things can be made while flows are ended.
_FUND = 4 << 20
_LEAST = 1 << 20  # bytes that flows may hold together in any case
_LASTS = 10.0  # seconds until it is tried to go back, by doubling


class Shortage:
    """times: MemoryErrors so far."""

    def __init__(self, loop: asyncio.AbstractEventLoop, memory: Memory) -> None:
        self.times = 0
        self._loop = loop
        self._memory = memory
        self._configured = memory.limit
        self._timer: asyncio.TimerHandle | None = None
        self._fund: mmap.mmap | None = _reserve()

    def came(self) -> None:
        """To be called for each MemoryError, by who has ended what it hit."""
        self.times += 1
        if self._fund is not None:
            self._fund.close()
            self._fund = None
        self._memory.set_limit(max(min(self._memory.used, self._memory.limit) * 3 // 4, _LEAST))
        if self._timer is None:
            self._timer = self._loop.call_later(_LASTS, self._go_back)
        if self.times & (self.times - 1) == 0:  # at 1, 2, 4, 8 …
            log.warning("out of memory, flows may hold less for a while", times=self.times, limit=self._memory.limit)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_back(self) -> None:
        self._timer = None
        if self._fund is None:
            self._fund = _reserve()
        if self._fund is not None:
            self._memory.set_limit(min(2 * self._memory.limit, self._configured))
        if self._memory.limit < self._configured:
            self._timer = self._loop.call_later(_LASTS, self._go_back)


def _reserve() -> mmap.mmap | None:
    """Address space alone: no page of it is ever touched."""
    try:
        return mmap.mmap(-1, _FUND, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, MemoryError):
        return None
