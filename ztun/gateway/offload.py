"""Flows whose bytes the kernel carries: taken when the outbound is connected, looked at now and then, ended here."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Callable
from typing import Final

from ztun.gateway.engine import Engine
from ztun.ports import ENDED, Offload, Progress
from ztun.stack import Closed, Connection
from ztun.stack.header import FlowKey

# Seconds between looks at what has ended and at clients that did not answer yet: half-open connections are few.
_INTERVAL: Final = 0.05
_LONGEST: Final = 30.0  # seconds between looks at how long nothing went either way
# Seconds after our SYN-ACK at which it is repeated (RFC 6298: 1, then twice as many), and at which it is given up.
_REPEATS: Final[tuple[float, ...]] = (1.0, 3.0, 7.0, 15.0, 31.0)
_GIVEN_UP: Final = 63.0
_FIN_AGAIN: Final = 0.5  # seconds after which a FIN that was lost is said again


class KernelRelay:
    """What TcpRelay is, for a flow that the kernel carries. A stack Handler, which is told of the end only."""

    __slots__ = (
        "_carrier", "_conn", "_fd", "_finished", "_on_closed", "_sock", "_started", "how", "packets", "pending",
        "place", "released", "repeated",
    )  # fmt: skip

    def __init__(
        self,
        carrier: Carrier,
        conn: Connection,
        sock: socket.socket,
        place: int,
        on_closed: Callable[[KernelRelay], None],
    ) -> None:
        """sock: watched by the engine's poller; it hears nothing more, but may be ended by others."""
        self._carrier = carrier
        self._conn = conn
        self._sock = sock
        self._fd = sock.fileno()
        self._on_closed = on_closed
        self._started = carrier.engine.now()
        self.place = place
        self.pending = 0
        self.how = Closed.ABORTED
        self.released = False
        self.packets = -1  # counted when it was found reset
        self.repeated = 0  # how often the SYN-ACK was
        self._finished = -_GIVEN_UP
        carrier.engine.poller.hand_over(self._fd, self.ready)

    # A stack Handler.

    def established(self, now: float) -> None:
        pass

    def data(self, payload: memoryview, now: float) -> int:
        return 0

    def eof(self, now: float) -> None:
        pass

    def writable(self, now: float) -> None:
        pass

    def closed(self, how: Closed, now: float) -> None:
        self.how = how
        carrier = self._carrier
        carrier.forget(self)
        poller = carrier.engine.poller
        if carrier.offload.spare(self._sock):
            poller.unwatch(self._fd)
        else:
            poller.closing(self._fd)
            os.close(self._sock.detach())
        self._on_closed(self)

    # As TcpRelay.

    def ready(self, mask: int) -> None:
        """A poller's handler: somebody destroyed the socket (ss -K, or we when its address is gone)."""
        if mask & ENDED and self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.cut(self._carrier.engine.now(), Closed.ABORTED)
            self._carrier.engine.send()

    def is_idle(self, before: float) -> bool:
        """Nothing went either way since then, and nothing is on its way."""
        progress = self._carrier.offload.read(self.place)
        self.take_note(progress)
        arrived = progress.acknowledged == progress.nxt and progress.expected == progress.received
        return self._conn.last_data <= before and progress.heard and arrived

    def finish(self, now: float) -> None:
        """Say to both ends that no more will come. To be called until it is closed; it is not said all the time."""
        if now - self._finished < _FIN_AGAIN:
            return
        self._finished = now
        stamps = self._carrier.offload.finish(self.place)
        self._conn.say_fin(stamps)

    def keep_alive(self, interval: int) -> None:
        """That is for the two ends to do."""

    # The kernel's side.

    def refresh(self) -> None:
        """Have the connection know what was carried so far."""
        self.take_note(self._carrier.offload.read(self.place))

    def take_note(self, progress: Progress) -> None:
        """As `refresh`, of what was read already."""
        conn = self._conn
        conn.catch_up(
            progress.down,
            progress.up,
            progress.acknowledged or conn.tx.una,
            progress.nxt or conn.tx.nxt,
            progress.received or conn.rx.nxt,
            self.since(progress),
        )

    def since(self, progress: Progress) -> float:
        """When something went either way last."""
        return progress.last or self._started

    def is_heard(self, now: float) -> bool:
        """Whether the client has said anything. Answers it again when it is time to, and gives it up in the end."""
        if self._carrier.offload.is_heard(self.place):
            self._conn.heard()
            return True
        age = now - self._started
        if age >= _GIVEN_UP:
            self.cut(now, Closed.TIMED_OUT)
        elif self.repeated < len(_REPEATS) and age >= _REPEATS[self.repeated]:
            self.repeated += 1
            self._conn.repeat_answer()
        return self._conn.is_closed

    def too_big(self, number: int, mtu: int, now: float) -> None:
        """The client's segment `number` does not fit into the way to the proxy, which takes `mtu` bytes."""
        self._carrier.engine.stack.send_too_big(self._conn.key, number, mtu, now)

    def cut(self, now: float, how: Closed) -> None:
        """Reset both ends."""
        self.refresh()
        self._carrier.offload.reset(self.place)
        self._carrier.forget(self)  # or the client's answer would go to the proxy
        self._conn.abort(now, how)

    @property
    def key(self) -> bytes:
        """See ztun.stack.header.FlowKey."""
        return self._conn.key

    def conclude(self, how: Closed, now: float) -> None:
        """Both ends know that it is over."""
        self._conn.heard()
        self._conn.conclude(how, now)


class Carrier:
    """The flows that the kernel carries. tcp_idle: seconds."""

    def __init__(self, engine: Engine, offload: Offload, tcp_idle: float) -> None:
        self.engine = engine
        self.offload = offload
        self.total = 0
        self._tcp_idle = tcp_idle
        self._idle_looks = max(round(min(tcp_idle / 4, _LONGEST) / _INTERVAL), 1)
        self._relays: dict[int, KernelRelay] = {}
        self._unheard: dict[int, KernelRelay] = {}
        self._reset: dict[int, KernelRelay] = {}  # one end reset them, as it seems
        self._timer: asyncio.TimerHandle | None = None
        self._looks = 0
        engine.stack.settle = self._settle_one

    def start(self) -> None:
        for descriptor in self.offload.descriptors:
            self.engine.poller.watch_level(descriptor, functools.partial(self._read_errors, descriptor))

    def __len__(self) -> int:
        return len(self._relays)

    def take(
        self,
        conn: Connection,
        sock: socket.socket,
        address: str,
        port: int,
        unread: int,
        on_closed: Callable[[KernelRelay], None],
    ) -> KernelRelay | None:
        """Have the kernel carry a connection that waits for its answer, and answer it. None: it cannot be.

        address, port, unread: see ztun.ports.Offload.take.
        """
        now = self.engine.now()
        found = self.offload.take(sock, address, port, unread, conn.offer(), conn.stamp(now))
        if found is None:
            return None
        place, terms = found
        relay = KernelRelay(self, conn, sock, place, on_closed)
        self._relays[place] = self._unheard[place] = relay
        self.total += 1
        conn.hand_over(relay, terms, now)
        if self._timer is None:
            self._timer = self.engine.loop.call_later(_INTERVAL, self._look)
        return relay

    def forget(self, relay: KernelRelay) -> None:
        """The kernel carries it no longer. Idempotent."""
        if not relay.released:
            relay.released = True
            self.offload.release([relay.place])
            self._strike(relay)

    def settle(self) -> None:
        """Conclude those that are over."""
        over: list[tuple[KernelRelay, Closed]] = []
        read, relays = self.offload.read, self._relays
        doubtful, self._reset = self._reset, {}
        for place in {*self.offload.ended(), *doubtful}:
            relay = relays.get(place)
            if relay is None:
                continue
            progress = read(place)
            how = self._how(relay, progress)
            if how is not None:
                relay.take_note(progress)
                over.append((relay, how))
        if over:
            self._conclude(over)

    def _conclude(self, over: list[tuple[KernelRelay, Closed]]) -> None:
        """The kernel first: an end that is known here may be followed by another beginning."""
        now = self.engine.now()
        self.offload.release([relay.place for relay, _ in over])
        for relay, _ in over:
            relay.released = True
            self._strike(relay)
        for relay, how in over:
            relay.conclude(how, now)

    def _settle_one(self, conn: FlowKey) -> None:
        """Somebody begins anew where this one is. With that, a reset is believed at once."""
        self.settle()
        for relay in self._reset.values():
            if relay.key == conn.key:
                self._conclude([(relay, self._how_reset(relay))])
                return

    def stop(self) -> None:
        """Reset all of them."""
        for descriptor in self.offload.descriptors:
            self.engine.poller.unwatch(descriptor)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.settle()
        now = self.engine.now()
        for relay in list(self._relays.values()):
            relay.cut(now, Closed.ABORTED)

    def _strike(self, relay: KernelRelay) -> None:
        del self._relays[relay.place]
        self._unheard.pop(relay.place, None)
        self._reset.pop(relay.place, None)

    def _how(self, relay: KernelRelay, progress: Progress) -> Closed | None:
        """How it ended; None when it did not. A reset is believed when nothing was said after it: its receiver does
        not take just any (RFC 5961 section 3), and goes on then."""
        if not progress.over:
            return None  # news of who was at this place before
        if not progress.reset:
            return Closed.FINISHED
        if relay.packets != progress.packets:
            relay.packets = progress.packets
            self._reset[relay.place] = relay
            return None
        return self._how_reset(relay)

    def _how_reset(self, relay: KernelRelay) -> Closed:
        by_client = self.offload.read(relay.place).reset == "client"
        return Closed.RESET_BY_CLIENT if by_client else Closed.ABORTED

    def _read_errors(self, descriptor: int, mask: int) -> None:
        """Pass on to the client what a router says of its segments."""
        now = self.engine.now()
        for place, number, mtu in self.offload.too_big(descriptor):
            relay = self._relays.get(place)
            if relay is not None:
                relay.too_big(number, mtu, now)
        self.engine.send()

    def _look(self) -> None:
        self._timer = None
        self._looks += 1
        now = self.engine.now()
        try:
            self.settle()
            self._look_at_unheard(now)
            if self._looks % self._idle_looks == 0:
                self._look_at_idle(now)
            self.engine.send()
        finally:
            if self._relays and self._timer is None:
                self._timer = self.engine.loop.call_later(_INTERVAL, self._look)

    def _look_at_unheard(self, now: float) -> None:
        for place, relay in list(self._unheard.items()):
            if relay.is_heard(now):
                self._unheard.pop(place, None)

    def _look_at_idle(self, now: float) -> None:
        before = now - self._tcp_idle
        for place, relay in list(self._relays.items()):
            progress = self.offload.read(place)
            if progress.over:
                self._reset[place] = relay  # the kernel had no room to tell
            elif relay.since(progress) <= before:
                relay.cut(now, Closed.TIMED_OUT)
