"""What the stack drops, for the log: counts by reason once a second while component "stack" is at debug.

The stack itself only counts: it has no clock and no log, and a flood of bad packets must not become one of lines.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from ztun.log.system import BoundLogger, log_system

_INTERVAL = 1.0  # seconds


class DropLog:
    """drops: reason -> packets so far."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, drops: Callable[[], Mapping[str, int]], log: BoundLogger | None = None
    ) -> None:
        self._loop = loop
        self._drops = drops
        self._log = log or log_system.bound("ztun.stack")
        self._seen: dict[str, int] | None = None  # at the last look; None while nobody wants to know
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.look()
        self._timer = self._loop.call_later(_INTERVAL, self.start)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """Log what came since the last look. The first one after the level changed only takes the counts."""
        if not self._log.is_enabled_for(logging.DEBUG):
            self._seen = None
            return
        now = dict(self._drops())
        if self._seen is not None:
            for reason, count in now.items():
                if count > self._seen.get(reason, 0):
                    self._log.debug("packets dropped", reason=reason, count=count - self._seen.get(reason, 0))
        self._seen = now
