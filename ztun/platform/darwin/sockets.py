"""ztun's own sockets, bound to the interface by which they leave, so that no route brings them into the utun.

macOS has no marks. A socket with IP_BOUND_IF looks its route up among those of one interface (RTF_IFSCOPE), which our
routes into the utun are not. Which interface that is depends on the destination, so it is chosen at the last moment:
when the socket is connected, or with each datagram.
"""

from __future__ import annotations

import socket
import threading
import weakref
from collections import OrderedDict
from typing import Any

from ztun.errors import ZtunError
from ztun.platform.darwin import messages, netstate, numbers
from ztun.platform.darwin.calls import Calls

_MOST_KNOWN = 4096  # destinations whose interface is remembered


class BoundSockets:
    """A ztun.ports.SocketFactory: non-blocking sockets that leave by the interface of the route that is not ours.

    dead: our addresses, as text, from which nothing can be reached now: their interfaces are down.
    """

    def __init__(self, calls: Calls) -> None:
        self.dead: frozenset[str] = frozenset()
        self.calls = calls
        self.made: weakref.WeakSet[BoundSocket] = weakref.WeakSet()
        self._finder: netstate.WayFinder | None = None
        self._known: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, family: int, type: int) -> BoundSocket:
        """Make a socket. Raises OSError as socket(2) does."""
        made = BoundSocket(self, family, type)
        made.setblocking(False)
        self.made.add(made)
        return made

    def refresh(self) -> None:
        """Read routes and addresses anew, since they changed. Raises OSError."""
        found = list(messages.parse(self.calls.dump(numbers.NET_RT_IFLIST)))
        links, addresses = netstate.list_links(found), netstate.list_addresses(found)
        finder = netstate.WayFinder(netstate.list_ways(self.calls), addresses, links.values())
        with self._lock:  # the monitor reads in a thread
            self._finder = finder
            self._known.clear()

    def owns(self, host: str) -> bool:
        """Whether an address literal is one of this host's. Raises OSError."""
        if self._finder is None:
            self.refresh()
        assert self._finder is not None
        return self._finder.is_local(_packed(host))

    def interface_for(self, host: str) -> int:
        """The index of the interface by which a packet to an address literal has to leave; 0 where any will do.

        Raises OSError.
        """
        index = self._known.get(host)
        if index is not None:
            return index
        if self._finder is None:
            self.refresh()
        assert self._finder is not None
        index = _find(self._finder, host)
        with self._lock:
            self._known[host] = index
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        return index


def _find(finder: netstate.WayFinder, host: str) -> int:
    """A destination without any way is left to the kernel, which says so."""
    try:
        packed = _packed(host)
    except OSError:  # a name
        return 0
    if finder.is_local(packed):
        return 0
    way = finder.find(packed)
    return way.ifindex if way is not None else 0


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host.partition("%")[0])


class BoundSocket(socket.socket):
    """A socket that binds itself to the interface that leads to where it is told to send."""

    def __init__(self, factory: BoundSockets, family: int, type: int) -> None:
        super().__init__(family, type)
        self.factory = factory
        self.bound = 0  # index of the interface
        self.remote: str | None = None
        self._began = False

    def connect(self, address: Any) -> None:
        self._leave_for(address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        """As connect(2) on Linux: asked again, it says what became of the attempt.

        macOS forgets the error of a failed attempt with the next connect(2) (soconnectlock in bsd/kern/uipc_socket.c),
        so it is asked for first.
        """
        if self._began:
            number = self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                return number
        else:
            self._began = True
            try:
                self._leave_for(address)
            except OSError as error:
                return error.errno or 0
        return super().connect_ex(address)

    def sendto(self, *arguments: Any) -> int:
        self._leave_for(arguments[-1])
        return super().sendto(*arguments)

    def sendmsg(self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None) -> int:
        if address is None:
            return super().sendmsg(buffers, ancdata, flags)
        self._leave_for(address)
        return super().sendmsg(buffers, ancdata, flags, address)

    def _leave_for(self, address: Any) -> None:
        self.remote = str(address[0])
        index = self.factory.interface_for(self.remote)
        if index == self.bound:
            return
        try:
            self.factory.calls.bind_interface(self, index)
        except PermissionError as error:
            raise ZtunError("cannot bind sockets to an interface: not permitted; run as root") from error
        self.bound = index
