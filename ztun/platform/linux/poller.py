"""Readiness of many sockets, told straight to whoever waits for it: epoll(7), edge-triggered for flows.

asyncio makes an object and a turn of its queue of every event, and a system call of every change of mind. A gateway has
thousands of flows that are each ready for a moment, so their events are delivered from within the selector, before
asyncio hears of its own. A flow costs one epoll_ctl(2) in all: closing its socket is the other.
"""

from __future__ import annotations

import asyncio
import math
import select
import selectors
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from ztun.ports import ReadyHandler

_EDGE = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
_EDGE_BOTH = _EDGE | select.EPOLLOUT
_MOST_EVENTS = 256  # of one system call; those that are left come with the next


class EpollPoller:
    """A ztun.ports.Poller. nested: its epoll object is itself watched by an event loop."""

    def __init__(self, *, nested: bool = False) -> None:
        self.epoll = select.epoll()
        self._nested = nested
        self._coming = False  # a look here is arranged
        self._handlers: dict[int, ReadyHandler] = {}
        self._again: list[ReadyHandler] = []

    def watch(self, fd: int, handler: ReadyHandler, *, writing: bool = False) -> None:
        """See ztun.ports.Poller.watch. Raises OSError where the kernel has no memory for one more."""
        self.epoll.register(fd, _EDGE_BOTH if writing else _EDGE)
        self._handlers[fd] = handler

    def watch_level(self, fd: int, handler: ReadyHandler) -> None:
        """See ztun.ports.Poller.watch_level."""
        self.epoll.register(fd, select.EPOLLIN)
        self._handlers[fd] = handler

    def want_write(self, fd: int) -> None:
        """See ztun.ports.Poller.want_write."""
        self.epoll.modify(fd, _EDGE_BOTH)

    def hand_over(self, fd: int, handler: ReadyHandler) -> None:
        """See ztun.ports.Poller.hand_over."""
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """See ztun.ports.Poller.unwatch."""
        if self._handlers.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def closing(self, fd: int) -> None:
        """See ztun.ports.Poller.closing."""
        self._handlers.pop(fd, None)

    def again(self, handler: ReadyHandler) -> None:
        """See ztun.ports.Poller.again."""
        if self._nested and not self._coming:  # somebody else's event loop looks here only when there is an event
            self._coming = True
            asyncio.get_running_loop().call_soon(self.wait, 0.0)
        self._again.append(handler)

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """Wait for events, at most so long (below 0: for ever), and deliver them. Returns those that nobody watches."""
        self._coming = False
        more = self._again
        if more:
            self._again = []
        others = []
        get = self._handlers.get
        try:
            for event in self.epoll.poll(0.0 if more else seconds, _MOST_EVENTS):
                handler = get(event[0])
                if handler is None:
                    others.append(event)
                    continue
                try:
                    handler(event[1])
                except Exception as error:
                    _complain(error)
        except InterruptedError:
            pass
        for handler in more:
            try:
                handler(0)
            except Exception as error:
                _complain(error)
        return others


def _complain(error: Exception) -> None:
    """A defect of ours costs the flow whose event it was; the others go on."""
    loop = asyncio.get_running_loop()
    loop.call_exception_handler({"message": "an event of a flow could not be handled", "exception": error})


class PollerSelector(selectors.BaseSelector):
    """asyncio's selector: what is not the poller's goes to the event loop in the usual way."""

    def __init__(self) -> None:
        self.poller = EpollPoller()
        self.disturbed = False  # asyncio has something to do that it did not know of when it went to wait
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map = _Keys(self._keys)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _number(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        self.poller.epoll.register(fd, _mask(events))
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(self._map[fileobj].fd)
        try:
            self.poller.epoll.unregister(key.fd)
        except OSError:
            pass  # it was closed, and is gone with that
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        old = self._map[fileobj]
        if old.events != events:
            self.poller.epoll.modify(old.fd, _mask(events))
        key = self._keys[old.fd] = selectors.SelectorKey(fileobj, old.fd, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Deliver the flows' events until there is something for asyncio to do, or its time is over."""
        self.disturbed = False
        left = math.inf if timeout is None else max(timeout, 0.0)
        until = time.monotonic() + left
        while True:
            # epoll counts milliseconds, and who wakes up early waits twice.
            others = self.poller.wait(-1.0 if timeout is None else math.ceil(left * 1e3) * 1e-3)
            if others or self.disturbed or (left := until - time.monotonic()) <= 0:
                break
        return [(key, mask) for fd, events in others if (key := self._keys.get(fd)) and (mask := _found(key, events))]

    def close(self) -> None:
        self.poller.epoll.close()
        self._keys.clear()

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._map


class _Keys(Mapping[Any, selectors.SelectorKey]):
    """The keys by descriptor, which may be given as a number or as the object that was registered."""

    def __init__(self, keys: dict[int, selectors.SelectorKey]) -> None:
        self._keys = keys

    def __getitem__(self, fileobj: Any) -> selectors.SelectorKey:
        fd = _number(fileobj)
        if fd >= 0:
            return self._keys[fd]
        for key in self._keys.values():  # it was closed before it was unregistered
            if key.fileobj is fileobj:
                return key
        raise KeyError(f"{fileobj!r} is not registered")

    def __iter__(self) -> Iterator[Any]:
        return (key.fileobj for key in self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)


def _number(fileobj: Any) -> int:
    return fileobj if isinstance(fileobj, int) else int(fileobj.fileno())


def _found(key: selectors.SelectorKey, events: int) -> int:
    mask = selectors.EVENT_WRITE if events & ~select.EPOLLIN else 0
    if events & ~select.EPOLLOUT:
        mask |= selectors.EVENT_READ
    return mask & key.events


def _mask(events: int) -> int:
    mask = select.EPOLLIN if events & selectors.EVENT_READ else 0
    return mask | (select.EPOLLOUT if events & selectors.EVENT_WRITE else 0)


class PollerLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop, which waits on the epoll object of its poller, and comes back only when it has to."""

    def __init__(self) -> None:
        self._events = PollerSelector()
        super().__init__(self._events)

    @property
    def poller(self) -> EpollPoller:
        return self._events.poller

    def call_soon(self, *args: Any, **kwargs: Any) -> asyncio.Handle:  # type: ignore[override]
        self._events.disturbed = True
        return super().call_soon(*args, **kwargs)

    def call_at(self, *args: Any, **kwargs: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        self._events.disturbed = True
        return super().call_at(*args, **kwargs)

    def stop(self) -> None:
        self._events.disturbed = True
        super().stop()


_nested: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, EpollPoller] = weakref.WeakKeyDictionary()


def make_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop with a poller of its own."""
    return PollerLoop()


def poller_of(loop: asyncio.AbstractEventLoop) -> EpollPoller:
    """The poller beside a loop. A loop that `make_event_loop` did not make watches the epoll object of a new one."""
    if isinstance(loop, PollerLoop):
        return loop.poller
    poller = _nested.get(loop)
    if poller is None:
        poller = _nested[loop] = EpollPoller(nested=True)
        loop.add_reader(poller.epoll.fileno(), poller.wait, 0.0)
    return poller
