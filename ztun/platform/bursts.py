"""What the network monitors of all systems have in common: bursts of notifications, after which all is read anew.

What a notification says is not believed, only that it came: several of them belong together, some are never sent, and
the kernel drops them when nobody reads for long. The difference between two readings is true in every case.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from socket import socket

import structlog

from ztun.ports import Link, NetworkEvent, NetworkState

log = structlog.get_logger("ztun.network")

# Seconds from the first notification of a burst until the network is looked at, with glances at what comes meanwhile.
# Each further burst within a second waits twice as long, so that a flapping link costs little.
_SETTLE, _MOST = 0.05, 0.4
_CALM = 1.0
_GLANCE = 0.01
_BATCH = 256  # datagrams read before the loop gets its turn; a burst is some dozens
_MAX_DATAGRAM = 65536
_RETRY = 1.0  # seconds until the kernel is asked again that did not answer


class BurstMonitor:
    """The greater part of a ztun.ports.NetworkMonitor. What hears of changes on `sock` and reads the state is left out.

    sock: non-blocking, owned by this from now on; went: indexes of interfaces that were set down in this burst, or are
    gone.
    """

    def __init__(self, sock: socket) -> None:
        self.state = NetworkState({}, (), {})
        self.counts = Counter({"link": 0, "address": 0, "route": 0, "overflows": 0, "changes": 0})
        self.went: set[int] = set()
        self._destinations: Callable[[], Iterable[str]] = tuple
        self._news = asyncio.Event()
        self._at_once: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None
        self._sock = sock

    def note(self, data: bytes) -> bool:
        """Count what one datagram tells and note what went. Whether any of it is worth a look."""
        raise NotImplementedError

    def read_state(self, destinations: Iterable[str]) -> NetworkState:
        """Read the state of the network; called in a thread. Raises OSError."""
        raise NotImplementedError

    def watch(self, destinations: Callable[[], Iterable[str]]) -> None:
        """See ztun.ports.NetworkMonitor.watch."""
        self._destinations = destinations

    async def read(self) -> NetworkState:
        """See ztun.ports.NetworkMonitor.read."""
        self.drain()  # what was told before is no news after
        self.went.clear()
        return await self._read()

    async def _read(self) -> NetworkState:
        destinations = sorted(set(self._destinations()))
        self.state = await asyncio.to_thread(self.read_state, destinations)
        return self.state

    async def events(self, at_once: Callable[[], None] = lambda: None) -> AsyncIterator[Sequence[NetworkEvent]]:
        """See ztun.ports.NetworkMonitor.events."""
        loop = asyncio.get_running_loop()
        looked_at = -_CALM
        wait = _SETTLE
        self._at_once = at_once
        self._listen()
        try:
            while True:
                await self._news.wait()
                wait = min(2 * wait, _MOST) if loop.time() - looked_at < _CALM else _SETTLE
                await asyncio.sleep(wait)
                self._news.clear()
                before = self.state
                went, self.went = self.went, set()
                await self._read_patiently()
                looked_at = loop.time()
                if found := list(differences(before, self.state, went)):
                    self.counts["changes"] += 1
                    yield found
        finally:
            self._listen_no_more()

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._readable)

    def _listen_no_more(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _readable(self) -> None:
        """Note what is told, and do not listen for a moment: a storm costs a glance now and then."""
        self._listen_no_more()
        self._timer = asyncio.get_running_loop().call_later(_GLANCE, self._listen)
        links, overflows = self.counts["link"], self.counts["overflows"]
        if self.drain():
            self._news.set()
        if (self.counts["link"], self.counts["overflows"]) != (links, overflows):
            self._at_once()

    def drain(self) -> bool:
        """Read what was told. Whether any of it is worth a look."""
        is_news = False
        for _ in range(_BATCH):
            try:
                data = self._sock.recv(_MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError as error:
                # More was told than the socket holds. What is in it is no longer the whole truth; the kernel is.
                if error.errno != errno.ENOBUFS:
                    raise
                self.counts["overflows"] += 1
                is_news = True
                # Any of them may have been down in between.
                self.went |= {link.ifindex for link in self.state.links.values()}
                continue
            is_news |= self.note(data)
        return is_news

    async def _read_patiently(self) -> None:
        while True:
            try:
                await self._read()
            except OSError as error:
                log.warning("cannot read the state of the network, trying again", error=str(error))
                await asyncio.sleep(_RETRY)
            else:
                return

    def close(self) -> None:
        """See ztun.ports.NetworkMonitor.close."""
        self._sock.close()


def differences(before: NetworkState, after: NetworkState, went: Collection[int] = ()) -> Iterator[NetworkEvent]:
    """What changed between two readings: interfaces first, then addresses, then ways.

    went: indexes of interfaces that were down at some time in between.
    """
    for name in sorted(before.links.keys() | after.links.keys()):
        for up in _turns(before.links.get(name), after.links.get(name), went):
            yield NetworkEvent("link", name, up)
    old, new = set(before.addresses), set(after.addresses)
    for ifname, _address, _length in sorted(old - new):
        yield NetworkEvent("address", ifname, False)
    for ifname, _address, _length in sorted(new - old):
        yield NetworkEvent("address", ifname, True)
    for destination in sorted(before.paths.keys() & after.paths.keys()):
        was, now = before.paths[destination], after.paths[destination]
        if was != now:
            where = now or was
            yield NetworkEvent("route", where.ifname if where else "", now is not None and now.up)
    for ifname in sorted(before.exits.keys() | after.exits.keys()):
        if before.exits.get(ifname) != after.exits.get(ifname):
            yield NetworkEvent("route", ifname, ifname in after.exits)
    if after.rules < before.rules:
        yield NetworkEvent("rule", "", False)


def _turns(was: Link | None, now: Link | None, went: Collection[int]) -> list[bool]:
    """How a name's interface went down and up between two readings."""
    if was is None:
        return [now.up] if now is not None else []
    if now is None:
        return [False]
    flickered = now.enabled and now.ifindex in went
    if was.ifindex != now.ifindex or flickered:
        return [False, True] if now.up else [False]
    return [now.up] if was != now else []
