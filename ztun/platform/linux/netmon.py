"""The network monitor: rtnetlink's notifications say that something changed, and then all is read anew.

What a notification says is not believed, only that it came: several of them belong together, some are never sent
(IPv4 routes that go with their interface), and the kernel drops them when nobody reads for long. The difference
between two readings is true in every case.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence

import structlog

from ztun.platform.linux import netstate, strays
from ztun.platform.linux.routes import PROTOCOL
from ztun.ports import Link, NetworkEvent, NetworkState

log = structlog.get_logger("ztun.network")

# rtnetlink(7), linux/rtnetlink.h: RTMGRP_*.
_LINK, _ADDRESS4, _ROUTE4, _RULE4, _ADDRESS6, _ROUTE6, _RULE6 = 0x1, 0x10, 0x40, 0x80, 0x100, 0x400, 0x40000
_GROUPS = _LINK | _ADDRESS4 | _ROUTE4 | _RULE4 | _ADDRESS6 | _ROUTE6 | _RULE6
# Message types: RTM_NEWLINK, RTM_DELLINK and so on. A new ip rule is a new way for packets.
_KINDS = {16: "link", 17: "link", 20: "address", 21: "address", 24: "route", 25: "route", 32: "route", 33: "route"}
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr
_LINK_MESSAGE = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
_ROUTE_MESSAGE = struct.Struct("=8B")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type
_LINKS, _ROUTES = (16, 17), (24, 25)
_IFF_UP = 0x1
_AF_BRIDGE = 7
_UNICAST, _UNREACHABLE_TYPES = 1, (6, 7, 8)  # RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT

# Seconds from the first notification of a burst until the network is looked at, with glances at what comes meanwhile.
# Each further burst within a second waits twice as long, so that a flapping link costs little.
_SETTLE, _MOST = 0.05, 0.4
_CALM = 1.0
_GLANCE = 0.01
_BATCH = 256  # datagrams read before the loop gets its turn; a burst is some dozens
_RETRY = 1.0  # seconds until the kernel is asked again that did not answer
_MAX_DATAGRAM = 65536


class LinuxNetworkMonitor:
    """A ztun.ports.NetworkMonitor of this network namespace. mark: of ztun's own sockets."""

    def __init__(self, mark: int) -> None:
        self.state = NetworkState({}, (), {})
        self.counts = Counter({"link": 0, "address": 0, "route": 0, "overflows": 0, "changes": 0})
        self._mark = mark
        self._destinations: Callable[[], Iterable[str]] = tuple
        self._went: set[int] = set()  # indexes of interfaces that were set down in this burst, or are gone
        self._news = asyncio.Event()
        self._at_once: Callable[[], None] = lambda: None
        self._timer: asyncio.TimerHandle | None = None
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._sock.bind((0, _GROUPS))

    def watch(self, destinations: Callable[[], Iterable[str]]) -> None:
        """See ztun.ports.NetworkMonitor.watch."""
        self._destinations = destinations

    async def read(self) -> NetworkState:
        """See ztun.ports.NetworkMonitor.read."""
        self._drain()  # what was told before is no news after
        self._went.clear()
        return await self._read()

    async def _read(self) -> NetworkState:
        destinations = sorted(set(self._destinations()))
        self.state = await asyncio.to_thread(netstate.read_state, self._mark, destinations)
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
                went, self._went = self._went, set()
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
        if self._drain():
            self._news.set()
        if (self.counts["link"], self.counts["overflows"]) != (links, overflows):
            self._at_once()

    async def _read_patiently(self) -> None:
        while True:
            try:
                await self._read()
            except OSError as error:
                log.warning("cannot read the state of the network, trying again", error=str(error))
                await asyncio.sleep(_RETRY)
            else:
                return

    def _drain(self) -> bool:
        """Read what was told. Whether any of it was worth a look."""
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
                self._went |= {link.ifindex for link in self.state.links.values()}
                continue
            for kind, body in _messages(data):
                self.counts[kind] += 1
                is_news = True
                if kind == "link":
                    self._note_link(data, body)
        return is_news

    def _note_link(self, data: bytes, body: int) -> None:
        _family, _type, ifindex, flags, _change = _LINK_MESSAGE.unpack_from(data, body)
        if not flags & _IFF_UP:
            self._went.add(ifindex)

    async def reset_stranded(self, before: NetworkState, former: Collection[str]) -> int:
        """See ztun.ports.NetworkMonitor.reset_stranded."""
        return await strays.reset_stranded(self._mark, before, self.state, former)

    def close(self) -> None:
        self._sock.close()


def _messages(data: bytes) -> Iterator[tuple[str, int]]:
    """The messages that may mean something for us: their kind, and where what follows the header begins."""
    start = 0
    while start + _HEADER.size <= len(data):
        length, type_, *_ = _HEADER.unpack_from(data, start)
        body = start + _HEADER.size
        if length < _HEADER.size or start + length > len(data):
            return
        kind = _KINDS.get(type_)
        if kind is not None and not _is_noise(type_, data, body):
            yield kind, body
        start += (length + 3) & ~3


def _is_noise(type_: int, data: bytes, body: int) -> bool:
    """Ports of bridges, our own routes, and routes that only tell of an address."""
    if type_ in _LINKS:
        return data[body] == _AF_BRIDGE
    if type_ in _ROUTES:
        _family, _dst, _src, _tos, _table, protocol, _scope, kind = _ROUTE_MESSAGE.unpack_from(data, body)
        return protocol == PROTOCOL or kind not in (_UNICAST, *_UNREACHABLE_TYPES)
    return False


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
