"""The network monitor: rtnetlink's notifications say that something changed, and then all is read anew."""

from __future__ import annotations

import socket
import struct
from collections.abc import Collection, Iterable, Iterator

from ztun.platform.bursts import BurstMonitor
from ztun.platform.linux import netstate, strays
from ztun.platform.linux.routes import PROTOCOL
from ztun.ports import NetworkState

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


class LinuxNetworkMonitor(BurstMonitor):
    """A ztun.ports.NetworkMonitor of this network namespace. mark: of ztun's own sockets."""

    def __init__(self, mark: int) -> None:
        super().__init__(
            socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
            )
        )
        self._mark = mark
        self._sock.bind((0, _GROUPS))

    def read_state(self, destinations: Iterable[str]) -> NetworkState:
        """See BurstMonitor.read_state."""
        return netstate.read_state(self._mark, destinations)

    def note(self, data: bytes) -> bool:
        """See BurstMonitor.note."""
        is_news = False
        for kind, body in _messages(data):
            self.counts[kind] += 1
            is_news = True
            if kind == "link":
                self._note_link(data, body)
        return is_news

    def _note_link(self, data: bytes, body: int) -> None:
        _family, _type, ifindex, flags, _change = _LINK_MESSAGE.unpack_from(data, body)
        if not flags & _IFF_UP:
            self.went.add(ifindex)

    async def reset_stranded(self, before: NetworkState, former: Collection[str]) -> int:
        """See ztun.ports.NetworkMonitor.reset_stranded."""
        return await strays.reset_stranded(self._mark, before, self.state, former)


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
