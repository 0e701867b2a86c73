"""Connections to a proxy that wait for a flow, with greeting and authentication behind them.

A flow that finds one has to wait for one round trip to the proxy instead of three. As many are kept as were wanted at
once lately. Under load, when they save nobody's time, none are made. A proxy that ends them while they wait is asked
again later and later, until a flow comes.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from typing import Final

from ztun.ports import Connected, Dialling, Failed, OutboundError, Poller

_PAUSE: Final = 0.01  # seconds from a connection's being taken to the making of the next
_BUSY: Final = 16  # flows from one look to the next: more than a page in a browser wants at once
_LONG_PAUSE: Final = 0.1  # seconds to the next look then: it is over when they were fewer in all this time
# seconds, after the proxy ended or refused some
_FIRST_PATIENCE: Final = 1.0
_MOST_PATIENCE: Final = 64.0
IDLE_LIMIT: Final = 300.0  # seconds that a connection waits before a fresh one takes its place


class WarmPool:
    """least, most: how many connections wait, at least and at most; begin: makes one; keep_alive: has it probed.

    hits, misses: what `take` found; lost: ended by the proxy while they waited; expired: closed since nobody came.
    """

    def __init__(
        self,
        poller: Poller,
        least: int,
        most: int,
        begin: Callable[[Connected, Failed], Dialling],
        keep_alive: Callable[[socket.socket], None],
        idle_limit: float = IDLE_LIMIT,
    ) -> None:
        self.hits = 0
        self.misses = 0
        self.lost = 0
        self.expired = 0
        self._poller = poller
        self._least = least
        self._most = most
        self._want = least
        self._asked = 0  # flows since the last look
        self._begin = begin
        self._keep_alive = keep_alive
        self._idle_limit = idle_limit
        self._waiting: dict[socket.socket, float] = {}  # until when; in the order of that
        self._making: set[Dialling] = set()
        self._patience = _FIRST_PATIENCE
        self._is_patient = False  # and no flow came since
        self._timer: asyncio.TimerHandle | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def fill(self) -> None:
        """Make what is missing, now."""
        self._timer = None
        asked, self._asked = self._asked, 0
        if asked > _BUSY:
            self._fill_in(_LONG_PAUSE)
            return
        for _ in range(self._want - len(self._waiting) - len(self._making)):
            self._make()

    def take(self) -> socket.socket | None:
        """The connection that waits for the shortest time, still watched by the poller; None when there is none."""
        self._patience = _FIRST_PATIENCE
        self._asked += 1
        if self._is_patient and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_patient = False
        self._fill_in(_PAUSE)
        if self._waiting:
            self.hits += 1
            return self._waiting.popitem()[0]
        self.misses += 1
        if self._want < self._most and self._asked <= _BUSY:
            self._want += 1
        return None

    def close(self) -> None:
        """Close what waits, and make no more."""
        self._closed = True
        for timer in (self._timer, self._expiry):
            if timer is not None:
                timer.cancel()
        self.drop()

    def drop(self) -> None:
        """Close what waits and what is being made, for instance since the network is another one."""
        for dialling in list(self._making):
            dialling.cancel()
        self._making.clear()
        while self._waiting:
            self._discard(next(iter(self._waiting)))
        self._fill_in(self._patience)

    def _make(self) -> None:
        made: list[Dialling] = []

        def over() -> None:
            self._making.difference_update(made)

        def connected(sock: socket.socket, more: bool) -> None:
            over()
            self._put(sock)
            if more:  # the end, most likely
                self._lose(sock)

        def failed(error: OutboundError) -> None:
            over()
            self._be_patient()

        dialling = self._begin(connected, failed)
        made.append(dialling)
        if not dialling.over:
            self._making.add(dialling)

    def _put(self, sock: socket.socket) -> None:
        self._poller.hand_over(sock.fileno(), lambda mask: self._lose(sock))
        self._keep_alive(sock)
        self._waiting[sock] = time.monotonic() + self._idle_limit
        if self._expiry is None:
            self._expiry = asyncio.get_running_loop().call_later(self._idle_limit, self._expire)

    def _lose(self, sock: socket.socket) -> None:
        """The proxy ended it, or spoke without being asked."""
        if sock in self._waiting and not self._is_silent(sock):
            self.lost += 1
            self._discard(sock)
            self._be_patient()

    def _is_silent(self, sock: socket.socket) -> bool:
        try:
            sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True  # the event was an older one's
        except OSError:
            return False
        return False

    def _expire(self) -> None:
        self._expiry = None
        now = time.monotonic()
        for sock, until in list(self._waiting.items()):
            if until > now:
                self._expiry = asyncio.get_running_loop().call_later(until - now, self._expire)
                break
            self.expired += 1
            self._discard(sock)
            self._want = max(self._want - 1, self._least)
        self._fill_in(_PAUSE)

    def _discard(self, sock: socket.socket) -> None:
        del self._waiting[sock]
        self._poller.closing(sock.fileno())
        os.close(sock.detach())

    def _be_patient(self) -> None:
        self._is_patient = self._timer is None
        self._fill_in(self._patience)
        self._patience = min(2 * self._patience, _MOST_PATIENCE)

    def _fill_in(self, seconds: float) -> None:
        if self._timer is None and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.fill)
