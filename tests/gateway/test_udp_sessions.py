"""UDP sessions whose link to the proxy does not come about, dies, or dies again and again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from udp_world import SITE, Device, datagram

from ztun import platform
from ztun.gateway import udp_session
from ztun.gateway.engine import Engine
from ztun.gateway.limits import Limits
from ztun.gateway.routing import Route, text
from ztun.gateway.udp_relay import UdpRelay
from ztun.ports import Buffer, Destination, Failure, OutboundError
from ztun.stack import BufferPool, Datagram, Stack, StackSettings
from ztun.wire import ip, vnet

UNREACHABLE = OutboundError(Failure.PROXY_UNREACHABLE, "nobody listens")
UNSUPPORTED = OutboundError(Failure.UNSUPPORTED, "it does not support the command")
DIED = OutboundError(Failure.PROXY_FAILED, "it ended the association")
OTHER_SITE = bytes([192, 0, 2, 8])
HOST, PORT = (3, 1), (3, 3)  # ICMP type and code


class Link:
    """A DatagramLink that keeps what it is to send, and dies when a test says so."""

    def __init__(self, on_failure: Callable[[OutboundError], None]) -> None:
        self._on_failure = on_failure
        self.sent: list[bytes] = []
        self.closed = False

    def send_run(self, destination: Destination, payloads: Sequence[Buffer]) -> None:
        self.sent += map(bytes, payloads)

    def die(self) -> None:
        self.close()
        self._on_failure(DIED)

    def close(self) -> None:
        self.closed = True


class World:
    """A relay between a device in memory and an outbound that does as `answers` says: None grants a link."""

    tag, type, tags = "socks", "socks5", ("socks",)

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.device = Device()
        pool = BufferPool()
        self.stack = Stack(self, StackSettings(), lambda key, now: 1, pool)
        self.engine = Engine(self.loop, platform.poller_of(self.loop), self.device, self.stack, pool)
        self.relay = UdpRelay(self.engine, self, self, 300.0, Limits(), lambda datagram: None)  # type: ignore[arg-type]
        self.answers: list[OutboundError | None] = []
        self.asked: list[float] = []
        self.links: list[Link] = []
        self.refusal: OutboundError | None = None

    # Router, outbound and listener.

    def route(self, protocol: str, source: bytes, address: bytes, port: int) -> Route:
        return Route(self, Destination(text(address), port), 0, False)  # type: ignore[arg-type]

    def refuse_datagrams(self) -> OutboundError | None:
        return self.refusal

    async def open_datagrams(self, on_datagram: Any, on_failure: Any, on_unreachable: Any) -> Link:
        self.asked.append(self.loop.time())
        await asyncio.sleep(0.002)
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.links.append(Link(on_failure))
        return self.links[-1]

    def udp_received(self, datagram: Datagram, now: float) -> None:
        self.relay.receive(datagram, now)

    # What a test does.

    def client_says(self, *payloads: bytes, site: bytes = SITE, source_port: int = 4000) -> None:
        self.device.said += [datagram(payload, site=site, source_port=source_port) for payload in payloads]
        self.engine._readable(1)

    def errors(self) -> list[tuple[tuple[int, int], bytes]]:
        """(type and code, destination of the packet that is quoted) of the ICMP errors that the client got."""
        found = []
        for packet in self.device.written:
            packet = packet[vnet.LENGTH :]
            if packet[9] == ip.ICMP:
                found.append(((packet[20], packet[21]), packet[28 + 16 : 28 + 20]))
        return found

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.002)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    it = World()
    yield it
    it.relay.close()
    assert all(link.closed for link in it.links)
    assert it.relay.waiting_bytes == 0


@asynccontextmanager
async def opened() -> AsyncIterator[World]:
    """One datagram has passed, so that there is a session with a link."""
    async with world() as it:
        it.client_says(b"first")
        await it.until(lambda: it.links and it.links[0].sent == [b"first"])
        yield it


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_session, "_FIRST_PAUSE", 0.02)


async def test_the_next_datagram_opens_another_link_for_the_same_session() -> None:
    async with opened() as it:
        it.links[0].die()
        await asyncio.sleep(0.05)
        assert len(it.asked) == 1  # nobody sends, so nobody needs one
        assert [flow["state"] for _, flow in it.relay.describe(0.0)] == ["waiting"]
        it.client_says(b"second", b"third")
        assert [flow["state"] for _, flow in it.relay.describe(0.0)] == ["dialling"]
        await it.until(lambda: len(it.links) == 2 and it.links[1].sent)
        it.client_says(b"fourth")
        assert it.links[1].sent == [b"second", b"third", b"fourth"]
        assert [flow["state"] for _, flow in it.relay.describe(0.0)] == ["open"]
        assert (len(it.relay), it.relay.total, it.relay.rebuilt) == (1, 1, 1)
        assert it.errors() == []


async def test_one_link_is_asked_for_however_much_waits_and_the_rest_is_counted() -> None:
    async with opened() as it:
        it.links[0].die()
        it.client_says(*(b"%d" % number for number in range(40)))
        await it.until(lambda: len(it.links) == 2 and it.links[1].sent)
        assert it.links[1].sent == [b"%d" % number for number in range(32)]
        assert it.stack.drops["udp-waiting"] == 8
        assert len(it.asked) == 2


async def test_links_that_die_at_once_are_asked_for_less_and_less() -> None:
    async with opened() as it:
        for number in range(1, 6):
            it.links[-1].die()
            it.client_says(b"again")
            await it.until(lambda count=number + 1: len(it.links) == count)  # type: ignore[misc]
        pauses = [later - earlier for earlier, later in zip(it.asked, it.asked[1:], strict=False)]
        assert all(pause >= 0.02 * 2**number for number, pause in enumerate(pauses))
        assert it.relay.rebuilt == 5


async def test_a_link_that_lasted_is_replaced_without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_session, "_FIRST_PAUSE", 60.0)
    monkeypatch.setattr(udp_session, "_STEADY", 0.0)
    async with opened() as it:
        for number in range(1, 4):
            it.links[-1].die()
            it.client_says(b"again")
            await it.until(lambda count=number + 1: len(it.links) == count)  # type: ignore[misc]


async def test_what_waits_is_sent_when_the_proxy_is_back() -> None:
    async with opened() as it:
        it.links[0].die()
        it.answers = [UNREACHABLE, UNREACHABLE, UNREACHABLE]
        it.client_says(b"patient")
        await it.until(lambda: len(it.links) == 2 and it.links[1].sent)
        assert it.links[1].sent == [b"patient"]
        assert len(it.asked) == 5
        assert it.errors() == []


async def test_what_waited_too_long_is_given_up_and_the_client_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(udp_session, "_MAX_WAIT", 0.0)
    async with opened() as it:
        it.links[0].die()
        it.answers = [UNREACHABLE]
        it.client_says(b"late")
        await it.until(it.errors)
        assert it.errors() == [(HOST, SITE)]
        assert it.stack.drops["udp-waiting"] == 1
        assert len(it.relay) == 1
        it.client_says(b"later")
        await it.until(lambda: len(it.links) == 2 and it.links[1].sent)
        assert it.links[1].sent == [b"later"]


async def test_a_proxy_that_will_not_again_ends_the_session() -> None:
    async with opened() as it:
        it.links[0].die()
        it.answers = [UNSUPPORTED]
        it.client_says(b"more")
        await it.until(it.errors)
        assert it.errors() == [(PORT, SITE)]
        assert len(it.relay) == 0
        assert not it.stack.udp_flows


async def test_everybody_who_waits_is_told_when_there_will_be_no_link() -> None:
    async with world() as it:
        it.answers = [UNSUPPORTED]
        it.client_says(b"one", b"two")
        it.client_says(b"three", site=OTHER_SITE)
        await it.until(it.errors)
        assert it.errors() == [(PORT, SITE), (PORT, OTHER_SITE)]
        assert len(it.relay) == 0


async def test_a_refusal_that_is_known_costs_neither_session_nor_question() -> None:
    async with world() as it:
        it.refusal = UNSUPPORTED
        it.client_says(b"quic?")
        assert it.errors() == [(PORT, SITE)]  # in the same turn of the loop
        assert (it.relay.total, it.asked) == (0, [])


async def test_a_session_that_works_is_none_of_its_business() -> None:
    async with opened() as it:
        it.refusal = UNSUPPORTED
        it.client_says(b"second")
        it.client_says(b"elsewhere", site=OTHER_SITE)
        assert it.links[0].sent == [b"first", b"second", b"elsewhere"]
        it.client_says(b"another client", source_port=4001)
        assert it.errors() == [(PORT, SITE)]


async def test_a_session_that_ends_while_it_waits_asks_for_nothing_more() -> None:
    async with opened() as it:
        it.links[0].die()
        it.client_says(b"second")
        it.relay.close()
        await asyncio.sleep(0.05)
        assert len(it.links) == 1
