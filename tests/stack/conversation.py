"""A client that talks to a Stack with the time in its hand, so that tests read like packet transcripts.

Sequence numbers are relative: 0 is the SYN, 1 the first byte. What the stack sends is heard in the order it was sent,
and checked (checksums, GSO fields) before a test sees it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import packets
from packets import ACK, FIN, PSH, SYN, Segment

from ztun.stack import BufferPool, Closed, Connection, Datagram, Stack, StackSettings, State
from ztun.wire.handshake import Terms

CLIENT = {4: bytes([10, 0, 0, 2]), 6: bytes([0xFD] + [0] * 14 + [2])}
SERVER = {4: bytes([192, 0, 2, 7]), 6: bytes.fromhex("20010db8000000000000000000000007")}
_OWN_BUFFER_FROM = 4096
_TICK = 1e-6  # seconds; sums of floats are not exact


class App:
    """The outbound's side of a connection: notes what it is told, and holds back what the test wants it to."""

    def __init__(self, net: Net, conn: Connection) -> None:
        self.net = net
        self.conn = conn
        self.received = bytearray()
        self.events: list[str] = []
        self.how: Closed | None = None
        self.holds = False
        self.unsent = bytearray()
        self.on_data: Any = None
        self.then_shuts_down = False  # when everything was sent

    # The stack's Handler.

    def established(self, now: float) -> None:
        self.events.append("established")

    def data(self, payload: memoryview, now: float) -> int:
        assert self.how is None, "data after closed"
        assert len(payload) > 0, "told of no data at all"
        self.received += payload
        if self.on_data is not None:
            self.on_data()
        return len(payload) if self.holds else 0

    def eof(self, now: float) -> None:
        self.events.append("eof")

    def writable(self, now: float) -> None:
        assert self.how is None, "writable after closed"
        self._pump()

    def closed(self, how: Closed, now: float) -> None:
        assert self.how is None, "closed twice"
        self.how = how

    # What a test makes it do.

    def sends(self, data: bytes) -> None:
        """Send as the relay does: never more than `room`; the rest when the connection is writable."""
        self.unsent += data
        self._pump()
        self.net.collect()

    def _pump(self) -> None:
        while self.unsent and (room := self.conn.room()) > 0:
            count = min(room, len(self.unsent))
            if count < _OWN_BUFFER_FROM:
                self.conn.send(memoryview(bytes(self.unsent[:count])), self.net.now)
            else:
                buffer = self.net.stack.pool.get()
                buffer[:count] = self.unsent[:count]
                self.conn.send(buffer[:count], self.net.now, buffer)
            del self.unsent[:count]
        if self.then_shuts_down and not self.unsent:
            self.then_shuts_down = False
            self.conn.shutdown(self.net.now)

    def shuts_down(self) -> None:
        self.conn.shutdown(self.net.now)
        self.net.collect()

    def resets(self) -> None:
        self.conn.abort(self.net.now)
        self.net.collect()

    def takes(self, count: int) -> None:
        """Pass on `count` of the bytes that were held."""
        self.conn.consumed(count, self.net.now)
        self.net.collect()


class Net:
    """A stack, its clock, and what it has sent. It is the stack's Listener too."""

    def __init__(self, settings: StackSettings | None = None, iss: int = 5_000_000) -> None:
        self.now = 1000.0
        self.iss = iss
        self.stack = Stack(self, settings or StackSettings(), lambda key, now: self.iss, BufferPool())
        self.sent: deque[bytes] = deque()
        self.incoming: list[Connection] = []
        self.apps: list[App] = []
        self.datagrams: list[tuple[bytes, int, bytes, int, bytes]] = []
        self.invoking: list[bytes] = []
        self.refused: list[bytes] = []
        self.pingable: set[bytes] = set()
        self.on_incoming: Any = None
        self._in_batch = False

    # The stack's Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        self.incoming.append(conn)
        if self.on_incoming is not None:
            self.on_incoming(conn)

    def udp_received(self, datagram: Datagram, now: float) -> None:
        sender, receiver = (datagram.source, datagram.source_port), (datagram.destination, datagram.destination_port)
        self.datagrams.append((*sender, *receiver, bytes(datagram.payload)))
        self.invoking.append(bytes(datagram.packet))

    def udp_refused(self, key: bytes, now: float) -> None:
        self.refused.append(key)

    def echo_requested(self, destination: bytes, now: float) -> bool:
        return destination in self.pingable

    # What a test makes it do.

    def receives(self, packet: bytes, flags: int = 0) -> bool:
        """Hand over one IP packet, and end the batch unless the test keeps it open."""
        kept = self.stack.receive(memoryview(bytearray(packets.VNET.pack(flags, 0, 0, 0, 0, 0) + packet)), self.now)
        if not self._in_batch:
            self.stack.flush(self.now)
            self.collect()
        return kept

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Packets that the read loop finds at once: delayed answers come at the end."""
        self._in_batch = True
        yield
        self._in_batch = False
        self.stack.flush(self.now)
        self.collect()

    def waits(self, seconds: float) -> None:
        """Let time pass, and every timer expire at its moment."""
        end = self.now + seconds
        steps = 0
        while (when := self.stack.get_timer()) is not None and when <= end + _TICK:
            self.now = max(self.now, when)
            self.stack.handle_timer(self.now)
            self.stack.flush(self.now)
            self.collect()
            steps += 1
            assert steps < 100_000, "the stack's timer does not advance"
        self.now = max(self.now, end)

    def accepts(self) -> App:
        """The outbound of the latest SYN is connected."""
        app = App(self, self.incoming[-1])
        self.apps.append(app)
        app.conn.accept(app, self.now)
        self.collect()
        return app

    def hands_over(self, **terms: Any) -> App:
        """The outbound of the latest SYN is connected, and somebody else carries the rest. terms: see Terms; number is
        relative to `iss`, as all numbers are: 1 for the first byte, unless the test says otherwise."""
        conn = self.incoming[-1]
        app = App(self, conn)
        self.apps.append(app)
        agreed = {"mss": 1400, "scale": 9, "sack": True, "stamps": True, "window": 64000, **terms}
        self.iss += agreed.pop("number", 1) - 1
        conn.hand_over(app, Terms(self.iss + 1, **agreed), self.now)
        self.collect()
        return app

    def collect(self) -> None:
        """Do what the engine does after every batch: send the outbox. Nothing may refer to it afterwards."""
        if self._in_batch:
            return
        self.sent.extend(b"".join(packet) for packet in self.stack.outbox)
        self.stack.outbox.clear()
        self.check()

    def check(self) -> None:
        """What must hold between any two packets."""
        stack = self.stack
        assert stack.half_open == sum(conn.is_half_open for conn in stack.connections.values())
        self._check_memory()
        for key, conn in stack.connections.items():
            assert conn.key == key
            assert conn.state is not State.CLOSED
            if conn.state is State.OFFLOADED:
                continue  # its numbers are told, and nobody works with them
            tx, rx = conn.tx, conn.rx
            assert tx.una <= tx.nxt <= tx.queue.end + tx.fin_queued
            assert tx.queue.start == min(tx.una, tx.queue.end)
            assert all(tx.una <= start < end <= tx.nxt for start, end in tx.sacked)
            assert tx.rto_at is not None or not (tx.flight() or tx.unsent()) or conn.is_half_open
            assert conn.deadline() >= conn.armed or conn.deadline() == float("inf")
            assert rx.held >= 0
            assert rx.reassembly.size <= rx.capacity

    def _check_memory(self) -> None:
        """The account is never below what the connections really hold."""
        connections = self.stack.connections.values()
        held = sum(conn.rx.charged + conn.queued for conn in connections)
        assert self.stack.memory.used >= held
        if not held:
            assert self.stack.memory.used == 0

    def is_silent(self) -> None:
        assert not self.sent, f"not heard yet: {[packet[:80].hex() for packet in self.sent]}"


class Client:
    """One client endpoint. `says` sends a segment, `hears` takes the stack's next one and compares what is named."""

    def __init__(self, net: Net, family: int = 4, port: int = 40000, isn: int = 1_000_000) -> None:
        self.net = net
        self.family = family
        self.address, self.server = CLIENT[family], SERVER[family]
        self.port, self.server_port = port, 80
        self.isn = isn
        self.mss = 1460 if family == 4 else 1440  # what fits into 1500 bytes
        self.nxt = 0  # the next sequence number to use
        self.expected = 0  # the next one to hear
        self.window = 65535  # as it goes on the wire
        self.stamps = False
        self.last_stamp = 0
        self.app: App

    # Sending.

    def says(
        self, flags: int, payload: bytes = b"", *, seq: int | None = None, ack: int | None = None,
        window: int | None = None, ts: tuple[int, int] | bool = True, urgent: int = 0, corrupt: int = 0,
        raw_options: bytes | None = None, sack: tuple[tuple[int, int], ...] = (), **options: Any,
    ) -> bool:  # fmt: skip
        """Numbers that are not given continue the conversation. ts: False leaves an agreed timestamp out."""
        seq = self.nxt if seq is None else seq
        ack = self.expected if ack is None else ack
        if raw_options is None:
            stamps = ts if isinstance(ts, tuple) else None
            if ts is True and self.stamps:
                stamps = (self.clock(), self.last_stamp)
            blocks = [(left + self.net.iss, right + self.net.iss) for left, right in sack]
            raw_options = packets.pack_options(ts=stamps, sack=blocks, **options)
        packet = packets.tcp_packet(
            self.address, self.server, (self.port, self.server_port), seq + self.isn,
            ack + self.net.iss if flags & ACK else 0, flags, self.window if window is None else window,
            raw_options, payload, urgent, corrupt,
        )  # fmt: skip
        self.nxt = max(self.nxt, seq + len(payload) + bool(flags & SYN) + bool(flags & FIN))
        return self.net.receives(packet)

    def clock(self) -> int:
        """The TSval of this moment: milliseconds."""
        return int(self.net.now * 1000)

    # Listening.

    def hears(self, flags: int, payload: bytes | None = None, **expected: Any) -> Segment:
        """Take the next packet; PSH counts only when it is asked for. expected: seq, ack (relative), window, size,
        gso_size, and the options mss, wscale, sack_ok, ts, sack (relative), with None for one that must be missing."""
        assert self.net.sent, "the stack is silent"
        heard = packets.read_tcp(self.net.sent.popleft())
        assert (heard.destination, heard.port) == (self.address, self.port)
        facts = self._facts(heard)
        assert facts["flags"] | (heard.flags & PSH & flags) == flags, f"heard {facts}"
        if payload is not None:
            assert heard.payload == payload
        for name, value in expected.items():
            assert facts.get(name) == value, f"{name}: heard {facts}"
        self._note(heard, facts)
        return heard

    def _facts(self, heard: Segment) -> dict[str, Any]:
        facts: dict[str, Any] = dict(heard.options)
        facts["seq"] = relative(heard.seq, self.net.iss) if not heard.flags & packets.RST or heard.seq else 0
        facts["ack"] = relative(heard.ack, self.isn)
        facts["flags"] = heard.flags & ~PSH
        facts["window"] = heard.window
        facts["size"] = len(heard.payload)
        facts["gso_size"] = heard.gso_size
        if "sack" in facts:
            facts["sack"] = [(relative(a, self.isn), relative(b, self.isn)) for a, b in facts["sack"]]
        return facts

    def _note(self, heard: Segment, facts: dict[str, Any]) -> None:
        if facts["seq"] == self.expected:
            self.expected += len(heard.payload) + bool(heard.flags & SYN) + bool(heard.flags & FIN)
        if "ts" in facts:
            self.last_stamp = facts["ts"][0]

    def hears_all(self) -> bytes:
        """Take everything that was sent: in-order data, in segments of any size."""
        data = b""
        while self.net.sent:
            data += self.hears(ACK).payload
        return data

    def hears_nothing(self) -> None:
        self.net.is_silent()

    def waits(self, seconds: float) -> None:
        self.net.waits(seconds)

    # Openings that many transcripts begin with.

    def opens(self, **options: Any) -> None:
        """Send a SYN with the options of a plain client, or with those given, and let the outbound connect."""
        options = {"mss": self.mss, **options}
        self.says(SYN, **options)
        self.app = self.net.accepts()

    def connects(self, **options: Any) -> App:
        """The whole handshake."""
        self.opens(**options)
        heard = self.hears(SYN | ACK, seq=0, ack=1)
        self.stamps = "ts" in heard.options
        self.says(ACK)
        self.hears_nothing()
        return self.app

    def connects_like_linux(self) -> App:
        """With every option a kernel sends."""
        return self.connects(sack_ok=True, wscale=7, ts=(self.clock(), 0))

    def acknowledges(self, ack: int | None = None, **more: Any) -> None:
        """A bare ACK of everything heard, or up to `ack`."""
        self.says(ACK, ack=ack, **more)

    @property
    def conn(self) -> Connection:
        return self.net.incoming[-1]

    def dropped(self, reason: str) -> int:
        """How many packets were dropped for this reason."""
        return self.net.stack.drops.get(reason, 0)


def relative(number: int, base: int) -> int:
    """`number` - `base` as a signed 32-bit difference."""
    return ((number - base + 0x80000000) & packets.MASK) - 0x80000000
