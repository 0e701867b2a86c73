"""Two stacks, one connection and a bad link between them, in virtual time.

A stack never opens a connection itself. So each of the two is shown a SYN as if the other one had sent it, and its
answer is checked, which makes a simultaneous open (RFC 9293 section 3.5) that no link can spoil. Everything after that
crosses the link: super-segments are cut as the kernel does it on the way out of a TUN, and each piece has a fate of its
own.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from heapq import heappop, heappush

import packets
from conversation import CLIENT, SERVER
from packets import ACK, FIN, PSH, SYN
from simulated import Weather

from ztun.stack import BufferPool, Closed, Connection, Datagram, Stack, StackSettings
from ztun.stack.stack import Packet

_WAKE_UP = 1e-4  # seconds: packets that arrive within one are read in one batch, as a busy loop does it
_VNET = packets.VNET.size
_NEVER = float("inf")
_PORTS = (80, 40000)
_ISS = (4_294_900_000, 7_000_000)  # the first one wraps soon


# Seconds without progress after which nobody gives up here. At 30 % of loss each way half of the time-outs bring
# nothing, so that of thousands some are ten in a row, and take longer than the default of five minutes.
_PATIENCE = 36000.0


@dataclass(frozen=True)
class Terms:
    """What the two ends agree on. buffer: bytes that a receiver holds, and that a sender has under way."""

    buffer: int = 1 << 20
    mtu: int = 1500
    family: int = 4
    sack: bool = True
    stamps: bool = True


class End:
    """One stack and its application, which sends `data` as fast as there is room, closes, and keeps what comes."""

    def __init__(self, terms: Terms, side: int, data: bytes) -> None:
        settings = StackSettings(
            mtu=terms.mtu,
            receive_buffer=terms.buffer,
            send_buffer=max(terms.buffer, 65536),
            data_retries=100,
            user_timeout=_PATIENCE,
            fin_wait_2=_PATIENCE,
            tcp_idle=_PATIENCE,
        )
        self.stack = Stack(self, settings, lambda key, now: _ISS[side], BufferPool())
        self.received = bytearray()
        self.ended = False
        self.how: Closed | None = None
        self._data = memoryview(data)
        self._offset = 0
        self._clock = 0.0
        self.conn: Connection

    # The stack's Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        self.conn = conn
        conn.accept(self, now)

    def udp_received(self, datagram: Datagram, now: float) -> None:
        raise AssertionError("nobody sent a datagram")

    def echo_requested(self, destination: bytes, now: float) -> bool:
        return False

    # The connection's Handler.

    def established(self, now: float) -> None:
        pass

    def data(self, payload: memoryview, now: float) -> int:
        self.received += payload
        return 0

    def eof(self, now: float) -> None:
        self.ended = True

    def writable(self, now: float) -> None:
        conn, data = self.conn, self._data
        while self._offset < len(data) and (room := conn.room()) > 0:
            piece = data[self._offset : self._offset + room]
            self._offset += len(piece)
            conn.send(piece, now)
            if self._offset == len(data):
                conn.shutdown(now)

    def closed(self, how: Closed, now: float) -> None:
        self.how = how

    def is_done(self, size: int) -> bool:
        return self.ended and len(self.received) >= size


class Path:
    """One direction of the link: when each packet arrives, if it does, in wake-ups of the receiver since the start."""

    def __init__(self, weather: Weather, seed: str) -> None:
        self.weather = weather
        self.random = random.Random(seed).random
        self._free_at = 0.0
        self.carried = 0
        self.lost = 0
        self.bytes = 0

    def arrivals(self, size: int, now: float) -> list[int]:
        """No arrival, one, or two."""
        weather, chance = self.weather, self.random
        start = self._free_at if self._free_at > now else now
        self._free_at = start + size / weather.rate
        self.carried += 1
        self.bytes += size
        if weather.loss and chance() < weather.loss:
            self.lost += 1
            return []
        when = self._free_at + weather.delay
        if weather.reorder and chance() < weather.reorder:
            when += weather.delay * chance()
        tick = int(when / _WAKE_UP) + 1
        if weather.duplicate and chance() < weather.duplicate:
            return [tick, tick + 10]
        return [tick]


class World:
    """Both ends, both paths and the clock. now: seconds."""

    def __init__(self, terms: Terms, weather: Weather, seed: str, down: bytes, up: bytes) -> None:
        self.now = 1000.0
        self.ends = (End(terms, 0, down), End(terms, 1, up))
        self.paths = (Path(weather, seed + " down"), Path(weather, seed + " up"))
        self._sizes = (len(down), len(up))
        self._tcp = _VNET + (40 if terms.family == 6 else 20)
        self._arriving: list[tuple[int, int, int, memoryview]] = []
        self._serial = 0
        self._open(terms)

    def _open(self, terms: Terms) -> None:
        addresses = (SERVER[terms.family], CLIENT[terms.family])
        scale = max(terms.buffer.bit_length() - 16, 0)
        for side, end in enumerate(self.ends):
            other = 1 - side
            options = packets.pack_options(
                terms.mtu - (60 if terms.family == 6 else 40), scale, terms.sack, (0, 0) if terms.stamps else None
            )
            syn = packets.tcp_packet(
                addresses[other], addresses[side], (_PORTS[other], _PORTS[side]), _ISS[other], 0, SYN, 65535, options
            )  # fmt: skip
            end.stack.receive(memoryview(packets.VNET.pack(0, 0, 0, 0, 0, 0) + syn), self.now)
            answer = packets.read_tcp(b"".join(end.stack.outbox.pop()))
            assert answer.options.get("wscale") == scale
            assert answer.options.get("sack_ok", False) == terms.sack
            assert ("ts" in answer.options) == terms.stamps
            assert not end.stack.outbox
        self.now += 2 * self.paths[0].weather.delay
        for side, end in enumerate(self.ends):
            other = 1 - side
            options = packets.pack_options(ts=(0, 0) if terms.stamps else None)
            ack = packets.tcp_packet(
                addresses[other], addresses[side], (_PORTS[other], _PORTS[side]), _ISS[other] + 1, _ISS[side] + 1,
                ACK, 65535 >> scale, options,
            )  # fmt: skip
            end.stack.receive(memoryview(packets.VNET.pack(0, 0, 0, 0, 0, 0) + ack), self.now)
            end.stack.flush(self.now)
            end.stack.outbox.clear()

    def run(self, seconds: float) -> float:
        """Transfer until both ends have everything, or the time is up, or one gives up. Returns what it took."""
        began = self.now
        for side in (0, 1):
            self.ends[side].writable(self.now)
            self._sent(side)
        while not self._is_over() and self.now < began + seconds:
            self._step()
        return self.now - began

    def _is_over(self) -> bool:
        first, second = self.ends
        if first.how is not None or second.how is not None:
            return Closed.TIMED_OUT in (first.how, second.how) or None not in (first.how, second.how)
        return first.is_done(self._sizes[1]) and second.is_done(self._sizes[0])

    def _step(self) -> None:
        """The next thing that happens: a timer, or everything that one end finds when it wakes up."""
        arriving = self._arriving
        at = arriving[0][0] * _WAKE_UP if arriving else _NEVER
        timer, side = min((end.stack.get_timer() or _NEVER, side) for side, end in enumerate(self.ends))
        if timer < at:
            stack = self.ends[side].stack
            self.now = max(self.now, timer)
            stack.handle_timer(self.now)
            stack.flush(self.now)
            self._sent(side)
            return
        assert arriving, "nothing is under way, and nobody waits for anything"
        self.now = max(self.now, at)
        tick, _, side, packet = heappop(arriving)
        stack = self.ends[side].stack
        stack.receive(packet, self.now)
        while arriving and arriving[0][0] == tick and arriving[0][2] == side:
            stack.receive(heappop(arriving)[3], self.now)
        stack.flush(self.now)
        self._sent(side)

    def _sent(self, side: int) -> None:
        """Put what a stack has sent on the link."""
        outbox = self.ends[side].stack.outbox
        for packet in outbox:
            if packet[0][1]:
                self._cut(side, packet)
            else:
                self._carry(side, packet[0] if len(packet) == 1 else b"".join(packet))
        outbox.clear()

    def _carry(self, side: int, packet: bytes | memoryview) -> None:
        for tick in self.paths[side].arrivals(len(packet), self.now):
            self._serial += 1
            heappush(self._arriving, (tick, self._serial, 1 - side, memoryview(packet)))

    def _cut(self, side: int, packet: Packet) -> None:
        """What the kernel makes of a super-segment (GSO)."""
        head = bytearray(packet[0])
        payload = packet[1] if len(packet) == 2 else b"".join(packet[1:])
        size = int.from_bytes(head[4:6], "little")
        head[1:6] = bytes(5)
        tcp = self._tcp
        (seq,) = struct.unpack_from("!I", head, tcp + 4)
        flags = head[tcp + 13]
        for offset in range(0, len(payload), size):
            piece = payload[offset : offset + size]
            last = offset + size >= len(payload)
            head[tcp + 13] = flags if last else flags & ~(FIN | PSH)
            struct.pack_into("!I", head, tcp + 4, (seq + offset) & packets.MASK)
            if tcp == _VNET + 40:
                struct.pack_into("!H", head, _VNET + 4, len(head) - tcp + len(piece))
            else:
                struct.pack_into("!H", head, _VNET + 2, len(head) - _VNET + len(piece))
            self._carry(side, bytes(head) + piece)
