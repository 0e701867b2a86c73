"""Whether one more line of a kind may be written now. Flows that end ask here, thousands in a second, and mostly for
nothing: this is compiled (docs/compiling.md)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

from ztun.log.repeats import Limit, Repeats


class Admission:
    """is_open: whether lines have somewhere to go; repeats: the counts of what was held back.

    lock: of who writes the lines, since threads log as well; began: called when something is held back and nothing was
    before, so that a count of it will be due.
    """

    def __init__(self, lock: threading.RLock, limit: Limit, began: Callable[[], None]) -> None:
        self.is_open = False
        self.repeats: Repeats[tuple[str, str, int]] = Repeats()
        self._lock = lock
        self._limit = limit
        self._limits: Mapping[str, Limit] = {}
        self._began = began

    def begin(self, limit: Limit, limits: Mapping[str, Limit]) -> None:
        """Forget what was counted. limits: those of single components, by name; limit: that of the others."""
        self._limit, self._limits = limit, limits
        self.repeats = Repeats()

    def admit(self, component: str, event: str, level: int) -> bool:
        """Whether such a line may be written now; what may not is counted. Never while it is not open."""
        if not self.is_open:
            return False
        with self._lock:
            repeats, limit = self.repeats, self._limits.get(component, self._limit)
            was_quiet = repeats.next_end is None
            admitted = repeats.admit((component, event, level), limit, time.monotonic())
            if was_quiet and not admitted:
                self._began()
            return admitted
