"""What the pollers of all systems have in common: their place inside an event loop of asyncio.

asyncio makes an object and a turn of its queue of every event, and a system call of every change of mind. A gateway has
thousands of flows that are each ready for a moment, so their events are delivered from within the selector, before
asyncio hears of its own.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from ztun.ports import READABLE, WRITABLE, Poller, ReadyHandler


class LoopPoller(Poller, Protocol):
    """A poller that also serves asyncio: it tells of descriptors that nobody watches but that were added here.

    events: selectors.EVENT_READ and EVENT_WRITE, told of as long as they hold.
    """

    def add(self, fd: int, events: int) -> None: ...

    def change(self, fd: int, before: int, events: int) -> None: ...

    def remove(self, fd: int, events: int) -> None:
        """Raises OSError where the descriptor is closed already."""
        ...

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """Wait for events, at most so long (below 0: for ever), and deliver them. Returns those that nobody watches."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when there are events."""
        ...

    def close(self) -> None: ...


def complain(error: Exception) -> None:
    """A defect of ours costs the flow whose event it was; the others go on."""
    loop = asyncio.get_running_loop()
    loop.call_exception_handler({"message": "an event of a flow could not be handled", "exception": error})


class Turns:
    """What handlers that have more to do ask a poller for: another turn. A base of pollers, which call `_take` first in
    `wait`, and `_give` in the end.

    nested: the poller's own descriptor is watched by somebody else's event loop.
    """

    def __init__(self, *, nested: bool) -> None:
        self._nested = nested
        self._coming = False  # a look here is arranged
        self._again: list[ReadyHandler] = []
        self.pulse: Callable[[], None] = _nothing

    def again(self, handler: ReadyHandler) -> None:
        """See ztun.ports.Poller.again."""
        if self._nested and not self._coming:  # somebody else's event loop looks here only when there is an event
            self._coming = True
            asyncio.get_running_loop().call_soon(self.wait, 0.0)
        self._again.append(handler)

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """See LoopPoller.wait."""
        raise NotImplementedError

    def _take(self) -> list[ReadyHandler]:
        """Those whose turn it is after the events that are there."""
        self._coming = False
        more = self._again
        if more:
            self._again = []
        return more

    def _give(self, more: list[ReadyHandler]) -> None:
        for handler in more:
            try:
                handler(0)
            except Exception as error:
                complain(error)


def _nothing() -> None:
    """Nobody wants to know."""


class PollerSelector(selectors.BaseSelector):
    """asyncio's selector: what is not the poller's goes to the event loop in the usual way."""

    def __init__(self, poller: LoopPoller) -> None:
        self.poller = poller
        self.disturbed = False  # asyncio has something to do that it did not know of when it went to wait
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._map = _Keys(self._keys)

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        fd = _number(fileobj)
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} is registered already")
        self.poller.add(fd, events)
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        key = self._keys.pop(self._map[fileobj].fd)
        try:
            self.poller.remove(key.fd, key.events)
        except OSError:
            pass  # it was closed, and is gone with that
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        old = self._map[fileobj]
        if old.events != events:
            self.poller.change(old.fd, old.events, events)
        key = self._keys[old.fd] = selectors.SelectorKey(fileobj, old.fd, events, data)
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Deliver the flows' events until there is something for asyncio to do, or its time is over."""
        self.disturbed = False
        left = math.inf if timeout is None else max(timeout, 0.0)
        until = time.monotonic() + left
        while True:
            # Some kernels count milliseconds, and who wakes up early waits twice.
            others = self.poller.wait(-1.0 if timeout is None else math.ceil(left * 1e3) * 1e-3)
            if others or self.disturbed or (left := until - time.monotonic()) <= 0:
                break
        return [(key, mask) for fd, events in others if (key := self._keys.get(fd)) and (mask := _found(key, events))]

    def close(self) -> None:
        self.poller.close()
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
    mask = selectors.EVENT_WRITE if events & ~READABLE else 0
    if events & ~WRITABLE:
        mask |= selectors.EVENT_READ
    return mask & key.events


class PollerLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop, which waits on its poller, and comes back only when it has to."""

    def __init__(self, poller: LoopPoller) -> None:
        self._events = PollerSelector(poller)
        super().__init__(self._events)

    @property
    def poller(self) -> LoopPoller:
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


_nested: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopPoller] = weakref.WeakKeyDictionary()


def poller_of(loop: asyncio.AbstractEventLoop, make_nested: Callable[[], LoopPoller]) -> Poller:
    """The poller beside a loop. A loop that is no PollerLoop watches a new one, which `make_nested` makes."""
    if isinstance(loop, PollerLoop):
        return loop.poller
    poller = _nested.get(loop)
    if poller is None:
        poller = _nested[loop] = make_nested()
        loop.add_reader(poller.fileno(), poller.wait, 0.0)
    return poller
