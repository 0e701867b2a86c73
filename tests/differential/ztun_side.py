"""The same scripts played to ztun's stack, in this process and in virtual time."""

from __future__ import annotations

import itertools

import packets

from ztun.stack import BufferPool, Closed, Connection, Datagram, Stack, StackSettings

from .script import CLOSED, Application


class ZtunApp:
    """The application on the stack's side: takes everything at once, sends within `room`."""

    def __init__(self, conn: Connection, apps: dict[tuple[bytes, int], ZtunApp]) -> None:
        self.conn = conn
        self._apps = apps
        self.received = b""
        self.eof_seen = False
        self.broken = False
        self.is_established = False
        self._unsent = b""
        self._shut = False

    def established(self, now: float) -> None:
        self.is_established = True
        self._apps[self.conn.source, self.conn.source_port] = self

    def data(self, payload: memoryview, now: float) -> int:
        self.received += payload
        return 0

    def eof(self, now: float) -> None:
        self.eof_seen = True

    def writable(self, now: float) -> None:
        self._pump(now)

    def closed(self, how: Closed, now: float) -> None:
        self.broken = how is Closed.RESET_BY_CLIENT and self.is_established

    def act(self, step: Application, data: bytes, now: float) -> bool:
        """False when there is no connection to act on."""
        if not self.is_established or self.conn.is_closed:
            return False
        if step.action == "send":
            if self._shut:
                return False
            self._unsent += data
        elif step.action == "shutdown":
            self._shut = True
        else:
            self.conn.abort(now)
            return True
        self._pump(now)
        return True

    def _pump(self, now: float) -> None:
        while self._unsent and (room := self.conn.room()) > 0:
            piece, self._unsent = self._unsent[:room], self._unsent[room:]
            self.conn.send(memoryview(piece), now)
        if self._shut and not self._unsent:
            self.conn.shutdown(now)


class ZtunSide:
    """It is the stack's Listener too. CLOSED is a port that every outbound refuses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._numbers = itertools.count(0xFFFF_F000, 0x10001)
        settings = StackSettings(initial_rto=30.0, min_rto=30.0, max_half_open=100_000)
        self.stack = Stack(self, settings, lambda key, now: next(self._numbers) & 0xFFFFFFFF, BufferPool())
        self.apps: dict[tuple[bytes, int], ZtunApp] = {}

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        if conn.destination_port == CLOSED:
            conn.refuse(now)
            return
        conn.accept(ZtunApp(conn, self.apps), now)

    def udp_received(self, datagram: Datagram, now: float) -> None:
        raise AssertionError("no script sends UDP")

    def udp_refused(self, key: bytes, now: float) -> None:
        pass

    def echo_requested(self, destination: bytes, now: float) -> bool:
        raise AssertionError("no script pings")

    def inject(self, packet: bytes) -> None:
        self.stack.receive(memoryview(bytearray(packets.VNET.size) + packet), self.now)
        self.stack.flush(self.now)

    def drain(self) -> list[bytes]:
        """Everything that was said since the last call; delayed ACKs are waited for."""
        self.now += 0.05
        while (when := self.stack.get_timer()) is not None and when <= self.now:
            self.stack.handle_timer(self.now)
            self.stack.flush(self.now)
        heard = [complete(b"".join(pieces)) for pieces in self.stack.outbox]
        self.stack.outbox.clear()
        return heard


def complete(raw: bytes) -> bytes:
    """The IP packet, its checksum verified: the field holds the pseudo-header's sum (NEEDS_CSUM)."""
    flags, _, _, _, start, offset = packets.VNET.unpack_from(raw)
    packet = raw[packets.VNET.size :]
    assert flags == packets.NEEDS_CSUM
    addresses = packet[8:40] if packet[0] >> 4 == 6 else packet[12:20]
    pseudo = addresses + (len(packet) - start).to_bytes(4, "big") + b"\0\0\0\x06"
    assert packet[start + offset : start + offset + 2] == packets.naive_sum(pseudo).to_bytes(2, "big")
    return packet
