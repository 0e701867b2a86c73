"""kqueue(2) as its manual and bsd/sys/event.h describe it, made of epoll(7): for tests on a system without one.

Written from the documents, not recorded on a Mac. Each filter is an epoll object of its own, since an epoll object
knows a descriptor once.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ztun.platform.darwin import numbers
from ztun.platform.darwin.poller import Change

_ENDED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class StandInEvent(NamedTuple):
    ident: int
    filter: int
    flags: int
    fflags: int


class EpollQueue:
    """A ztun.platform.darwin.poller.Queue."""

    def __init__(self) -> None:
        self._filters = {numbers.EVFILT_READ: select.epoll(), numbers.EVFILT_WRITE: select.epoll()}
        self._all = select.epoll()
        for one in self._filters.values():
            self._all.register(one.fileno(), select.EPOLLIN)

    def change(self, changes: Iterable[Change]) -> None:
        for ident, which, flags in changes:
            if flags & numbers.EV_DELETE:
                self._filters[which].unregister(ident)  # ENOENT where there is none, EBADF of a closed descriptor
            else:
                self._add(ident, which, flags)

    def _add(self, ident: int, which: int, flags: int) -> None:
        reading = which == numbers.EVFILT_READ
        mask = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI if reading else select.EPOLLOUT
        if flags & numbers.EV_CLEAR:
            mask |= select.EPOLLET
        try:
            self._filters[which].register(ident, mask)
        except FileExistsError:
            self._filters[which].modify(ident, mask)  # EV_ADD of what is there: looked at anew

    def wait(self, most: int, seconds: float | None) -> Sequence[StandInEvent]:
        found: list[StandInEvent] = []
        if not self._all.poll(-1 if seconds is None else seconds):
            return found
        for which, one in self._filters.items():
            if most > len(found):
                for ident, mask in one.poll(0, most - len(found)):
                    found.append(StandInEvent(ident, which, *_flags(which, mask)))
        return found

    def fileno(self) -> int:
        return self._all.fileno()

    def close(self) -> None:
        self._all.close()
        for one in self._filters.values():
            one.close()


def _flags(which: int, mask: int) -> tuple[int, int]:
    """flags and fflags: an end, an urgent mark, and that there is an error (kqueue(2), EVFILT_READ)."""
    flags = numbers.EV_EOF if mask & _ENDED else 0
    if which == numbers.EVFILT_READ and mask & select.EPOLLPRI:
        flags |= numbers.EV_OOBAND
    return flags, errno.EIO if mask & select.EPOLLERR else 0
