"""Datagrams through SOCKS5 (RFC 1928, sections 4, 6 and 7): Dante or sing-box, and relays that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztun.outbound.associate import decode_header, encode_header
from ztun.outbound.senders import Senders
from ztun.ports import Destination, Failure, OutboundError

from . import peers
from .links import Link, echo
from .peers import LONG_NAME, PASSWORD, USER
from .scripted import Step, falls_silent, hears, proxy, says
from .support import DEADLINE, MARK, Sockets, outbound, table, until

HELLO = (hears(b"\x05\x01\x00"), says(b"\x05\x00"), hears(b"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"))


CARRIERS = [
    ("socks_udp", None, None),
    ("socks_udp_auth", USER, PASSWORD),
    ("sing_box", None, None),
    ("sing_box_auth", USER, PASSWORD),
]


@pytest.fixture
def seen() -> Link:
    return Link()


class Relay:
    """The UDP side of a proxy in the hands of a test."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._client: tuple[str, int] | None = None
        self.port = sock.getsockname()[1]
        self.heard: list[bytes] = []

    def read(self) -> None:
        datagram, self._client = self._sock.recvfrom(65535)
        self.heard.append(datagram)

    def say(self, datagram: bytes) -> None:
        assert self._client is not None
        self._sock.sendto(datagram, self._client)


@contextlib.contextmanager
def relay() -> Iterator[Relay]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.bind(("127.0.0.1", 0))
        it = Relay(sock)
        loop = asyncio.get_running_loop()
        loop.add_reader(sock, it.read)
        yield it
        loop.remove_reader(sock)


def granted(port: int, address: bytes = b"\x01\x7f\x00\x00\x01") -> Step:
    return says(b"\x05\x00\x00" + address + port.to_bytes(2, "big"))


@pytest.mark.parametrize(("kind", "user", "password"), CARRIERS)
async def test_a_socks5_server_relays_by_address_and_by_name(
    sockets: Sockets, request: pytest.FixtureRequest, seen: Link, kind: str, user: str | None, password: str | None
) -> None:
    way = outbound(sockets, "socks5", request.getfixturevalue(kind), username=user, password=password)
    link = await seen.open(way)
    with echo() as (host, port), echo() as (_, other):
        link.send(Destination(host, port), b"one")
        await until(lambda: seen.heard == [("127.0.0.1", port, b"one")])
        link.send(Destination("four.example", other), b"two")
        await until(lambda: seen.heard[1:] == [("four.example", other, b"two")])
        link.send(Destination("four.example", other), memoryview(b"x" * 8000))
        await until(lambda: len(seen.heard) == 3)
    assert [sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) for sock in sockets.made] == [MARK, MARK]
    assert way.statistics()["datagram_links"] == 1
    link.close()


@pytest.mark.parametrize("kind", ["socks_udp", "sing_box"])
async def test_a_socks5_server_relays_to_the_longest_name(
    sockets: Sockets, request: pytest.FixtureRequest, seen: Link, kind: str
) -> None:
    link = await seen.open(outbound(sockets, "socks5", request.getfixturevalue(kind)))
    with echo() as (_, port):
        link.send(Destination(LONG_NAME, port), b"x")
        await until(lambda: seen.heard == [(LONG_NAME, port, b"x")])
    link.close()


@pytest.mark.parametrize("kind", ["socks_udp", "sing_box"])
async def test_two_hundred_datagrams_through_a_socks5_server(
    sockets: Sockets, request: pytest.FixtureRequest, seen: Link, kind: str
) -> None:
    link = await seen.open(outbound(sockets, "socks5", request.getfixturevalue(kind)))
    with echo() as address:
        for number in range(200):
            link.send(Destination(*address), b"%d" % number)
            await until(lambda count=number + 1: len(seen.heard) == count)  # type: ignore[misc]
    assert [payload for _, _, payload in seen.heard] == [b"%d" % number for number in range(200)]
    link.close()


@pytest.mark.parametrize("server", [peers.socks_udp, peers.sing_box_udp])
async def test_the_association_ends_with_its_control_connection(
    sockets: Sockets, tmp_path_factory: pytest.TempPathFactory, seen: Link, server: peers.Server
) -> None:
    with server(tmp_path_factory.mktemp("dying")) as port:
        way = outbound(sockets, "socks5", port)
        link = await seen.open(way)
    await until(lambda: seen.died)
    assert [error.failure for error in seen.died] == [Failure.PROXY_FAILED]
    link.send(Destination("127.0.0.1", 9), b"into the void")
    sockets.check()


async def test_a_proxy_without_datagrams(sockets: Sockets, microsocks: int, seen: Link) -> None:
    way = outbound(sockets, "socks5", microsocks)
    with pytest.raises(OutboundError) as caught:
        await seen.open(way)
    assert caught.value.failure is Failure.UNSUPPORTED
    assert way.failures == {Failure.UNSUPPORTED: 1}


async def test_the_datagrams_on_the_wire(sockets: Sockets, seen: Link) -> None:
    with relay() as udp:
        async with proxy(*HELLO, granted(udp.port), falls_silent()) as port:
            way = outbound(sockets, "socks5", port)
            link = await seen.open(way)
            link.send(Destination("192.0.2.1", 53), b"a")
            link.send(Destination("2001:db8::1", 53), b"b")
            link.send(Destination("name.example", 53), b"c")
            await until(lambda: len(udp.heard) == 3)
            assert udp.heard == [
                b"\0\0\0\x01\xc0\x00\x02\x01\x00\x35a",
                b"\0\0\0\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01\x00\x35b",
                b"\0\0\0\x03\x0cname.example\x00\x35c",
            ]
            for datagram in (
                b"\0\0\0\x01\xc0\x00\x02\x01\x00\x35A",
                b"\0\0\0\x04\x20\x01\x0d\xb8" + bytes(11) + b"\x01\x00\x35B",
                b"\0\0\0\x03\x0cNAME.example\x00\x35C",
                b"\0\0\0\x01\xc0\x00\x02\x09\x10\x00",  # a stranger, without payload
                b"\0\0\x01\x01\xc0\x00\x02\x01\x00\x35fragment",
                b"\0\0\0\x02\xc0\x00\x02\x01\x00\x35type",
                b"\0\0\0\x03\x02\xff\xfe\x00\x35not ASCII",
                b"\0\0\0\x03\xff" + b"n" * 100,
                b"\0\0\0\x01\xc0\x00",
                b"\0\0",
                b"",
            ):
                udp.say(datagram)
            await until(lambda: sum(way.drops.values()) == 7)
            link.close()
    assert seen.heard == [
        ("192.0.2.1", 53, b"A"),
        ("2001:db8::1", 53, b"B"),
        ("name.example", 53, b"C"),
        ("192.0.2.9", 4096, b""),
    ]
    assert way.drops == {"fragment": 1, "address type": 1, "name": 1, "short": 4}


@pytest.mark.parametrize(
    "address",
    [b"\x01\x00\x00\x00\x00", b"\x04" + bytes(16), b"\x03\x09relay.lan", b"\x01\x7f\x00\x00\x01"],
    ids=["0.0.0.0", "::", "name", "address"],
)
async def test_where_the_relay_is(sockets: Sockets, seen: Link, address: bytes) -> None:
    with relay() as udp:
        async with proxy(*HELLO, granted(udp.port, address), falls_silent()) as port:
            link = await seen.open(outbound(sockets, "socks5", port, resolve=table(relay_lan=["127.0.0.1"])))
            link.send(Destination("192.0.2.1", 53), b"a")
            await until(lambda: udp.heard)
            link.close()


@pytest.mark.parametrize(
    ("steps", "failure"),
    [
        pytest.param([granted(0)], Failure.PROXY_FAILED, id="port 0"),
        pytest.param([granted(9, b"\x03\x09relay.lan")], Failure.PROXY_UNREACHABLE, id="a name that does not resolve"),
        pytest.param([granted(9, b"\x01\xff\xff\xff\xff")], Failure.PROXY_UNREACHABLE, id="a broadcast address"),
        pytest.param([says(b"\x05\x07\x00")], Failure.UNSUPPORTED, id="no such command"),
        pytest.param([says(b"\x05\x02\x00")], Failure.PROHIBITED, id="not allowed"),
        # Of a proxy that never granted one, the next three are taken for "cannot": see test_udp_verdict.py
        pytest.param([], Failure.UNSUPPORTED, id="closes"),
        pytest.param([falls_silent()], Failure.UNSUPPORTED, id="silent"),
        pytest.param([says(b"\x05\x01\x00")], Failure.UNSUPPORTED, id="general failure"),
    ],
)
async def test_an_association_that_does_not_come_about(
    sockets: Sockets, seen: Link, steps: list[Step], failure: Failure
) -> None:
    async with proxy(*HELLO, *steps) as port:
        way = outbound(sockets, "socks5", port, resolve=table(), deadline=DEADLINE)
        with pytest.raises(OutboundError) as caught:
            await seen.open(way)
    assert caught.value.failure is failure
    assert way.failures == {failure: 1}
    sockets.check()


async def test_a_relay_that_nobody_listens_on(sockets: Sockets, seen: Link) -> None:
    with relay() as udp:
        pass
    async with proxy(*HELLO, granted(udp.port), falls_silent()) as port:
        link = await seen.open(outbound(sockets, "socks5", port))
        link.send(Destination("192.0.2.1", 53), b"a")
        await until(lambda: seen.died)
        link.send(Destination("192.0.2.1", 53), b"b")
    assert len(seen.died) == 1
    sockets.check()


async def test_small_talk_on_the_control_connection_is_ignored(sockets: Sockets, seen: Link) -> None:
    with relay() as udp:
        async with proxy(*HELLO, granted(udp.port), says(b"blah" * 5000), falls_silent()) as port:
            link = await seen.open(outbound(sockets, "socks5", port))
            await asyncio.sleep(0.02)
            link.send(Destination("192.0.2.1", 53), b"a")
            await until(lambda: udp.heard)
            assert not seen.died
            link.close()


@pytest.mark.parametrize("kind", ["socks_udp", "sing_box"])
async def test_anybody_may_answer(sockets: Sockets, request: pytest.FixtureRequest, seen: Link, kind: str) -> None:
    """Full cone: the relay's own port is open to whoever was told of it, under the address that they have."""
    link = await seen.open(outbound(sockets, "socks5", request.getfixturevalue(kind)))
    loop = asyncio.get_running_loop()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as first,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
    ):
        first.setblocking(False)
        first.bind(("127.0.0.1", 0))
        stranger.bind(("127.0.0.1", 0))
        link.send(Destination(*first.getsockname()), b"here I am")
        _, outside = await asyncio.wait_for(loop.sock_recvfrom(first, 100), 5)
        stranger.sendto(b"hello", outside)
        await until(lambda: seen.heard == [("127.0.0.1", stranger.getsockname()[1], b"hello")])
    link.close()


async def test_what_is_no_name_cannot_be_sent_to(sockets: Sockets, seen: Link) -> None:
    with relay() as udp:
        async with proxy(*HELLO, granted(udp.port), falls_silent()) as port:
            link = await seen.open(outbound(sockets, "socks5", port))
            with pytest.raises(OutboundError) as caught:
                link.send(Destination("a..b", 53), b"x")
            assert caught.value.failure is Failure.NAME_NOT_FOUND
            link.close()


@pytest.mark.parametrize("stage", [0, 2, 3])
async def test_a_cancelled_request_closes_its_sockets(sockets: Sockets, seen: Link, stage: int) -> None:
    async with proxy(*HELLO[:stage], falls_silent()) as port:
        opening = asyncio.ensure_future(seen.open(outbound(sockets, "socks5", port)))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        sockets.check()


def test_answers_are_told_under_the_name_that_was_sent_to() -> None:
    senders = Senders()
    senders.sent(Destination("one.example", 443))
    assert senders.find("192.0.2.1", 443) == "one.example"
    assert senders.find("192.0.2.2", 443) == "one.example"  # another address of it: there is no other name
    assert senders.find("192.0.2.1", 80) == "192.0.2.1"  # a port that no name was sent to on
    senders.sent(Destination("192.0.2.3", 443))
    assert senders.find("192.0.2.3", 443) == "192.0.2.3"  # an address that was sent to itself


def test_answers_from_several_names_on_one_port() -> None:
    senders = Senders()
    for name in ("one.example", "two.example", "three.example"):
        senders.sent(Destination(name, 443))
    assert senders.find("two.example", 443) == "two.example"  # a proxy that answers with names
    assert senders.find("192.0.2.1", 443) == "one.example"
    assert senders.find("192.0.2.3", 443) == "three.example"
    assert senders.find("192.0.2.1", 443) == "one.example"
    assert senders.find("192.0.2.4", 443) == "192.0.2.4"  # every name has its address: this one is a stranger


NAMES = st.from_regex(r"\A[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63}){0,2}\Z").filter(lambda name: not name.isdigit())


@given(
    st.one_of(NAMES, st.ip_addresses(v=4).map(str), st.ip_addresses(v=6).map(str)), st.integers(0, 65535), st.binary()
)
def test_a_header_reads_as_it_was_written(host: str, port: int, payload: bytes) -> None:
    datagram = encode_header(Destination(host, port)) + payload
    read_host, read_port, start = decode_header(datagram)
    assert (normal(read_host), read_port, datagram[start:]) == (normal(host), port, payload)


def normal(host: str) -> bytes | str:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            return socket.inet_pton(family, host)
    return host


@given(st.binary(max_size=300))
def test_any_datagram_is_read_or_refused(datagram: bytes) -> None:
    try:
        host, port, start = decode_header(datagram)
    except ValueError as error:
        assert str(error) in {"short", "fragment", "address type", "name"}  # noqa: PT017 (most examples do not raise)
    else:
        assert encoded_size(datagram[3], host) == start <= len(datagram)
        assert 0 <= port <= 65535


def encoded_size(kind: int, host: str) -> int:
    sizes: dict[int, Callable[[], int]] = {1: lambda: 10, 4: lambda: 22, 3: lambda: 7 + len(host)}
    return sizes[kind]()
