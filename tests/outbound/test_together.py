"""Greeting, authentication and request in one go, where the proxy takes that, and one by one where it does not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ztun import platform
from ztun.outbound import OutboundSpec, Tools, make_outbounds, together
from ztun.outbound.socks5 import Socks5Outbound
from ztun.ports import Destination, Failure

from .peers import PASSWORD, USER, banner_server, converse, read_exactly
from .support import Sockets, nobody, outbound, refused, until

HELLO, WELCOME = b"\x05\x01\x00", b"\x05\x00"
NOTHING = b"\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00"  # UDP ASSOCIATE, from wherever
ASK = b"\x05\x01\x00\x03\x0cfour.example\x00\x50"
LOGIN = b"\x01\x01u\x01p"
GRANTED = b"\x05\x00\x00\x01\x7f\x00\x00\x01\x04\x38"
BANNER = b"220 ready\r\n"
TO = Destination("four.example", 80)
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]


@asynccontextmanager
async def proxy(talk: Talk) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that hands what comes first, in one read, to `talk`; gives its port and a list of what came."""
    heard: list[bytes] = []
    open_ones: set[asyncio.StreamWriter] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.add(writer)
        try:
            first = await reader.read(1000)
            if first:
                heard.append(first)
                await talk(reader, writer, first)
                await reader.read()
        except ConnectionError:
            pass
        finally:
            open_ones.discard(writer)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], heard
    finally:
        server.close()
        for writer in list(open_ones):
            writer.close()
        await until(lambda: not open_ones)


def takes_all(reply: bytes, pause: float = 0.0) -> Talk:
    """A proxy that takes everything at once, and says `reply` to a connection that was granted."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        answers = WELCOME + (GRANTED if NOTHING in first else reply)
        for part in [bytes((byte,)) for byte in answers] if pause else [answers]:
            writer.write(part)
            await asyncio.sleep(pause)

    return talk


async def throws_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
    """A proxy that forgets what came behind the greeting, as microsocks does."""
    writer.write(WELCOME)
    if await reader.read(1000) == ASK:
        writer.write(GRANTED + BANNER)


def way_to(sockets: Sockets, port: int, *, credentials: tuple[str, str] | None = None, **more: float) -> Socks5Outbound:
    user, password = credentials or (None, None)
    made = outbound(sockets, "socks5", port, username=user, password=password, **more)  # type: ignore[arg-type]
    assert isinstance(made, Socks5Outbound)
    return made


async def asked(way: Socks5Outbound) -> bool | None:
    """What is known after the proxy was asked."""
    way.warm_up()
    await until(lambda: way._together._timer is None)
    answer: bool | None = way.statistics()["together"]
    return answer


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for those that will never answer."""
    monkeypatch.setattr(together, "_PATIENCE", 0.3)


@pytest.mark.parametrize("pause", [0.0, 0.001], ids=["in one segment", "in single bytes"])
@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(GRANTED, id="ipv4"),
        pytest.param(b"\x05\x00\x00\x04" + bytes(16) + b"\x04\x38", id="ipv6"),
        pytest.param(b"\x05\x00\x00\x03\x05proxy\x04\x38", id="name"),
        pytest.param(b"\x05\x00\x00\x03\xff" + b"n" * 255 + b"\x04\x38", id="long name"),
    ],
)
async def test_one_message_one_answer_and_what_follows_is_the_destinations(
    sockets: Sockets, reply: bytes, pause: float
) -> None:
    async with proxy(takes_all(reply + BANNER, pause)) as (port, heard):
        way = way_to(sockets, port)
        assert await asked(way) is True
        sock = await way.connect(TO)
        assert await read_exactly(sock, len(BANNER)) == BANNER
        sock.close()
        assert heard == [HELLO + NOTHING, HELLO + ASK]
        await way.close()


async def test_bytes_that_come_late_are_told_of_one_by_one(sockets: Sockets) -> None:
    """Until the answer is there, fewer bytes than the shortest one are no news; afterwards each of them is."""
    went = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        writer.write(WELCOME + GRANTED)
        if ASK in first:
            await went.wait()
            writer.write(b"x")

    async with proxy(talk) as (port, _):
        way = way_to(sockets, port)
        assert await asked(way) is True
        came = asyncio.Event()
        connected: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
        way.dial(TO, lambda sock, more: connected.set_result(sock), connected.set_exception)
        sock = await connected
        way.poller.hand_over(sock.fileno(), lambda mask: came.set())
        went.set()
        await asyncio.wait_for(came.wait(), 5)
        assert sock.recv(10) == b"x"
        way.poller.closing(sock.fileno())
        sock.close()
        await way.close()


async def test_a_password_goes_along_and_no_other_method_is_offered(sockets: Sockets) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        writer.write(b"\x05\x02\x01\x00" + GRANTED)

    async with proxy(talk) as (port, heard):
        way = way_to(sockets, port, credentials=("u", "p"))
        assert await asked(way) is True
        (await way.connect(TO)).close()
        assert heard == [b"\x05\x01\x02" + LOGIN + NOTHING, b"\x05\x01\x02" + LOGIN + ASK]
        await way.close()


async def test_a_proxy_that_throws_the_request_away_is_asked_one_by_one(sockets: Sockets, hasty: None) -> None:
    async with proxy(throws_away) as (port, heard):
        way = way_to(sockets, port)
        assert await asked(way) is False
        sock = await way.connect(TO)
        assert await read_exactly(sock, len(BANNER)) == BANNER
        sock.close()
        assert heard == [HELLO + NOTHING, HELLO]
        await way.close()


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        (WELCOME + b"\x05\x07\x00\x01" + bytes(6), True),  # no UDP ASSOCIATE, but it did read the request
        (WELCOME, False),  # and the end
        (b"", None),
        (b"\x05\xff", None),
        (WELCOME + b"\x05\x00\x00\x03\x00\x04\x38", False),  # shorter than any other: its replies may be, too
    ],
)
async def test_what_the_answer_to_the_question_means(sockets: Sockets, answer: bytes, known: bool | None) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        writer.write(answer)
        writer.write_eof()

    async with proxy(talk) as (port, _):
        way = way_to(sockets, port)
        assert await asked(way) is known
        await way.close()


async def test_nobody_is_asked_of_its_own_accord(sockets: Sockets) -> None:
    async with proxy(throws_away) as (port, heard):
        way = way_to(sockets, port)
        (await way.connect(TO)).close()
        assert heard == [HELLO]


async def test_a_proxy_that_became_another_one_is_found_out(sockets: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first flow pays with its deadline, the next ones are safe."""
    monkeypatch.setattr(together, "_PATIENCE", 0.3)
    monkeypatch.setattr(together, "_RELUCTANCE", 0.0)
    behaves = [takes_all(GRANTED)]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        await behaves[-1](reader, writer, first)

    async with proxy(talk) as (port, _):
        way = way_to(sockets, port, deadline=0.4)
        assert await asked(way) is True
        behaves.append(throws_away)
        error = await refused(way, *TO)
        assert error.failure is Failure.TIMED_OUT
        assert "did not reach the destination" in str(error)  # it said nothing against the greeting
        assert way.statistics()["together"] is None
        (await way.connect(TO)).close()
        await until(lambda: way.statistics()["together"] is False)
        await way.close()


async def test_a_proxy_that_refuses_the_method_and_waits_is_understood_when_time_is_up(sockets: Sockets) -> None:
    """RFC 1928 section 3: the client closes. Two bytes are too few to be news."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: bytes) -> None:
        writer.write(WELCOME + GRANTED if NOTHING in first else b"\x05\xff")

    async with proxy(talk) as (port, _):
        way = way_to(sockets, port, deadline=0.4)
        assert await asked(way) is True
        assert (await refused(way, *TO)).failure is Failure.PROXY_AUTHENTICATION
        await way.close()


async def test_an_answer_shorter_than_any_is_no_answer(sockets: Sockets) -> None:
    """What was read behind it is the destination's and lost, so the flow must not go on."""
    async with proxy(takes_all(b"\x05\x00\x00\x03\x00\x04\x38" + BANNER)) as (port, _):
        way = way_to(sockets, port)
        assert await asked(way) is True
        assert (await refused(way, *TO)).failure is Failure.PROXY_FAILED
        await way.close()


async def test_connections_that_wait_were_not_greeted_and_say_all_at_once(sockets: Sockets) -> None:
    async with proxy(takes_all(GRANTED + BANNER)) as (port, heard):
        tools = Tools(platform.poller_of(asyncio.get_running_loop()), sockets, nobody, 5, warm=2)
        spec = OutboundSpec("it", "socks5", "127.0.0.1", port, None, None, None)
        way = make_outbounds([spec], tools)["it"]
        assert isinstance(way, Socks5Outbound)
        assert await asked(way) is True
        await until(lambda: way.statistics()["pool"]["waiting"] == 2)
        before = way.statistics()["pool"]["hits"]
        sock = await way.connect(TO)
        assert await read_exactly(sock, len(BANNER)) == BANNER
        sock.close()
        assert way.statistics()["pool"]["hits"] == before + 1
        assert heard[-1] == HELLO + ASK
        await way.close()


async def test_an_end_while_it_is_asked_leaves_nothing_behind(sockets: Sockets) -> None:
    async with proxy(throws_away) as (port, heard):
        way = way_to(sockets, port)
        way.warm_up()
        await until(lambda: heard)
        await way.close()
        assert way.statistics()["together"] is None


@pytest.mark.parametrize("auth", [False, True], ids=["nobody", "password"])
@pytest.mark.parametrize(("kind", "known"), [("socks_udp", True), ("sing_box", True), ("microsocks", False)])
async def test_real_proxies(
    sockets: Sockets, request: pytest.FixtureRequest, kind: str, known: bool, auth: bool
) -> None:
    if not known:
        request.getfixturevalue("hasty")
    port = request.getfixturevalue(f"{kind}_auth" if auth else kind)
    way = way_to(sockets, port, credentials=(USER, PASSWORD) if auth else None)
    assert await asked(way) is known
    async with banner_server() as there:
        for host in ("127.0.0.1", "four.example"):
            await converse(await way.connect(Destination(host, there)))
    with socket.create_server(("127.0.0.1", 0)) as nobody_there:
        closed = nobody_there.getsockname()[1]
    assert (await refused(way, "127.0.0.1", closed)).failure in (Failure.REFUSED, Failure.PROXY_FAILED)
    await way.close()
