"""The stack under packets of every kind, an application that misbehaves, and time."""

from __future__ import annotations

import re

from fuzz import packets
from fuzz.source import Source
from ztun.stack import (
    BufferPool,
    Closed,
    Connection,
    Datagram,
    DatagramHeader,
    Stack,
    StackSettings,
    State,
    reverse,
)
from ztun.wire.icmp import Reason

_HALF_OPEN = (State.DIALING, State.SYN_RECEIVED)
_FLAGS = (16, 16, 16, 24, 17, 2, 18, 4, 20, 0, 1, 3, 6, 48, 41, 255)
_NEAR = (0, 0, 0, 1, -1, 2, 100, -100, 1460, -1460, 5000, 65535, 1 << 20, 1 << 31, -(1 << 30))
_LENGTHS = (0, 0, 1, 7, 100, 536, 1460, 9000, 40000)
_TIMES = (0.0, 0.001, 0.04, 0.2, 0.5, 1.0, 3.0, 60.0, 300.0, 8000.0)
_OPTIONS = (
    b"",
    b"\x02\x04\x05\xb4\x04\x02\x08\x0a\0\0\x10\0\0\0\0\0\x01\x03\x03\x07",
    b"\x02\x04\x05\xb4",
    b"\x02\x04\0\x01\x03\x03\x0e\x04\x02",
)
_REASON = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_MOST_STEPS = 100_000


class App:
    """A Handler whose behaviour the input decides."""

    def __init__(self, world: World, conn: Connection) -> None:
        self.world = world
        self.conn = conn
        self.held = 0
        self.how: Closed | None = None
        self._views: list[memoryview] = []

    def established(self, now: float) -> None:
        self.acts()

    def data(self, payload: memoryview, now: float) -> int:
        assert self.how is None, "data after closed"
        assert len(payload), "no data at all"
        kept = self.world.source.pick((0, 0, len(payload), len(payload) // 2))
        if kept:
            self._views.append(payload)  # as the contract allows
        self.acts()
        self.held += kept  # from now on it may be consumed
        return kept

    def eof(self, now: float) -> None:
        assert self.how is None, "eof after closed"
        self.acts()

    def writable(self, now: float) -> None:
        assert self.how is None, "writable after closed"
        self.acts()

    def closed(self, how: Closed, now: float) -> None:
        assert self.how is None, "closed twice"
        self.how = how
        self._views.clear()
        self.world.open.discard(self)

    def acts(self) -> None:
        """Do something, or nothing, also in the middle of being told."""
        source, now, conn = self.world.source, self.world.now, self.conn
        what = source.below(12)
        if what == 1:
            conn.abort(now)
        elif what == 2:
            conn.shutdown(now)
        elif what in (3, 4, 5):
            self.sends(min(conn.room(), source.pick((1, 100, 1460, 20000, 65535))))
        elif what == 6:
            self.consumes(source.pick((1, 100, self.held)))
        elif what == 7:
            self.sends(source.pick((1, 3000, 65000)))  # more than there is room for

    def sends(self, count: int) -> None:
        if count <= 0:
            return
        pool = self.world.stack.pool
        if self.world.source.below(2):
            buffer = pool.get()
            self.conn.send(buffer[: min(count, pool.size)], self.world.now, buffer)
        else:
            self.conn.send(memoryview(bytes(count)), self.world.now)

    def consumes(self, count: int) -> None:
        count = min(count, self.held)
        if count > 0:
            self.held -= count
            self.conn.consumed(count, self.world.now)


class World:
    """A stack and everything around it. It is the stack's Listener, too."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.now = 1000.0
        settings = StackSettings(
            max_connections=6,
            max_connections_per_source=5,
            max_half_open=4,
            max_half_open_per_source=3,
            max_time_wait=3,
            receive_buffer=1 << 16,
            max_memory=1 << 17,
            max_fragments=1 << 16,
            max_fragments_per_source=1 << 15,
        )
        self.stack = Stack(self, settings, lambda key, now: 0xFFFF_F000 + key[-3], BufferPool(keep=2))
        self.open: set[App] = set()
        self.dialing: list[Connection] = []
        self.last_sent = b""
        self._in_batch = False

    # The stack's Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        if self.source.below(4):
            self._accept(conn)
        else:
            self.dialing.append(conn)

    def udp_received(self, datagram: Datagram, now: float) -> None:
        what = self.source.below(4)
        if what == 1:
            self.stack.send_unreachable(datagram.packet, self.source.pick(tuple(Reason)), now)
        elif what == 2:
            payload = bytes(datagram.payload) * self.source.pick((1, 1, 30, 2000))
            self.stack.send_udp(DatagramHeader(reverse(datagram.key)), payload)

    def udp_refused(self, key: bytes, now: float) -> None:
        pass

    def echo_requested(self, destination: bytes, now: float) -> bool:
        return self.source.below(2) == 0

    def _accept(self, conn: Connection) -> None:
        app = App(self, conn)
        if not conn.is_closed:
            self.open.add(app)
            conn.accept(app, self.now)

    # What happens.

    def step(self) -> None:
        """One event."""
        what = self.source.below(16)
        if what < 8:
            before = self.stack.drops.get("ip-truncated", 0)
            self.receives(self._segment())
            assert self.stack.drops.get("ip-truncated", 0) == before, "a mistake of ours was taken for a short packet"
        elif what == 8:
            self.receives(self._mutated(self._packet()))
        elif what == 9:
            self.receives(self._packet())
        elif what == 10:
            for packet in self._fragments():
                self.receives(packet)
        elif what == 11:
            self.waits(self.source.pick(_TIMES))
        elif what == 12:
            self._application()
        elif what == 13:
            self._in_batch = not self._in_batch
        elif what == 14:
            self.receives(self._mutated(self._segment()))
        else:
            self.receives(self.source.bytes(self.source.below(120)))
        self._settle()

    def receives(self, packet: bytes, flags: int = 0) -> None:
        flags = self.source.pick((0, 0, 1, 2))
        raw = memoryview(bytearray(packets.VNET.pack(flags, 0, 0, 0, 0, 0) + packet))
        kept = self.stack.receive(raw, self.now)
        assert kept in (True, False)
        if not kept:
            raw[:] = bytes(len(raw))  # whoever reads it now reads garbage

    def waits(self, seconds: float) -> None:
        end = self.now + seconds
        steps = 0
        while (when := self.stack.get_timer()) is not None and when <= end:
            self.now = max(self.now, when)
            self.stack.handle_timer(self.now)
            self._settle()
            steps += 1
            assert steps < _MOST_STEPS, "the stack's timer does not advance"
        self.now = end

    def _application(self) -> None:
        if self.dialing and self.source.below(2):
            conn = self.dialing.pop(0)
            how = self.source.below(4)
            if how == 1:
                conn.refuse(self.now)
            elif how == 2:
                conn.refuse(self.now, self.source.pick(tuple(Reason)))
            elif how == 3:
                conn.abort(self.now)
            else:
                self._accept(conn)
        elif self.open:
            min(self.open, key=lambda app: app.conn.key).acts()

    def _segment(self) -> bytes:
        """A segment of one of a few flows, its numbers near those that count."""
        source = self.source
        family = source.pick((4, 4, 4, 6))
        ports = 40000 + source.below(4), source.pick((80, 80, 443))
        key = (
            packets.CLIENTS[family]
            + packets.SERVERS[family]
            + ports[0].to_bytes(2, "big")
            + ports[1].to_bytes(2, "big")
        )
        conn = self.stack.connections.get(key)
        seq, ack = 1000, 0
        flags = source.pick(_FLAGS)
        if conn is not None:
            seq = source.pick((conn.rx.nxt, conn.rx.nxt, conn.rx.nxt, conn.rx.edge))
            ack = source.pick((conn.tx.nxt, conn.tx.nxt, conn.tx.una, conn.iss))
        elif source.below(4):
            flags = 2
        options = source.pick(_OPTIONS)
        if conn is not None and conn.timestamps and source.below(8):
            options = b"\x01\x01\x08\x0a" + ((conn.stamp_recent + source.pick((0, 1, -5000))) & 0xFFFFFFFF).to_bytes(
                4, "big"
            )
            options += bytes(4)
        if conn is not None and conn.sack_permitted and source.below(4) == 1:
            start = conn.tx.una + source.below(20000)
            block = (start & 0xFFFFFFFF).to_bytes(4, "big") + ((start + source.below(3000)) & 0xFFFFFFFF).to_bytes(
                4, "big"
            )
            options += b"\x01\x01\x05\x0a" + block
        if source.below(16) == 1:
            options = source.bytes(source.below(41))
        window = source.pick((65535, 65535, 1000, 1, 0, 40))
        return packets.tcp(
            family, ports, seq + source.pick(_NEAR), ack + source.pick(_NEAR), flags, window, options,
            bytes(source.pick(_LENGTHS)),
        )  # fmt: skip

    def _packet(self) -> bytes:
        """Something valid that is no segment."""
        source = self.source
        family = source.pick((4, 6))
        what = source.below(5)
        if what == 0:
            return packets.udp(family, (5000 + source.below(4), 53), source.bytes(source.below(64)))
        if what == 1:
            rest = source.bytes(4).ljust(4, b"\0") + bytes(source.pick((0, 56, 3000)))
            return packets.icmp(family, 8 if family == 4 else 128, 0, rest)
        if what == 2:  # an error about what was sent last, if anything
            kind, code = (
                source.pick(((3, 4), (3, 3), (11, 0))) if family == 4 else source.pick(((2, 0), (1, 4), (3, 0)))
            )
            rest = source.pick((b"\0\0\0\0", b"\0\0\x05\0", b"\0\0\0\x44", b"\xff\xff\xff\xff"))
            return packets.icmp(family, kind, code, rest + self.last_sent[packets.VNET.size :][: source.below(200)])
        if what == 3:
            return packets.ip(family, source.below(256), source.bytes(source.below(64)))
        extensions = b"".join(
            bytes((source.pick((0, 43, 60, 6, 17)), source.below(2))) + bytes(source.pick((6, 14)))
            for _ in range(source.below(9))
        )
        return packets.ip(6, source.pick((0, 43, 44, 51, 60)), source.bytes(source.below(64)), extensions=extensions)

    def _mutated(self, packet: bytes) -> bytes:
        source = self.source
        mutated = bytearray(packet)
        for _ in range(1 + source.below(4)):
            if mutated:
                mutated[source.below(min(len(mutated), 80))] = source.below(256)
        what = source.below(4)
        if what == 1:
            del mutated[source.below(len(mutated) + 1) :]
        elif what == 2:
            mutated += source.bytes(source.below(40))
        return bytes(mutated)

    def _fragments(self) -> list[bytes]:
        """Pieces of one datagram: all, some, twice, or overlapping."""
        source = self.source
        family = source.pick((4, 6))
        whole = packets.udp(family, (5000, 53), bytes(source.pick((16, 200, 4000))))[20 if family == 4 else 40 :]
        size = source.pick((8, 64, 1480))
        pieces = []
        for start in range(0, min(len(whole), 64 * size), size):
            offset = start + source.pick((0, 0, 0, 0, 0, 8, -8))
            more = start + size < len(whole)
            if offset < 0 or source.below(16) == 1:
                continue
            piece = whole[start : start + size]
            if family == 4:
                pieces.append(packets.ip(4, 17, piece, fragment=offset // 8 | (0x2000 if more else 0)))
            else:
                head = bytes((17, 0)) + ((offset & 0xFFF8) | more).to_bytes(2, "big") + bytes((0, 0, 0, 9))
                pieces.append(packets.ip(6, 44, piece, extensions=head))
        if source.below(3) == 1:
            pieces.reverse()
        return pieces

    # What must hold.

    def _settle(self) -> None:
        if not self._in_batch:
            self.stack.flush(self.now)
        for pieces in self.stack.outbox:
            self.last_sent = b"".join(pieces)
            packets.check(self.last_sent)
        self.stack.outbox.clear()
        self.check()

    def check(self) -> None:
        """Invariants between any two events."""
        stack = self.stack
        assert stack.half_open == sum(conn.state in _HALF_OPEN for conn in stack.connections.values())
        charged = sum(conn.rx.charged + conn.queued for conn in stack.connections.values())
        assert stack.memory.used >= charged >= 0
        assert len(stack.connections) <= stack.settings.max_connections
        for key, conn in stack.connections.items():
            tx, rx = conn.tx, conn.rx
            assert conn.key == key
            assert conn.state is not State.CLOSED
            assert tx.una <= tx.nxt <= tx.queue.end + tx.fin_queued
            assert all(tx.una <= start < end <= tx.nxt for start, end in tx.sacked)
            assert tx.rto_at is not None or not (tx.flight() or tx.unsent()) or conn.state in _HALF_OPEN
            assert 0 <= rx.held <= rx.capacity, f"{rx.held} of {rx.capacity} bytes held"
            assert rx.reassembly.size <= rx.capacity
            assert rx.edge >= rx.nxt - 1
            assert conn.deadline() >= conn.armed or conn.deadline() == float("inf")
        for app in self.open:
            assert not app.conn.is_closed
            assert app.conn.rx.held == app.held or app.conn.state in _HALF_OPEN
        assert all(_REASON.fullmatch(reason) for reason in stack.drops)

    def end(self) -> None:
        """The dialler gives up, time passes: nothing may be left."""
        self._in_batch = False
        self.source = Source(b"")
        for conn in self.dialing:
            conn.refuse(self.now)
        self._settle()
        self.waits(3 * self.stack.settings.tcp_idle)
        assert not self.stack.connections, "a connection that never ends"
        assert not self.open, "an application that is never told"
        assert self.stack.half_open == 0
        assert self.stack.memory.used == 0, "memory that nobody holds"
        assert self.stack.admission.sources == 0, "a source that is counted for ever"
        assert len(self.stack._fragments) == 0
        pool = self.stack.pool
        assert pool.allocated - pool.freed == len(pool), "a buffer that never comes back"


def run(data: bytes) -> None:
    """One input: a life of a stack."""
    source = Source(data)
    world = World(source)
    steps = 0
    while source and steps < 400:
        world.step()
        steps += 1
    world.end()
