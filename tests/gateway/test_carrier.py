"""Flows that the kernel carries, looked after by the gateway: the kernel is a fake, time is data."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from ztun.gateway.engine import Engine
from ztun.gateway.offload import Carrier, KernelRelay
from ztun.ports import Progress
from ztun.stack import BufferPool, Closed, Connection, Datagram, Stack, StackSettings, State
from ztun.wire import tcp, vnet
from ztun.wire.handshake import Offer, Terms

KEY = bytes([10, 0, 0, 7, 192, 0, 2, 1]) + (40000).to_bytes(2, "big") + (80).to_bytes(2, "big")
SILENT = Progress(0, 0, False, False, "", 0, 0.0, 0, 0, 0, 0)
FIN, RST, ACK = tcp.FIN, tcp.RST, tcp.ACK


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call = call

    def cancel(self) -> None:
        self.when = float("inf")


class Poller:
    """Notes whom it would tell."""

    def __init__(self) -> None:
        self.handlers: dict[int, Any] = {}
        self.levels: dict[int, Any] = {}

    def hand_over(self, fd: int, handler: Any) -> None:
        self.handlers[fd] = handler

    def closing(self, fd: int) -> None:
        del self.handlers[fd]

    def watch_level(self, fd: int, handler: Any) -> None:
        self.levels[fd] = handler

    def unwatch(self, fd: int) -> None:
        del (self.levels if fd in self.levels else self.handlers)[fd]

    def pulse(self) -> None: ...


class FakeKernel:
    """A ztun.ports.Offload of which the test says how far each connection is."""

    descriptors: Sequence[int] = (77,)
    spares = None

    def __init__(self) -> None:
        self.progress: dict[int, Progress] = {}
        self.news: list[int] = []
        self.said: list[str] = []
        self.errors: list[tuple[int, int, int]] = []
        self.takes = True
        self.keeps = False
        self.spared: list[socket.socket] = []

    def take(
        self, sock: socket.socket, address: str, port: int, unread: int, offer: Offer, stamp: int
    ) -> tuple[int, Terms] | None:
        if not self.takes:
            return None
        place = len(self.progress)
        self.progress[place] = SILENT
        return place, Terms(9001, 1400, 7, True, offer.stamp is not None, 65535)

    def ended(self) -> list[int]:
        news, self.news = self.news, []
        return news

    def read(self, place: int) -> Progress:
        return self.progress[place]

    def is_heard(self, place: int) -> bool:
        return self.progress[place].heard

    def release(self, places: Sequence[int]) -> None:
        self.said += [f"release {place}" for place in places]

    def spare(self, sock: socket.socket) -> bool:
        self.spared += [sock] if self.keeps else []
        return self.keeps

    def reset(self, place: int) -> None:
        self.said.append(f"reset {place}")

    def finish(self, place: int) -> tuple[int, int] | None:
        self.said.append(f"finish {place}")
        return None

    def too_big(self, descriptor: int) -> list[tuple[int, int, int]]:
        return self.errors

    def follow(self, ways: Any) -> None: ...


class World:
    """An engine on a device that notes what is sent, with a clock and a loop that the test turns. It is all of these,
    and the stack's Listener too."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.timers: list[Timer] = []
        self.sent: list[bytes] = []
        self.poller = Poller()
        pool = BufferPool()
        self.stack = Stack(self, StackSettings(), lambda key, now: 5000, pool)
        self.engine = Engine(self, self.poller, self, self.stack, pool)  # type: ignore[arg-type]
        self.engine.now = lambda: self.time
        self.kernel = FakeKernel()
        self.conn: Connection
        self.ends: list[Closed] = []
        self.carrier = Carrier(self.engine, self.kernel, 100.0)
        self.carrier.start()

    # A device, and a loop.

    def send(self, pieces: Sequence[bytes]) -> bool:
        self.sent.append(b"".join(pieces))
        return True

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        return self.call_later(when - self.time, call)

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.time + seconds, call))
        return self.timers[-1]

    def waits(self, seconds: float) -> None:
        end = self.time + seconds
        while due := [timer for timer in self.timers if timer.when <= end]:
            timer = min(due, key=lambda each: each.when)
            self.timers.remove(timer)
            self.time = timer.when
            timer.call()
        self.time = end

    # A stack's Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        self.conn = conn

    def udp_received(self, datagram: Datagram, now: float) -> None: ...

    def udp_refused(self, key: bytes, now: float) -> None: ...

    def echo_requested(self, destination: bytes, now: float) -> bool:
        return False

    # What a test makes happen.

    def syn(self, number: int = 100) -> None:
        options = tcp.pack_options(tcp.Options(mss=1460, window_scale=7, sack_permitted=True, timestamps=(1, 0)))
        segment = KEY[-4:] + number.to_bytes(4, "big") + bytes(4)
        segment += ((20 + len(options)) << 10 | tcp.SYN).to_bytes(2, "big") + b"\xff\xff" + bytes(4) + options
        head = bytes([0x45, 0, 0, 20 + len(segment), 0, 0, 0x40, 0, 64, 6, 0, 0]) + KEY[:8]
        packet = vnet.pack(vnet.NEEDS_CSUM) + head + segment
        self.stack.receive(memoryview(packet), self.time)
        self.stack.flush(self.time)

    def opens(self) -> KernelRelay:
        """A client's SYN, an outbound that connects, and the kernel that takes over."""
        self.syn()
        relay = self.carrier.take(self.conn, socket.socket(), "", 0, 0, lambda relay: self.ends.append(relay.how))
        assert relay is not None
        assert self.heard() == ["SYN"]
        return relay

    def heard(self) -> list[str]:
        """What was said to the client: the flag of each segment, or ICMP."""
        names = []
        self.engine.send()
        for sent in self.sent:
            packet = sent[vnet.LENGTH :]
            flags = packet[33]
            names.append("ICMP" if packet[9] == 1 else "RST" if flags & RST else "FIN" if flags & FIN else "SYN")
        self.sent.clear()
        return names

    def is_at(self, place: int, **facts: Any) -> None:
        self.kernel.progress[place] = self.kernel.progress[place]._replace(**facts)


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.carrier.stop()
    assert not made.poller.handlers, "a socket is still watched"
    assert not made.poller.levels


def talks(world: World, place: int = 0, packets: int = 5) -> None:
    world.is_at(
        place, heard=True, packets=packets, last=world.time, up=10, down=20,
        acknowledged=9021, nxt=9021, expected=111, received=111,
    )  # fmt: skip


def test_a_flow_that_both_ends_closed_is_over_within_a_moment(world: World) -> None:
    relay = world.opens()
    talks(world)
    world.waits(5.0)
    assert (len(world.carrier), world.ends) == (1, [])
    world.is_at(0, over=True)
    world.kernel.news = [0, 0]  # told twice, as two CPUs may
    world.waits(0.2)
    assert (len(world.carrier), world.ends, relay.how) == (0, [Closed.FINISHED], Closed.FINISHED)
    assert world.kernel.said == ["release 0"]
    assert world.heard() == []
    assert (world.conn.received, world.conn.sent) == (10, 20)
    assert not world.stack.connections


def test_an_end_that_the_kernel_had_no_room_to_tell_of_is_found(world: World) -> None:
    world.opens()
    talks(world)
    world.is_at(0, over=True)
    world.waits(40.0)
    assert world.ends == [Closed.FINISHED]


def test_news_of_who_was_there_before_is_no_news(world: World) -> None:
    world.opens()
    talks(world)
    world.kernel.news = [0, 9]
    world.waits(1.0)
    assert len(world.carrier) == 1


@pytest.mark.parametrize(("by", "how"), [("client", Closed.RESET_BY_CLIENT), ("proxy", Closed.ABORTED)])
def test_a_reset_is_believed_when_nothing_is_said_after_it(world: World, by: str, how: Closed) -> None:
    """RFC 5961 section 3: its receiver does not believe every one, and goes on then."""
    world.opens()
    talks(world, packets=5)
    world.is_at(0, over=True, reset=by)
    world.kernel.news = [0]
    for packets in (6, 7, 8):
        world.waits(0.05)
        world.is_at(0, packets=packets)
        assert world.ends == []
    world.waits(0.3)
    assert world.ends == [how]


def test_a_client_that_begins_anew_makes_a_reset_believed(world: World) -> None:
    world.opens()
    talks(world)
    first = world.conn
    world.is_at(0, over=True, reset="client")
    world.kernel.news = [0]
    world.syn(number=70_000)
    assert world.ends == [Closed.RESET_BY_CLIENT]
    assert world.conn is not first
    assert world.conn.state is State.DIALING


def test_a_client_that_is_not_heard_is_answered_again_and_given_up_in_the_end(world: World) -> None:
    """RFC 6298 section 5: after a second, then after twice as long each time."""
    world.opens()
    for seconds in (1.5, 2.0, 4.0, 8.0, 16.0):
        world.waits(seconds)
        assert world.heard() == ["SYN"]
    world.waits(40.0)
    assert world.ends == [Closed.TIMED_OUT]
    assert world.heard()[-1] == "RST"
    assert world.kernel.said == ["reset 0", "release 0"]


def test_a_client_that_is_heard_is_not_answered_again(world: World) -> None:
    world.opens()
    talks(world)
    world.waits(70.0)
    assert world.heard() == []
    assert len(world.carrier) == 1


def test_who_is_silent_for_too_long_is_reset_both_ways(world: World) -> None:
    world.opens()
    world.waits(1.0)
    talks(world)
    world.waits(90.0)
    assert world.ends == []
    world.waits(40.0)
    assert world.ends == [Closed.TIMED_OUT]
    assert world.kernel.said == ["reset 0", "release 0"]
    assert world.heard() == ["RST"]


def test_an_idle_flow_is_told_that_no_more_will_come_and_told_again(world: World) -> None:
    relay = world.opens()
    talks(world)
    world.waits(2.0)
    assert relay.is_idle(world.time - 1.0)
    for _ in range(6):
        relay.finish(world.time)
        world.time += 0.1
    assert (world.heard(), world.kernel.said) == (["FIN", "FIN"], ["finish 0", "finish 0"])


@pytest.mark.parametrize("facts", [{"acknowledged": 9000}, {"expected": 100}, {"heard": False}])
def test_a_flow_with_something_on_its_way_is_not_idle(world: World, facts: dict[str, Any]) -> None:
    relay = world.opens()
    talks(world)
    world.is_at(0, **facts)
    world.waits(2.0)
    assert not relay.is_idle(world.time - 1.0)


def test_a_router_that_takes_less_is_told_of_to_the_client(world: World) -> None:
    world.opens()
    talks(world)
    world.kernel.errors = [(0, 105, 1300), (7, 1, 1300)]  # the second is about a flow that is gone
    world.poller.levels[77](1)
    assert world.heard() == ["ICMP"]


def test_a_socket_that_is_destroyed_ends_its_flow(world: World) -> None:
    relay = world.opens()
    talks(world)
    [handler] = world.poller.handlers.values()
    handler(0x2000)  # only a hint, and nothing is wrong
    assert world.ends == []
    relay._sock.setblocking(False)
    relay._sock.connect_ex(("127.0.0.1", 1))  # refused: an error to be read
    handler(0x2018)
    assert world.ends == [Closed.ABORTED]
    assert world.heard() == ["RST"]


def test_when_ztun_stops_all_are_reset(world: World) -> None:
    world.opens()
    talks(world)
    world.carrier.stop()
    assert world.ends == [Closed.ABORTED]
    assert world.heard() == ["RST"]
    world.carrier.start()


def test_a_socket_that_may_be_used_again_is_watched_no_more_and_stays_open(world: World) -> None:
    world.kernel.keeps = True
    relay = world.opens()
    talks(world)
    world.is_at(0, over=True)
    world.kernel.news = [0]
    world.waits(0.1)
    assert world.ends == [Closed.FINISHED]
    (kept,) = world.kernel.spared
    assert kept.fileno() == relay._fd
    assert not world.poller.handlers
    kept.close()


def test_what_the_kernel_does_not_take_is_left_to_the_relay(world: World) -> None:
    world.kernel.takes = False
    world.syn()
    with socket.socket() as sock:
        assert world.carrier.take(world.conn, sock, "", 0, 0, lambda relay: None) is None
    assert world.conn.state is State.DIALING
    assert not world.timers


def test_without_flows_nobody_looks(world: World) -> None:
    world.opens()
    world.is_at(0, heard=True, over=True, packets=1)
    world.kernel.news = [0]
    world.waits(1.0)
    assert not [timer for timer in world.timers if timer.when < float("inf")]
