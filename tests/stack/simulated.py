"""A bad link in virtual time, with a small TCP of its own at the far end.

The far end is written from the RFCs for these tests only: it acknowledges with SACK, sends with a fixed window, three
duplicates and a timer, and knows nothing of ztun.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush

import packets
from conversation import App, Client, Net, relative
from packets import ACK, FIN, SYN

_ACK_EVERY = 2
_FAR_WINDOW = 32  # segments that the far end sends ahead
_FAR_RTO = 0.3


@dataclass(frozen=True)
class Weather:
    """Chances per packet, seconds one way, bytes a second; `whole`: super-segments are lost whole, as in a TUN queue.

    reorder: a packet is held back for a while; jitter of the others is zero, so that nothing else reorders.
    """

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    delay: float = 0.01
    rate: float = 50e6
    whole: bool = False


class Clock:
    """Everything that will happen, in order."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heappush(self._events, (when, self._serial, action))

    def run(self, until: float, done: Callable[[], bool]) -> None:
        """Let time pass until `done`, or until the time is up."""
        stack = self.net.stack
        while not done():
            timer = stack.get_timer()
            if self._events and (timer is None or self._events[0][0] <= timer):
                when, _, action = heappop(self._events)
            elif timer is not None:
                when, action = timer, self._tick
            else:
                return
            if when > until:
                self.net.now = until
                return
            self.net.now = max(self.net.now, when)
            action()

    def _tick(self) -> None:
        self.net.stack.handle_timer(self.net.now)
        self.net.stack.flush(self.net.now)
        self.net.collect()


class Link:
    """One direction."""

    def __init__(self, clock: Clock, weather: Weather, seed: str, deliver: Callable[[bytes], None]) -> None:
        self._clock = clock
        self._weather = weather
        self._random = random.Random(seed)
        self._deliver = deliver
        self._free_at = 0.0
        self.lost = 0
        self.carried = 0

    def send(self, packet: bytes) -> None:
        weather, now = self._weather, self._clock.net.now
        self._free_at = max(self._free_at, now) + len(packet) / weather.rate
        self.carried += 1
        if self._random.random() < weather.loss:
            self.lost += 1
            return
        when = self._free_at + weather.delay
        if self._random.random() < weather.reorder:
            when += weather.delay * self._random.random()
        self._clock.at(when, lambda: self._deliver(packet))
        if self._random.random() < weather.duplicate:
            self._clock.at(when + 0.001, lambda: self._deliver(packet))


class FarEnd:
    """A client that sends `up` and wants to receive what the outbound has."""

    def __init__(self, client: Client, clock: Clock, weather: Weather, seed: str, up: bytes) -> None:
        self.client = client
        self.clock = clock
        self.net = client.net
        self.to_stack = Link(clock, weather, seed + "up", self._into_stack)
        self.from_stack = Link(clock, weather, seed + "down", self._segment)
        self.whole = weather.whole
        self.received = bytearray()
        self.finished = False  # the stack's FIN arrived
        self._pieces: dict[int, bytes] = {}
        self._fin_at: int | None = None
        self._recent: list[int] = []
        self._unacknowledged = 0
        self._up = up
        self._una = self._nxt = self._most = 0  # offsets into `up`; the FIN is the one after its end
        self._duplicates = 0
        self._timer = 0
        self._edge = 65535

    def _into_stack(self, packet: bytes) -> None:
        self.net.receives(packet)
        self.forward()

    def forward(self) -> None:
        """Put on the link what the stack has sent; the kernel cuts super-segments on the way."""
        while self.net.sent:
            raw = self.net.sent.popleft()
            for packet in [raw] if self.whole else cut(raw):
                self.from_stack.send(packet)

    # Receiving.

    def _segment(self, raw: bytes) -> None:
        for packet in cut(raw) if self.whole else [raw]:
            self._take(packet)

    def _take(self, raw: bytes) -> None:
        seq, ack, flags, window, payload, stamp = parse(raw)
        if flags & 4 or flags & SYN:
            return
        start = relative(seq, self.net.iss) - 1
        if stamp is not None:
            self.client.last_stamp = stamp
        self._acknowledged(relative(ack, self.client.isn) - 1, relative(ack, self.client.isn) - 1 + (window << 5))
        if flags & FIN:
            self._fin_at = start + len(payload)
        in_order = start == len(self.received) and not self._pieces
        if payload and start + len(payload) > len(self.received):
            self._pieces.setdefault(start, payload)
            if len(self._pieces[start]) < len(payload):
                self._pieces[start] = payload
            self._recent = [start, *[s for s in self._recent if s != start]][:16]
            self._deliver()
        if self._fin_at == len(self.received):
            self.finished = True
        if payload or flags & FIN:
            self._unacknowledged += 1
            if not in_order or self._unacknowledged >= _ACK_EVERY or flags & (FIN | packets.PSH):
                self._acknowledge()

    def _deliver(self) -> None:
        while True:
            here = len(self.received)
            usable = [s for s in self._pieces if s <= here]
            if not usable:
                return
            for start in usable:
                piece = self._pieces.pop(start)
                if start + len(piece) > here:
                    self.received += piece[here - start :]
                    break

    def _blocks(self) -> tuple[tuple[int, int], ...]:
        merged: list[list[int]] = []
        for start in sorted(self._pieces):
            end = start + len(self._pieces[start])
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])

        def rank(block: list[int]) -> int:
            return next((i for i, s in enumerate(self._recent) if block[0] <= s < block[1]), 99)

        return tuple((a + 1, b + 1) for a, b in sorted(merged, key=rank)[:3])

    def _acknowledge(self) -> None:
        self._unacknowledged = 0
        self._say(self._most, b"", 0, self._blocks())

    def _say(self, offset: int, payload: bytes, fin: int, sack: tuple[tuple[int, int], ...] = ()) -> None:
        client = self.client
        ack = len(self.received) + 1 + self.finished
        stamps = (client.clock(), client.last_stamp) if client.stamps else None
        blocks = [(left + self.net.iss, right + self.net.iss) for left, right in sack]
        options = packets.pack_options(ts=stamps, sack=blocks if client.conn.sack_permitted else ())
        packet = packets.tcp_packet(
            client.address, client.server, (client.port, client.server_port), client.isn + 1 + offset,
            self.net.iss + ack, ACK | fin, 65535, options, payload,
        )  # fmt: skip
        self.to_stack.send(packet)

    # Sending.

    def start(self) -> None:
        self._push()
        self._arm()

    def _push(self) -> None:
        size = self._size()
        while self._nxt < min(len(self._up), self._una + _FAR_WINDOW * size, self._edge):
            self._send_at(self._nxt)
            self._nxt += len(self._up[self._nxt : self._nxt + size])
        if self._nxt == len(self._up):
            self._send_at(self._nxt)
            self._nxt += 1
        self._most = max(self._most, self._nxt)

    def _size(self) -> int:
        return self.client.mss - (12 if self.client.stamps else 0)

    def _send_at(self, offset: int) -> None:
        """One segment of data, or the FIN alone."""
        self._say(offset, self._up[offset : offset + self._size()], FIN if offset == len(self._up) else 0)

    def _acknowledged(self, offset: int, edge: int) -> None:
        self._edge = max(self._edge, edge)
        if offset > self._una:
            self._una = offset
            self._duplicates = 0
            self._nxt = max(self._nxt, offset)
            self._arm()
        elif offset == self._una < self._nxt:
            self._duplicates += 1
            if self._duplicates == 3:
                self._send_at(self._una)
        self._push()

    def _arm(self) -> None:
        self._timer += 1
        serial = self._timer
        self.clock.at(self.net.now + _FAR_RTO, lambda: self._expired(serial))

    def _expired(self, serial: int) -> None:
        if serial == self._timer and self._una < len(self._up) + 1:
            self._nxt = self._una
            self._duplicates = 0
            self._push()
            self._arm()


def parse(raw: bytes) -> tuple[int, int, int, int, bytes, int | None]:
    """(seq, ack, flags, window, payload, TSval) of a packet of the stack, virtio_net_hdr first."""
    start = packets.VNET.size + (40 if raw[packets.VNET.size] >> 4 == 6 else 20)
    seq, ack, words, window = struct.unpack_from("!IIHH", raw, start + 4)
    end = start + (words >> 12) * 4
    stamp = None
    if end - start >= 32 and raw[start + 20 : start + 24] == b"\1\1\x08\x0a":
        stamp = int.from_bytes(raw[start + 24 : start + 28], "big")
    return seq, ack, words & 0x3F, window, raw[end:], stamp


def cut(raw: bytes) -> list[bytes]:
    """What the kernel makes of a super-segment."""
    _, gso_type, hdr_len, gso_size, _, _ = packets.VNET.unpack_from(raw)
    if not gso_type:
        return [raw]
    start = packets.VNET.size + hdr_len
    head, payload = bytearray(raw[:start]), raw[start:]
    tcp = packets.VNET.size + (40 if raw[packets.VNET.size] >> 4 == 6 else 20)
    seq = int.from_bytes(raw[tcp + 4 : tcp + 8], "big")
    pieces = []
    for offset in range(0, len(payload), gso_size):
        head[tcp + 4 : tcp + 8] = ((seq + offset) & packets.MASK).to_bytes(4, "big")
        last = offset + gso_size >= len(payload)
        head[tcp + 13] = raw[tcp + 13] if last else raw[tcp + 13] & ~(FIN | packets.PSH)
        pieces.append(bytes(head) + payload[offset : offset + gso_size])
    return pieces


@dataclass(frozen=True)
class Outcome:
    """seconds: from the handshake to the end, or to the moment that was given up."""

    seconds: float
    down: bytes
    up: bytes
    app: App
    far: FarEnd


def transfer(
    client: Client, weather: Weather, seed: str, down: bytes, up: bytes, limit: float, **options: object
) -> Outcome:
    """Shake hands over a good link, then let it rain: send `down` and `up` at once, FIN both ways."""
    client.opens(wscale=7, **options)
    client.stamps = "ts" in client.hears(SYN | ACK).options
    client.waits(2 * weather.delay)
    client.says(ACK)
    app = client.app
    clock = Clock(client.net)
    far = FarEnd(client, clock, weather, seed, up)
    began = client.net.now
    far.start()
    app.then_shuts_down = True
    app.sends(down)
    far.forward()
    clock.run(began + limit, lambda: _over(far, app, up))
    return Outcome(client.net.now - began, bytes(far.received), bytes(app.received), app, far)


def _over(far: FarEnd, app: App, up: bytes) -> bool:
    far.forward()
    return far.finished and len(app.received) >= len(up) and "eof" in app.events
