"""Readiness of many sockets, told straight to whoever waits for it: epoll(7), edge-triggered for flows.

A flow costs one epoll_ctl(2) in all: closing its socket is the other.
"""

from __future__ import annotations

import asyncio
import select
import selectors
import socket
from typing import Final

from ztun.platform.polling import PollerLoop, Turns, complain
from ztun.platform.polling import poller_of as find_poller
from ztun.ports import Poller, ReadyHandler

_EDGE: Final = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
_EDGE_BOTH: Final = _EDGE | select.EPOLLOUT
_MOST_EVENTS: Final = 256  # of one system call; those that are left come with the next


class EpollPoller(Turns):
    """A ztun.ports.Poller. nested: its epoll object is itself watched by an event loop."""

    def __init__(self, *, nested: bool = False) -> None:
        super().__init__(nested=nested)
        self.epoll = select.epoll()
        self._handlers: dict[int, ReadyHandler] = {}

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

    def at_least(self, sock: socket.socket, count: int) -> bool:
        """See ztun.ports.Poller.at_least: SO_RCVLOWAT, which poll(2) heeds, and which wakes when it is lowered."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        return True

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        """Wait for events, at most so long (below 0: for ever), and deliver them. Returns those that nobody watches."""
        more = self._take() if self._again else None
        others = []
        get = self._handlers.get
        try:
            events = self.epoll.poll(0.0 if more else seconds, _MOST_EVENTS)
            self.pulse()
            for event in events:
                handler = get(event[0])
                if handler is None:
                    others.append(event)
                    continue
                try:
                    handler(event[1])
                except Exception as error:
                    complain(error)
        except (InterruptedError, MemoryError):  # events that were not taken come again
            pass
        if more:
            self._give(more)
        return others

    # For asyncio.

    def add(self, fd: int, events: int) -> None:
        """See ztun.platform.polling.LoopPoller."""
        self.epoll.register(fd, _mask(events))

    def change(self, fd: int, before: int, events: int) -> None:
        """See ztun.platform.polling.LoopPoller."""
        self.epoll.modify(fd, _mask(events))

    def remove(self, fd: int, events: int) -> None:
        """See ztun.platform.polling.LoopPoller."""
        self.epoll.unregister(fd)

    def fileno(self) -> int:
        return self.epoll.fileno()

    def close(self) -> None:
        self.epoll.close()


def _mask(events: int) -> int:
    mask = select.EPOLLIN if events & selectors.EVENT_READ else 0
    return mask | (select.EPOLLOUT if events & selectors.EVENT_WRITE else 0)


def make_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop with a poller of its own."""
    return PollerLoop(EpollPoller())


def poller_of(loop: asyncio.AbstractEventLoop) -> Poller:
    """The poller beside a loop. A loop that `make_event_loop` did not make watches the epoll object of a new one."""
    return find_poller(loop, lambda: EpollPoller(nested=True))
