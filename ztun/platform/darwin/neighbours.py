"""Where clients are: by which interface, and with which MAC address. A utun does not tell, so routes and neighbours do.

Source: the way of arp(8) and ndp(8), NET_RT_FLAGS with RTF_LLINFO (bsd/net/rtsock.c).
"""

from __future__ import annotations

import socket
import time

from ztun.platform.darwin import messages, numbers
from ztun.platform.darwin.sockets import BoundSockets
from ztun.ports import Origin

_KEPT = 2.0  # seconds that the table of neighbours is believed


class Neighbours:
    """Finds the origin of a client among the routes that `sockets` knows and the neighbours of this host."""

    def __init__(self, sockets: BoundSockets) -> None:
        self._sockets = sockets
        self._macs: dict[bytes, bytes] = {}
        self._read_at = -_KEPT

    def origin(self, address: bytes) -> Origin | None:
        """See ztun.ports.Classifier.origin."""
        try:
            index = self._sockets.interface_for(_text(address))
            name = socket.if_indextoname(index) if index else None
            return Origin(name, self._mac_of(address)) if name is not None else None
        except OSError:
            return None

    def _mac_of(self, address: bytes) -> bytes | None:
        now = time.monotonic()
        if now - self._read_at >= _KEPT:
            self._read_at = now
            self._macs = self._read()
        return self._macs.get(address)

    def _read(self) -> dict[bytes, bytes]:
        found = {}
        for message in messages.parse(self._sockets.calls.dump(numbers.NET_RT_FLAGS, numbers.RTF_LLINFO)):
            if isinstance(message, messages.RouteMessage):
                address = messages.address_of(message.addresses.get(numbers.RTA_DST))
                mac = messages.link_address(message.addresses.get(numbers.RTA_GATEWAY))
                if address is not None and mac is not None:
                    found[address] = mac
        return found


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
