"""The network monitor: a routing socket says that something changed, and then all is read anew.

Sources: route(4), bsd/net/rtsock.c. A routing socket that is full loses messages in silence, so its buffer is large,
and whatever comes next makes up for what was lost.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress

from ztun.platform.bursts import BurstMonitor
from ztun.platform.darwin import messages, netstate, numbers, strays
from ztun.platform.darwin.calls import Calls
from ztun.platform.darwin.sockets import BoundSockets
from ztun.ports import NetworkState

_BUFFER = 1 << 18  # bytes


class DarwinNetworkMonitor(BurstMonitor):
    """A ztun.ports.NetworkMonitor. sockets: makes ztun's own, and is told of the ways that there are now.

    disturb: has the owner of a descriptor look at it.
    """

    def __init__(self, calls: Calls, sockets: BoundSockets, disturb: Callable[[int], None]) -> None:
        sock = calls.route_socket()
        sock.setblocking(False)
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        super().__init__(sock)
        self._calls = calls
        self._sockets = sockets
        self._disturb = disturb

    def note(self, data: bytes) -> bool:
        """See BurstMonitor.note."""
        is_news = False
        for message in messages.parse(data):
            if isinstance(message, messages.InterfaceMessage):
                self.counts["link"] += 1
                if not message.flags & numbers.IFF_UP:
                    self.went.add(message.ifindex)
            elif isinstance(message, messages.AddressMessage):
                self.counts["address"] += 1
            elif message.flags & (numbers.RTF_LLINFO | numbers.RTF_WASCLONED) or message.error:
                continue  # a neighbour that was found or forgotten, or what somebody could not do
            else:
                self.counts["route"] += 1
            is_news = True
        return is_news

    def read_state(self, destinations: Iterable[str]) -> NetworkState:
        """See BurstMonitor.read_state."""
        state = netstate.read_state(self._calls, destinations)
        self._sockets.refresh()
        return state

    async def reset_stranded(self, before: NetworkState, former: Collection[str]) -> int:
        """See ztun.ports.NetworkMonitor.reset_stranded."""
        return strays.reset_stranded(self._sockets, self._disturb)
