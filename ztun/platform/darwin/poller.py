"""Readiness of many sockets by kqueue(2): the twin of the one by epoll, with EV_CLEAR for its edge trigger.

kqueue tells of reading and of writing apart, so an owner may be told twice. Source: bsd/sys/event.h.
"""

from __future__ import annotations

import asyncio
import errno
import selectors
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from ztun.platform.darwin import numbers
from ztun.platform.polling import PollerLoop, Turns, complain
from ztun.platform.polling import poller_of as find_poller
from ztun.ports import READABLE, WRITABLE, Poller, ReadyHandler

_READ, _WRITE = numbers.EVFILT_READ, numbers.EVFILT_WRITE
_EDGE = numbers.EV_ADD | numbers.EV_CLEAR
_LEVEL = numbers.EV_ADD
_MOST_EVENTS = 256  # of one system call; those that are left come with the next
# poll(2): POLLPRI, POLLERR, POLLHUP, POLLRDHUP.
_URGENT, _FAILED, _HUNG_UP, _ENDED = 0x002, 0x008, 0x010, 0x2000


class Change(NamedTuple):
    """What kqueue is to do: the first three members of struct kevent."""

    ident: int
    filter: int
    flags: int


class Event(Protocol):
    """What kqueue tells: struct kevent, as select.kevent has it."""

    @property
    def ident(self) -> int: ...

    @property
    def filter(self) -> int: ...

    @property
    def flags(self) -> int: ...

    @property
    def fflags(self) -> int: ...


class Queue(Protocol):
    """A kqueue: select.kqueue with plain changes."""

    def change(self, changes: Iterable[Change]) -> None:
        """Make changes in order. Raises OSError at the first that fails."""
        ...

    def wait(self, most: int, seconds: float | None) -> Sequence[Event]:
        """At most so many events, within `seconds` (None: for ever)."""
        ...

    def fileno(self) -> int: ...

    def close(self) -> None: ...


class KqueuePoller(Turns):
    """A ztun.ports.Poller. nested: its kqueue is itself watched by an event loop."""

    def __init__(self, queue: Queue, *, nested: bool = False) -> None:
        super().__init__(nested=nested)
        self._queue = queue
        self._handlers: dict[int, ReadyHandler] = {}
        self._writing: set[int] = set()

    def watch(self, fd: int, handler: ReadyHandler, *, writing: bool = False) -> None:
        """See ztun.ports.Poller.watch. Raises OSError where the kernel has no memory for one more."""
        self._writing.discard(fd)  # of a descriptor of this number that was closed
        changes = [Change(fd, _READ, _EDGE)]
        if writing:
            changes.append(Change(fd, _WRITE, _EDGE))
        self._queue.change(changes)
        if writing:
            self._writing.add(fd)
        self._handlers[fd] = handler

    def watch_level(self, fd: int, handler: ReadyHandler) -> None:
        """See ztun.ports.Poller.watch_level."""
        self._writing.discard(fd)
        self._queue.change((Change(fd, _READ, _LEVEL),))
        self._handlers[fd] = handler

    def want_write(self, fd: int) -> None:
        """See ztun.ports.Poller.want_write."""
        self._queue.change((Change(fd, _READ, _EDGE), Change(fd, _WRITE, _EDGE)))
        self._writing.add(fd)

    def hand_over(self, fd: int, handler: ReadyHandler) -> None:
        """See ztun.ports.Poller.hand_over."""
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """See ztun.ports.Poller.unwatch."""
        if self._handlers.pop(fd, None) is not None:
            self.remove(fd, selectors.EVENT_READ | (selectors.EVENT_WRITE if fd in self._writing else 0))
            self._writing.discard(fd)

    def closing(self, fd: int) -> None:
        """See ztun.ports.Poller.closing."""
        self._handlers.pop(fd, None)
        self._writing.discard(fd)

    def at_least(self, sock: socket.socket, count: int) -> bool:
        """See ztun.ports.Poller.at_least: kqueue(2) could by NOTE_LOWAT, but forgets it with every change of mind."""
        return False

    def disturb(self, fd: int) -> None:
        """Have the owner of a descriptor look at it: another file was put in its place, which kqueue does not know."""
        handler = self._handlers.get(fd)
        if handler is not None:
            self._writing.discard(fd)
            handler(READABLE | WRITABLE | _ENDED | _FAILED)

    # For asyncio.

    def add(self, fd: int, events: int) -> None:
        """See ztun.platform.polling.LoopPoller."""
        self._queue.change(Change(fd, which, _LEVEL) for which in _filters(events))

    def change(self, fd: int, before: int, events: int) -> None:
        """See ztun.platform.polling.LoopPoller."""
        self._queue.change(Change(fd, which, numbers.EV_DELETE) for which in _filters(before & ~events))
        self._queue.change(Change(fd, which, _LEVEL) for which in _filters(events & ~before))

    def remove(self, fd: int, events: int) -> None:
        """See ztun.platform.polling.LoopPoller."""
        for which in _filters(events):
            try:
                self._queue.change((Change(fd, which, numbers.EV_DELETE),))
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """See ztun.platform.polling.LoopPoller."""
        more = self._take()
        others = []
        get = self._handlers.get
        try:
            events = self._queue.wait(_MOST_EVENTS, 0.0 if more else None if seconds < 0 else seconds)
            self.pulse()
            for event in events:
                mask = mask_of(event)
                handler = get(event.ident)
                if handler is None:
                    others.append((event.ident, mask))
                    continue
                try:
                    handler(mask)
                except Exception as error:
                    complain(error)
        except InterruptedError:
            pass
        self._give(more)
        return others

    def fileno(self) -> int:
        return self._queue.fileno()

    def close(self) -> None:
        self._queue.close()


def mask_of(event: Event) -> int:
    """An event in the words of poll(2), as ztun.ports.ReadyHandler gets it."""
    flags = event.flags
    if event.filter == _WRITE:
        if not flags & numbers.EV_EOF:
            return WRITABLE
        return WRITABLE | _HUNG_UP | (_FAILED if event.fflags else 0)
    if not flags & (numbers.EV_EOF | numbers.EV_OOBAND):
        return READABLE
    mask = READABLE
    if flags & numbers.EV_EOF:
        mask |= _ENDED | (_FAILED if event.fflags else 0)  # fflags: the socket's error (kqueue(2), EVFILT_READ)
    return mask | (_URGENT if flags & numbers.EV_OOBAND else 0)


def _filters(events: int) -> list[int]:
    return [
        which for which, event in ((_READ, selectors.EVENT_READ), (_WRITE, selectors.EVENT_WRITE)) if events & event
    ]


def make_event_loop(make_queue: Callable[[], Queue]) -> asyncio.AbstractEventLoop:
    """An event loop with a poller of its own."""
    return PollerLoop(KqueuePoller(make_queue()))


def poller_of(loop: asyncio.AbstractEventLoop, make_queue: Callable[[], Queue]) -> Poller:
    """The poller beside a loop. A loop that `make_event_loop` did not make watches the kqueue of a new one."""
    return find_poller(loop, lambda: KqueuePoller(make_queue(), nested=True))
