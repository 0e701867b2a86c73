"""What the stack tells its application of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from ztun.stack.header import FlowKey

if TYPE_CHECKING:
    from ztun.stack.connection import Connection


class Datagram(FlowKey):
    """A UDP datagram from a client. key: its addresses and ports as they stand in the packet, 12 or 36 bytes; payload
    and packet (from the IP header on) are views that must be copied to be kept."""

    __slots__ = ("packet", "payload")

    def __init__(self, key: bytes, payload: memoryview, packet: memoryview) -> None:
        super().__init__(key)
        self.payload = payload
        self.packet = packet


class Listener(Protocol):
    """Who the stack tells of what is new."""

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        """A SYN for a new connection: dial, then `accept` or `refuse` it."""
        ...

    def udp_received(self, datagram: Datagram, now: float) -> None: ...

    def udp_refused(self, key: bytes, now: float) -> None:
        """The client has no socket any more for a datagram that it got. key: of its own datagrams of that flow."""
        ...

    def echo_requested(self, destination: bytes, now: float) -> bool:
        """True when the stack shall answer a ping to this address in its owner's place."""
        ...
