"""What becomes of datagrams at a proxy: carried, refused, or sent past it; and of a proxy that cannot carry them."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from ztun.outbound.base import BaseOutbound
from ztun.outbound.verdict import Datagrams
from ztun.ports import Destination, Failure, OutboundError

from . import peers
from .links import Link, echo
from .scripted import Step, falls_silent, hears, proxy, says
from .support import DEADLINE, Sockets, outbound, table, until

HELLO = (hears(b"\x05\x01\x00"), says(b"\x05\x00"), hears(b"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"))


@pytest.fixture
def seen() -> Link:
    return Link()


async def fails(way: BaseOutbound, seen: Link) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        await seen.open(way)
    return caught.value


@pytest.mark.parametrize(
    ("type", "udp", "reason"),
    [
        ("http", None, "outbound it: an HTTP proxy carries no datagrams"),
        ("http", "reject", "outbound it: an HTTP proxy carries no datagrams"),
        ("socks5", "reject", 'outbound it: its "udp" is "reject"'),
    ],
)
async def test_rejected_without_asking_anybody(
    sockets: Sockets, seen: Link, type: str, udp: str | None, reason: str
) -> None:
    way = outbound(sockets, type, 9, udp=udp)  # type: ignore[arg-type]
    with capture_logs() as lines:
        for _ in range(3):
            refusal = way.refuse_datagrams()
            assert refusal is not None
            assert (refusal.failure, str(refusal)) == (Failure.UNSUPPORTED, reason)
        assert (await fails(way, seen)).failure is Failure.UNSUPPORTED
        way.forget_connections()  # the network is another one: this is as it was
        assert way.refuse_datagrams() is not None
    assert not sockets.made
    assert way.statistics()["udp"] == {"verdict": "reject", "opened": 0, "lost": 0, "refused": 4, "reason": reason}
    assert [(line["event"], line["outbound"], line["reason"]) for line in lines] == [
        ("datagrams are refused", "it", reason)
    ]


@pytest.mark.parametrize("type", ["http", "socks5"])
async def test_direct_datagrams_go_past_the_proxy_and_names_are_resolved_here(
    sockets: Sockets, seen: Link, type: str
) -> None:
    way = outbound(sockets, type, 9, udp="direct", resolve=table(four_example=["127.0.0.1"]))
    assert way.refuse_datagrams() is None
    link = await seen.open(way)
    with echo() as (host, port), echo() as (_, other):
        link.send(Destination(host, port), b"to an address")
        await until(lambda: seen.heard == [("127.0.0.1", port, b"to an address")])
        link.send(Destination("four.example", other), b"to a name")
        await until(lambda: seen.heard[1:] == [("four.example", other, b"to a name")])
    assert way.statistics()["udp"] == {"verdict": "direct", "opened": 1, "lost": 0, "refused": 0, "reason": None}
    link.close()


async def test_a_real_proxy_that_refuses_is_asked_once(sockets: Sockets, microsocks: int, seen: Link) -> None:
    way = outbound(sockets, "socks5", microsocks)
    assert way.refuse_datagrams() is None
    with capture_logs() as lines:
        first = await fails(way, seen)
        asked = len(sockets.made)
        again = way.refuse_datagrams()
        assert again is not None
        assert str(await fails(way, seen)) == str(again) == str(first)
    assert again.failure is first.failure is Failure.UNSUPPORTED
    assert "it does not support the command (UDP ASSOCIATE)" in str(first)
    assert len(sockets.made) == asked == 1
    assert way.statistics()["udp"]["refused"] == 1
    assert way.statistics()["udp"]["reason"] == str(first)
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["datagrams are refused"]


async def test_a_real_proxy_whose_rules_forbid_it_is_asked_once(
    sockets: Sockets, tmp_path_factory: pytest.TempPathFactory, seen: Link
) -> None:
    with peers.socks_without_udp(tmp_path_factory.mktemp("tcp_only")) as port:
        way = outbound(sockets, "socks5", port)
        assert (await fails(way, seen)).failure is peers.NO_UDP
        refusal = way.refuse_datagrams()
    assert refusal is not None
    assert "(UDP ASSOCIATE)" in str(refusal)
    assert len(sockets.made) == 1


async def test_another_network_another_try(sockets: Sockets, microsocks: int, seen: Link) -> None:
    way = outbound(sockets, "socks5", microsocks)
    await fails(way, seen)
    way.forget_connections()
    assert way.refuse_datagrams() is None
    await fails(way, seen)
    assert len(sockets.made) == 2


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([], id="closes the connection, as OpenSSH does"),
        pytest.param([says(b"\x05\x01\x00")], id="fails for a reason of its own"),
        pytest.param([falls_silent()], id="says nothing"),
    ],
)
async def test_a_proxy_that_never_granted_one_is_thought_unable(
    sockets: Sockets, seen: Link, steps: list[Step]
) -> None:
    async with proxy(*HELLO, *steps) as port:
        way = outbound(sockets, "socks5", port, deadline=DEADLINE)
        first = await fails(way, seen)
    assert first.failure is Failure.UNSUPPORTED
    refusal = way.refuse_datagrams()
    assert refusal is not None
    assert str(refusal) == str(first)


async def test_a_proxy_that_could_has_a_trouble_that_passes(sockets: Sockets, socks_udp: int, seen: Link) -> None:
    way = outbound(sockets, "socks5", socks_udp)
    (await seen.open(way)).close()
    async with proxy(*HELLO) as port:
        way._port = port  # type: ignore[attr-defined] # the same one, on a bad day
        assert (await fails(way, seen)).failure is Failure.PROXY_FAILED
    assert way.refuse_datagrams() is None


async def test_a_proxy_that_cannot_be_reached_says_nothing_about_datagrams(sockets: Sockets, seen: Link) -> None:
    way = outbound(sockets, "socks5", peers.free_port())
    assert (await fails(way, seen)).failure is Failure.PROXY_UNREACHABLE
    assert way.refuse_datagrams() is None


async def test_nor_does_one_that_wants_other_credentials(sockets: Sockets, microsocks_auth: int, seen: Link) -> None:
    way = outbound(sockets, "socks5", microsocks_auth, username="walter", password="wrong")
    assert (await fails(way, seen)).failure is Failure.PROXY_AUTHENTICATION
    assert way.refuse_datagrams() is None


async def test_a_link_that_dies_is_counted(
    sockets: Sockets, tmp_path_factory: pytest.TempPathFactory, seen: Link
) -> None:
    with peers.socks_udp(tmp_path_factory.mktemp("dying")) as port:
        way = outbound(sockets, "socks5", port)
        await seen.open(way)
    await until(lambda: seen.died)
    await asyncio.sleep(0)
    assert (way.statistics()["udp"]["opened"], way.statistics()["udp"]["lost"]) == (1, 1)


CLOSED = OutboundError(Failure.PROXY_FAILED, "it closed the connection")


def waits(it: Datagrams, now: float) -> int:
    """Whole seconds from `now` for which the proxy is left alone."""
    return next(wait for wait in range(1000) if it.refusal(now + wait) is None)


def test_what_a_proxy_says_is_remembered_for_five_minutes() -> None:
    it = Datagrams("it", "proxy")
    it.refuse(Failure.PROHIBITED, "said so", 1000.0)
    assert waits(it, 1000.0) == 300
    refusal = it.refusal(1001.0)
    assert refusal is not None
    assert (refusal.failure, str(refusal)) == (Failure.PROHIBITED, "said so")


def test_a_proxy_that_only_fails_to_is_left_alone_longer_and_longer() -> None:
    it, now, found = Datagrams("it", "proxy"), 0.0, []
    for _ in range(11):
        assert it.fail(CLOSED, now).failure is Failure.UNSUPPORTED
        found.append(waits(it, now))
        now += found[-1]
    assert found == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    it.forget()
    it.fail(CLOSED, now)
    assert waits(it, now) == 1  # another network: it begins anew


def test_many_that_fail_at_once_count_once() -> None:
    it = Datagrams("it", "proxy")
    for number in range(100):
        assert it.fail(CLOSED, 5.0 + number / 1000).failure is Failure.UNSUPPORTED
    assert waits(it, 5.0) == 1
    it.fail(CLOSED, 6.0)
    assert waits(it, 6.0) == 2


def test_a_proxy_that_could_has_half_a_minute_to_recover() -> None:
    it = Datagrams("it", "proxy")
    it.granted()
    for now in (100.0, 110.0, 129.9):
        assert it.fail(CLOSED, now) is CLOSED
        assert it.refusal(now) is None
    assert it.fail(CLOSED, 130.0).failure is Failure.UNSUPPORTED
    assert waits(it, 130.0) == 1
    it.granted()
    assert it.fail(CLOSED, 140.0) is CLOSED  # all is forgiven


def test_the_log_tells_each_reason_once_until_it_worked() -> None:
    it = Datagrams("it", "proxy")
    with capture_logs() as lines:
        for reason in ("one", "one", "two"):
            it.refuse(Failure.UNSUPPORTED, reason, 0.0)
            it.refusal(1.0)
        it.granted()
        it.refuse(Failure.UNSUPPORTED, "two", 0.0)
    assert [line["reason"] for line in lines] == ["one", "two", "two"]
