"""The implementations of each seam that a test can have here: Linux's own, and macOS's on stand-ins written from XNU's
headers and manuals (tests/darwin), since no Mac is at hand.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

from darwin.kqueue_stand_in import EpollQueue

from ztun.platform import linux
from ztun.platform.darwin import poller as kqueue
from ztun.ports import Poller

LINUX = "linux"
DARWIN = "darwin-stand-in"
SYSTEMS = (LINUX, DARWIN)

_nested_kqueue: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()


def make_loop(system: str) -> asyncio.AbstractEventLoop:
    """An event loop with a poller of its own."""
    return linux.make_event_loop() if system == LINUX else kqueue.make_event_loop(EpollQueue)


def make_nesting_loop(system: str) -> asyncio.AbstractEventLoop:
    """asyncio's own, which will have the poller beside it."""
    loop = asyncio.new_event_loop()
    if system == DARWIN:
        _nested_kqueue.add(loop)
    return loop


def poller_of(loop: asyncio.AbstractEventLoop) -> Poller:
    """The poller of a loop that one of these made."""
    if loop in _nested_kqueue:
        return kqueue.poller_of(loop, EpollQueue)
    return linux.poller_of(loop)  # which finds the poller of any loop that has its own


def loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every way in which a poller and a loop can be together."""
    return {
        "epoll": lambda: make_loop(LINUX),
        "epoll-nested": lambda: make_nesting_loop(LINUX),
        "kqueue-stand-in": lambda: make_loop(DARWIN),
        "kqueue-stand-in-nested": lambda: make_nesting_loop(DARWIN),
    }
