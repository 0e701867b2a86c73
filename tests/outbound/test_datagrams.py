"""Datagrams without a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from ztun.outbound.base import Resolve
from ztun.outbound.direct import DirectOutbound
from ztun.ports import Destination, Failure, OutboundError

from . import netns
from .links import Link, echo
from .netns import ROUTER4, ROUTER6, Namespace
from .support import DEADLINE, MARK, Sockets, nobody, outbound, table, tools, until


@pytest.fixture
def seen() -> Link:
    return Link()


def ports_of(sockets: Sockets) -> list[int]:
    return [sock.getsockname()[1] for sock in sockets.made]


async def test_there_and_back_over_both_families(sockets: Sockets, seen: Link) -> None:
    way = outbound(sockets, "direct")
    link = await seen.open(way)
    with echo() as four, echo("::1") as six:
        link.send(Destination(*four), b"one")
        link.send(Destination(*six), memoryview(b"two"))
        await until(lambda: len(seen.heard) == 2)
    assert sorted(seen.heard) == sorted([(*four, b"one"), (*six, b"two")])
    assert [sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) for sock in sockets.made] == [MARK, MARK]
    assert way.statistics()["datagram_links"] == 1
    link.close()
    assert way.statistics()["datagram_links"] == 0


async def test_one_endpoint_for_all_destinations_and_open_to_strangers(sockets: Sockets, seen: Link) -> None:
    """Endpoint-independent mapping and filtering (RFC 4787, REQ-1 and REQ-8)."""
    link = await seen.open(outbound(sockets, "direct"))
    with echo() as one, echo() as two, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        link.send(Destination(*one), b"a")
        link.send(Destination(*two), b"b")
        await until(lambda: len(seen.heard) == 2)
        (port,) = ports_of(sockets)
        stranger.bind(("127.0.0.1", 0))
        stranger.sendto(b"hello", ("127.0.0.1", port))
        await until(lambda: len(seen.heard) == 3)
        assert seen.heard[2] == (*stranger.getsockname(), b"hello")
    link.close()


async def test_a_name_is_resolved_once_and_answers_bear_it(sockets: Sockets, seen: Link) -> None:
    asked = []

    async def resolve(name: str) -> list[str]:
        asked.append(name)
        await asyncio.sleep(0.01)
        return ["127.0.0.1"]

    link = await seen.open(outbound(sockets, "direct", resolve=resolve))
    with echo() as (_, port):
        to = Destination("echo.example", port)
        for payload in (b"1", b"2", b"3"):
            link.send(to, payload)
        await until(lambda: len(seen.heard) == 3)
        link.send(to, b"4")
        await until(lambda: len(seen.heard) == 4)
    assert seen.heard == [("echo.example", port, payload) for payload in (b"1", b"2", b"3", b"4")]
    assert asked == ["echo.example"]
    link.close()


async def test_waiting_for_a_name_is_bounded(sockets: Sockets, seen: Link) -> None:
    way = outbound(sockets, "direct", resolve=table(echo_example=["127.0.0.1"]))
    link = await seen.open(way)
    with echo() as (_, port):
        for number in range(20):
            link.send(Destination("echo.example", port), b"%d" % number)
        await until(lambda: len(seen.heard) == 16)
    assert way.drops == {"name pending": 4}
    link.close()


async def test_a_name_that_does_not_exist(sockets: Sockets, seen: Link) -> None:
    link = await seen.open(outbound(sockets, "direct", resolve=table()))
    link.send(Destination("none.example", 9), b"x")
    await until(lambda: seen.unreachable)
    assert seen.unreachable == [(Destination("none.example", 9), Failure.NAME_NOT_FOUND)]
    link.close()


async def test_a_link_that_is_closed_while_a_name_is_resolved(sockets: Sockets, seen: Link) -> None:
    link = await seen.open(outbound(sockets, "direct", resolve=table(echo_example=["127.0.0.1"])))
    link.send(Destination("echo.example", 9), b"x")
    link.close()
    await asyncio.sleep(0.02)
    link.send(Destination("127.0.0.1", 9), b"x")
    assert not sockets.made
    assert not seen.unreachable


async def test_datagrams_of_every_size_and_what_is_too_long(sockets: Sockets, seen: Link) -> None:
    way = outbound(sockets, "direct")
    link = await seen.open(way)
    with echo() as address:
        for size in (0, 1, 1472, 9000, 65507, 65508):
            link.send(Destination(*address), b"x" * size)
            await asyncio.sleep(0.005)
        await until(lambda: len(seen.heard) == 5)
    assert [len(payload) for _, _, payload in seen.heard] == [0, 1, 1472, 9000, 65507]
    assert way.drops == {"too long": 1}
    link.close()


async def test_a_burst_is_read_in_turns(sockets: Sockets, seen: Link) -> None:
    """The rest of the loop gets its turn between two batches."""
    link = await seen.open(outbound(sockets, "direct"))
    with echo() as address:
        link.send(Destination(*address), b"x")
        await until(lambda: seen.heard)
        (port,) = ports_of(sockets)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            for _ in range(200):
                flood.sendto(b"y", ("127.0.0.1", port))
        batches = []
        while len(seen.heard) < 201:
            before = len(seen.heard)
            await asyncio.sleep(0)
            batches.append(len(seen.heard) - before)
        assert max(batches) == 64
    link.close()


async def test_a_handler_may_close_the_link(sockets: Sockets) -> None:
    heard = []

    def on_datagram(host: str, port: int, payload: memoryview, size: int) -> None:
        heard.append(bytes(payload))
        link.close()

    link = await outbound(sockets, "direct").open_datagrams(on_datagram, lambda _: None)
    with echo() as address:
        link.send(Destination(*address), b"1")
        link.send(Destination(*address), b"longer: another run")
        await until(lambda: heard)
        await asyncio.sleep(0.02)
    assert heard == [b"1"]


def direct(client: Sockets, resolve: Resolve = nobody) -> DirectOutbound:
    return DirectOutbound(tools(client, resolve, DEADLINE))


@pytest.mark.parametrize(
    ("host", "failure"),
    [
        (ROUTER4, Failure.REFUSED),
        (ROUTER6, Failure.REFUSED),
        (netns.UNREACHABLE4, Failure.HOST_UNREACHABLE),
        (netns.UNREACHABLE6, Failure.HOST_UNREACHABLE),
        (netns.PROHIBITED6, Failure.PROHIBITED),
    ],
)
async def test_icmp_errors_are_told_and_the_link_lives_on(
    client: Sockets, router: Namespace, seen: Link, host: str, failure: Failure
) -> None:
    link = await seen.open(direct(client))
    to = Destination(host, 9)
    own = ROUTER6 if ":" in host else ROUTER4
    with echo(own, router.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)) as address:
        for round_ in range(1, 4):
            link.send(to, b"x")
            await until(lambda count=round_: len(seen.unreachable) == count)  # type: ignore[misc]
            link.send(Destination(*address), b"hello")
            await until(lambda count=round_: len(seen.heard) == count)  # type: ignore[misc]
    assert seen.unreachable == [(to, failure)] * 3
    assert seen.heard == [(*address, b"hello")] * 3
    assert not seen.died
    link.close()


async def test_without_a_handler_the_next_send_to_that_destination_raises(
    client: Sockets, router: Namespace, seen: Link
) -> None:
    link = await seen.open(direct(client), tell=False)
    with echo(ROUTER4, router.socket(socket.AF_INET, socket.SOCK_DGRAM)) as address:
        link.send(Destination(ROUTER4, 9), b"x")
        await asyncio.sleep(0.05)
        link.send(Destination(*address), b"hello")
        with pytest.raises(OutboundError) as caught:
            link.send(Destination(ROUTER4, 9), b"x")
        assert caught.value.failure is Failure.REFUSED
        link.send(Destination(ROUTER4, 9), b"x")
        await until(lambda: seen.heard)
    link.close()


async def test_the_news_of_one_destination_does_not_cost_another_its_datagram(
    client: Sockets, router: Namespace, seen: Link
) -> None:
    """A pending ICMP error is what the kernel answers the next send with, whomever it is for."""
    link = await seen.open(direct(client))
    with echo(ROUTER4, router.socket(socket.AF_INET, socket.SOCK_DGRAM)) as address:
        for number in range(10):
            link.send(Destination(ROUTER4, 9), b"x")
            link.send(Destination(*address), b"%d" % number)
        await until(lambda: len(seen.heard) == 10)
    assert seen.unreachable == [(Destination(ROUTER4, 9), Failure.REFUSED)] * 10
    link.close()


@pytest.mark.parametrize("host", [netns.NO_ROUTE4, netns.NO_ROUTE6])
async def test_no_route_is_told_at_once(client: Sockets, seen: Link, host: str) -> None:
    link = await seen.open(direct(client))
    with pytest.raises(OutboundError) as caught:
        link.send(Destination(host, 9), b"x")
    assert caught.value.failure is Failure.NETWORK_UNREACHABLE
    link.close()


async def test_a_name_goes_to_the_address_that_has_a_route(client: Sockets, router: Namespace, seen: Link) -> None:
    link = await seen.open(direct(client, table(dual_example=[netns.NO_ROUTE4, ROUTER6])))
    with echo(ROUTER6, router.socket(socket.AF_INET6, socket.SOCK_DGRAM)) as (_, port):
        link.send(Destination("dual.example", port), b"x")
        await until(lambda: seen.heard)
    assert seen.heard == [("dual.example", port, b"x")]
    link.close()


async def test_fragmentation_needed_is_no_failure(client: Sockets, cable: tuple[Namespace, Namespace]) -> None:
    """The router's next link takes 1280 bytes; the datagram that was too long for it is lost, the next one is not."""
    near, router = cable
    netns.run(f"ip -n {near.name} route flush cache")
    netns.run(f"ip -n {router.name} link add narrow type veth peer name end")
    try:
        for command in ("set narrow mtu 1280 up", "set end mtu 1280 up"):
            netns.run(f"ip -n {router.name} link {command}")
        netns.run(f"ip -n {router.name} address add 10.96.7.1/24 dev narrow")
        netns.run(f"ip -n {router.name} neigh add 10.96.7.2 lladdr 02:00:00:00:00:01 dev narrow")
        seen = Link()
        link = await seen.open(direct(client))
        link.send(Destination("10.96.7.2", 9), b"x" * 1400)
        await asyncio.sleep(0.05)
        assert "mtu 1280" in netns.output(f"ip -n {near.name} route get 10.96.7.2")
        link.send(Destination("10.96.7.2", 9), b"x" * 1400)
        await asyncio.sleep(0.05)
        assert not seen.unreachable
        link.close()
    finally:
        netns.run(f"ip -n {router.name} link del narrow")


async def test_block_and_a_closed_outbound(sockets: Sockets, seen: Link) -> None:
    with pytest.raises(OutboundError) as caught:
        await seen.open(outbound(sockets, "block"))
    assert caught.value.failure is Failure.PROHIBITED
    way = outbound(sockets, "direct")
    link = await seen.open(way)
    with contextlib.suppress(OutboundError):
        link.send(Destination("127.0.0.1", 9), b"x")
    await way.close()
    sockets.check()
