"""select.kqueue, which Python has on macOS only, behind the seam of the poller."""

from __future__ import annotations

import select
from collections.abc import Iterable, Sequence
from typing import Any

from ztun.platform.darwin.poller import Change, Event

_select: Any = select  # the names below are absent on other systems


class KernelQueue:
    """A ztun.platform.darwin.poller.Queue."""

    def __init__(self) -> None:
        self._kqueue = _select.kqueue()

    def change(self, changes: Iterable[Change]) -> None:
        # With no room for events the first change that fails raises (kqueue(2)).
        self._kqueue.control([_select.kevent(*one) for one in changes], 0, 0)

    def wait(self, most: int, seconds: float | None) -> Sequence[Event]:
        events: Sequence[Event] = self._kqueue.control(None, most, seconds)
        return events

    def fileno(self) -> int:
        return int(self._kqueue.fileno())

    def close(self) -> None:
        self._kqueue.close()
