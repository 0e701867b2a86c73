"""Dials and races step by step: how far they came when they are cancelled, time out, or hear everything at once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from ztun import platform
from ztun.outbound import tcp
from ztun.outbound.base import BaseOutbound, Resolve
from ztun.outbound.direct import DirectOutbound
from ztun.ports import Destination, Dialling, Failure, OutboundError, Poller

from . import netns
from .netns import NO_ROUTE4, NO_ROUTE6, ROUTER4, ROUTER6, SILENT4, SILENT6, Namespace
from .peers import banner_server, converse, free_port, read_exactly
from .scripted import falls_silent, hears, hears_until, proxy, says
from .support import DEADLINE, Sockets, nobody, outbound, table, tools, until

TO = Destination("four.example", 80)
METHOD = b"\x05\x00"
GRANTED = b"\x05\x00\x00\x01\x7f\x00\x00\x01\x04\x38"
BANNER = b"220 ready\r\n"


def poller() -> Poller:
    return platform.poller_of(asyncio.get_running_loop())


async def forever(name: str) -> list[str]:
    await asyncio.sleep(3600)
    return []


class Asked:
    """Who asked for a connection, and what it was told."""

    def __init__(self) -> None:
        self.won: list[tuple[socket.socket, bool]] = []
        self.lost: list[OutboundError] = []

    def dial(self, way: BaseOutbound, to: Destination = TO) -> Dialling:
        return way.dial(to, lambda sock, more: self.won.append((sock, more)), self.lost.append)

    async def answer(self) -> tuple[socket.socket, bool]:
        """The connection, watched by nobody any more."""
        await until(lambda: self.won or self.lost)
        assert not self.lost
        (found,) = self.won
        poller().unwatch(found[0].fileno())
        return found

    async def error(self) -> OutboundError:
        await until(lambda: self.won or self.lost)
        assert not self.won
        (found,) = self.lost
        return found


@pytest.fixture
def asked() -> Asked:
    return Asked()


class Server:
    """A proxy that speaks as soon as its kernel has a connection, before the client knows of it.

    slow: the client hears of the connection from the poller, as on a long path, not from connect(2).
    """

    def __init__(self, *, slow: bool, says: bytes, ends: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._slow, self._says, self._ends = slow, says, ends
        self.port = int(self._listener.getsockname()[1])
        self.peer: socket.socket | None = None

    def speak(self) -> None:
        self.peer, _ = self._listener.accept()
        self.peer.sendall(self._says)
        if self._ends:
            self.peer.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        if self.peer is not None:
            self.peer.close()

    def client(self, family: int, type: int) -> socket.socket:
        server, slow = self, self._slow

        class Client(socket.socket):
            looks = 0

            def connect_ex(self, address: object) -> int:
                number = super().connect_ex(address)  # type: ignore[arg-type]
                self.looks += 1
                if self.looks == 2:
                    server.speak()
                return errno.EALREADY if slow and self.looks == 2 else number

        return Client(family, type)


# Races.


class Race:
    """A race, and what came of it."""

    def __init__(self, sockets: Sockets, addresses: list[str], port: int, delay: float = 0.05) -> None:
        self.won: list[socket.socket] = []
        self.lost: list[OSError] = []
        self.race = tcp.Race(
            poller(), sockets, addresses, port, lambda sock, mask: self.won.append(sock), self.lost.append, delay
        )
        self.race.start()

    def end(self) -> None:
        for sock in self.won:
            poller().closing(sock.fileno())
            sock.close()


@contextlib.contextmanager
def listening(router: Namespace, address: str) -> Iterator[int]:
    with router.socket(tcp.family_of(address), socket.SOCK_STREAM) as sock:
        sock.bind((address, 0))
        sock.listen()
        yield sock.getsockname()[1]


async def test_a_race_of_one(client: Sockets, router: Namespace) -> None:
    with listening(router, ROUTER4) as port:
        race = Race(client, [ROUTER4], port)
        await until(lambda: race.won)
        assert race.won == client.made
        race.end()


async def test_the_first_to_answer_wins_and_the_others_are_closed(client: Sockets, router: Namespace) -> None:
    with listening(router, ROUTER4) as port:
        race = Race(client, [ROUTER4, SILENT4, SILENT6], port, delay=0.02)
        await until(lambda: race.won)
        assert race.won[0].getpeername() == (ROUTER4, port)
        assert [sock for sock in client.made if sock.fileno() >= 0] == race.won
        await asyncio.sleep(0.06)  # nobody starts behind the winner
        assert (len(race.won), race.lost, len(client.made)) == (1, [], 2)  # SILENT6 went first
        race.end()


async def test_one_that_fails_makes_room_for_the_next_at_once(client: Sockets, router: Namespace) -> None:
    with listening(router, ROUTER4) as port:
        race = Race(client, [NO_ROUTE6, ROUTER4, ROUTER6, netns.UNREACHABLE4], port, delay=60)
        await until(lambda: race.won)
        race.end()
    assert [sock.family for sock in client.made] == [socket.AF_INET6, socket.AF_INET]


@pytest.mark.parametrize(
    ("addresses", "number"),
    [
        ([], errno.EADDRNOTAVAIL),
        ([NO_ROUTE4], errno.ENETUNREACH),
        ([NO_ROUTE4, NO_ROUTE6], errno.ENETUNREACH),
        ([NO_ROUTE6, ROUTER4, NO_ROUTE4], errno.ECONNREFUSED),
        (["300.1.2.3", ROUTER6], errno.ECONNREFUSED),  # what only looked like an address
    ],
)
async def test_when_all_fail_the_most_telling_error_is_told_once(
    client: Sockets, addresses: list[str], number: int
) -> None:
    race = Race(client, addresses, 9)
    await until(lambda: race.lost)
    await asyncio.sleep(0.1)
    assert [error.errno for error in race.lost] == [number]
    client.check()


async def test_a_cancelled_race_starts_nobody_and_tells_nobody(client: Sockets) -> None:
    race = Race(client, [SILENT6, SILENT4, ROUTER4], 9, delay=0.02)
    await until(lambda: len(client.made) == 2)
    race.race.cancel()
    client.check()
    await asyncio.sleep(0.06)
    race.race.cancel()
    assert (len(client.made), race.won, race.lost) == (2, [], [])


async def test_no_descriptors_for_a_race(client: Sockets) -> None:
    def none_left(family: int, type: int) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    lost: list[OSError] = []
    tcp.Race(poller(), none_left, [ROUTER4, ROUTER6], 9, lambda sock, mask: None, lost.append).start()
    assert [error.errno for error in lost] == [errno.EMFILE]


# Success.


async def test_a_direct_dial_to_loopback_is_over_at_once(sockets: Sockets, asked: Asked) -> None:
    async with banner_server() as port:
        way = outbound(sockets, "direct")
        asked.dial(way, Destination("127.0.0.1", port))
        ((sock, more),) = asked.won
        assert not more  # it was watched before: what came meanwhile is news
        assert way.statistics()["dialling"] == 0
        await asked.answer()
        await converse(sock)


@pytest.mark.parametrize("slow", [False, True], ids=["prompt", "slow"])
@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]], ids=["one", "race"])
@pytest.mark.parametrize("rest", [b"", BANNER], ids=["nothing more", "banner"])
@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends"])
async def test_a_proxy_that_says_everything_before_it_is_asked(
    asked: Asked, slow: bool, addresses: list[str], rest: bytes, ends: bool
) -> None:
    """All of it, and the end, come with the news that the connection is there. No byte of the rest is taken."""
    with contextlib.closing(Server(slow=slow, says=METHOD + GRANTED + rest, ends=ends)) as server:
        sockets = Sockets(server.client)
        resolve = table(proxy_lan=addresses)
        asked.dial(outbound(sockets, "socks5", server.port, host="proxy.lan", resolve=resolve))
        sock, more = await asked.answer()
        assert server.peer is not None
        assert more or not (rest or ends)
        if not ends:
            server.peer.shutdown(socket.SHUT_WR)
        with sock:
            assert await read_exactly(sock, 100) == rest
        assert server.peer.recv(100) == b"\x05\x01\x00\x05\x01\x00\x03\x0cfour.example\x00\x50"
    sockets.check()


@pytest.mark.parametrize("slow", [False, True], ids=["prompt", "slow"])
@pytest.mark.parametrize("said", [b"", b"\x05", METHOD, METHOD + GRANTED[:7]])
async def test_a_proxy_that_ends_before_it_has_said_everything(asked: Asked, slow: bool, said: bytes) -> None:
    with contextlib.closing(Server(slow=slow, says=said, ends=True)) as server:
        sockets = Sockets(server.client)
        asked.dial(outbound(sockets, "socks5", server.port))
        error = await asked.error()
    assert error.failure is Failure.PROXY_FAILED
    assert "it closed the connection instead of answering" in str(error)
    sockets.check()


@pytest.mark.parametrize("speaks", [True, False])
async def test_a_server_that_is_spoken_to_first_wakes_up_when_there_is_something_to_read(
    sockets: Sockets, speaks: bool
) -> None:
    """The last ACK of the handshake waits for the greeting, 200 ms at most; that of a direct connection for nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        sock, number = tcp.begin(sockets, "127.0.0.1", server.getsockname()[1], speaks=speaks)
        with sock:
            assert number == 0
            if not speaks:
                server.accept()[0].close()
                return
            with pytest.raises(BlockingIOError):
                server.accept()
            sock.send(b"greeting")
            peer, _ = server.accept()
            with peer:
                assert peer.recv(100) == b"greeting"


async def test_whether_there_may_be_more_is_told(sockets: Sockets, asked: Asked) -> None:
    """The next bytes are news for the new owner, whom handing over costs nothing."""
    said = asyncio.Event()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await said.wait()

    async with proxy(says(METHOD), hears_until(b"\x00\x50"), says(GRANTED), waits, says(BANNER)) as port:
        asked.dial(outbound(sockets, "socks5", port))
        await until(lambda: asked.won)
        ((sock, more),) = asked.won
        assert not more
        masks: list[int] = []
        poller().hand_over(sock.fileno(), masks.append)
        await asyncio.sleep(0.02)
        assert not masks
        said.set()
        await until(lambda: masks)
        poller().unwatch(sock.fileno())
        with sock:
            assert await read_exactly(sock, 100) == BANNER


# Cancelling.


@contextlib.asynccontextmanager
async def nothing_left(sockets: Sockets, asked: Asked, way: BaseOutbound) -> AsyncIterator[None]:
    """Cancel the dial, twice, inside."""
    yield
    assert way.statistics()["dialling"] == 0
    sockets.check()
    await asyncio.sleep(0.05)
    sockets.check()
    assert (asked.won, asked.lost, way.failures) == ([], [], {})


@pytest.mark.parametrize("type", ["direct", "socks5", "http"])
async def test_cancelled_while_the_name_is_resolved(sockets: Sockets, asked: Asked, type: str) -> None:
    way = outbound(sockets, type, 1080, host="proxy.lan", resolve=forever)
    dial = asked.dial(way)
    await asyncio.sleep(0.01)
    async with nothing_left(sockets, asked, way):
        dial.cancel()
        dial.cancel()


@pytest.mark.parametrize("type", ["direct", "socks5"])
@pytest.mark.parametrize("addresses", [[SILENT4], [SILENT4, SILENT6]], ids=["one", "race"])
async def test_cancelled_while_connecting(client: Sockets, asked: Asked, type: str, addresses: list[str]) -> None:
    resolve = table(proxy_lan=addresses, four_example=addresses)
    way = DirectOutbound(tools(client, resolve, 5)) if type == "direct" else None
    some = way or outbound(client, type, 1080, host="proxy.lan", resolve=resolve)
    dial = asked.dial(some)
    await until(lambda: len(client.made) == len(addresses))
    async with nothing_left(client, asked, some):
        dial.cancel()
        dial.cancel()


@pytest.mark.parametrize("said", [b"", METHOD, METHOD + GRANTED[:6]])
async def test_cancelled_while_the_proxy_answers(sockets: Sockets, asked: Asked, said: bytes) -> None:
    async with proxy(hears(b"\x05\x01\x00"), says(said), falls_silent()) as port:
        way = outbound(sockets, "socks5", port)
        dial = asked.dial(way)
        await asyncio.sleep(0.02)
        async with nothing_left(sockets, asked, way):
            dial.cancel()
            dial.cancel()


async def test_cancelled_when_it_is_over(sockets: Sockets, asked: Asked) -> None:
    """The connection belongs to who has it."""
    async with banner_server() as port:
        dial = asked.dial(outbound(sockets, "direct"), Destination("127.0.0.1", port))
        sock, _ = await asked.answer()
        dial.cancel()
        await converse(sock)


async def test_who_waits_may_give_up_in_the_moment_of_success(sockets: Sockets) -> None:
    gate: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    async def resolve(name: str) -> list[str]:
        return await gate

    async with banner_server() as port:
        waits = asyncio.ensure_future(outbound(sockets, "direct", resolve=resolve).connect(Destination("a.test", port)))
        await asyncio.sleep(0.01)
        gate.set_result(["127.0.0.1"])  # the dial goes on next, and is through before the waiter hears of its end
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert len(sockets.made) == 1
        sockets.check()


async def test_an_outbound_that_is_closed_ends_its_dials(sockets: Sockets) -> None:
    async with proxy(falls_silent()) as port:
        way = outbound(sockets, "socks5", port)
        several = [Asked() for _ in range(3)]
        for asked in several:
            asked.dial(way)
        await asyncio.sleep(0.02)
        assert way.statistics()["dialling"] == 3
        await way.close()
        assert way.statistics()["dialling"] == 0
        sockets.check()
        assert not any(asked.won or asked.lost for asked in several)


# The deadline.


@pytest.mark.parametrize(
    ("addresses", "resolve"),
    [([SILENT4], None), ([SILENT4, SILENT6], None), ([], forever)],
    ids=["one", "race", "resolving"],
)
@pytest.mark.parametrize("type", ["direct", "socks5", "http"])
async def test_too_late_to_connect(
    client: Sockets, asked: Asked, type: str, addresses: list[str], resolve: Resolve | None
) -> None:
    resolve = resolve or table(proxy_lan=addresses, four_example=addresses)
    way = outbound(client, type, 1080, host="proxy.lan", resolve=resolve, deadline=DEADLINE)
    asked.dial(way)
    error = await asked.error()
    if type == "direct":
        assert error.failure is Failure.TIMED_OUT
        assert str(error) == "outbound it: four.example port 80 did not answer within 0.4 s"
    else:
        assert error.failure is Failure.PROXY_UNREACHABLE
        assert str(error) == "outbound it: proxy proxy.lan:1080 did not accept a connection within 0.4 s"
    assert way.failures == {error.failure: 1}
    client.check()


@pytest.mark.parametrize(
    ("type", "said", "failure", "what"),
    [
        ("socks5", b"", Failure.PROXY_FAILED, "did not answer the greeting"),
        ("socks5", METHOD, Failure.TIMED_OUT, "did not reach the destination"),
        ("socks5", METHOD + GRANTED[:9], Failure.TIMED_OUT, "did not reach the destination"),
        ("http", b"", Failure.TIMED_OUT, "did not reach the destination"),
        ("http", b"HTTP/1.1 200 OK\r\n\r", Failure.TIMED_OUT, "did not reach the destination"),
    ],
)
async def test_too_late_for_the_proxy_to_answer(
    sockets: Sockets, asked: Asked, type: str, said: bytes, failure: Failure, what: str
) -> None:
    async with proxy(says(said), falls_silent()) as port:
        asked.dial(outbound(sockets, type, port, deadline=DEADLINE))
        error = await asked.error()
    assert (error.failure, str(error)) == (failure, f"outbound it: proxy 127.0.0.1:{port} {what} within 0.4 s")


async def test_each_dial_has_its_own_deadline(client: Sockets) -> None:
    loop = asyncio.get_running_loop()
    way = DirectOutbound(tools(client, nobody, 0.3))
    began, ended = [], []
    for _ in range(4):
        began.append(loop.time())
        way.dial(Destination(SILENT4, 80), lambda sock, more: None, lambda error: ended.append(loop.time()))
        await asyncio.sleep(0.05)
    await until(lambda: len(ended) == 4)
    assert all(0.29 < end - start < 0.45 for start, end in zip(began, ended, strict=True))


async def test_a_defect_of_one_that_is_told_costs_the_others_no_deadline(client: Sockets, asked: Asked) -> None:
    heard: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context["exception"]))

    def fails(error: OutboundError) -> None:
        raise ZeroDivisionError

    way = DirectOutbound(tools(client, nobody, 0.1))
    for failed in (fails, asked.lost.append, fails, asked.lost.append):
        way.dial(Destination(SILENT4, 80), lambda sock, more: None, failed)
    await until(lambda: len(asked.lost) == 2)
    assert [type(error) for error in heard] == [ZeroDivisionError] * 2
    assert way.statistics()["dialling"] == 0


async def test_a_dial_that_is_over_has_no_deadline(sockets: Sockets, asked: Asked) -> None:
    async with banner_server() as port:
        way = outbound(sockets, "direct", deadline=0.05)
        asked.dial(way, Destination("127.0.0.1", port))
        sock, _ = await asked.answer()
        await asyncio.sleep(0.1)
        assert not way.failures
        await converse(sock)


async def test_refused_at_once(sockets: Sockets, asked: Asked) -> None:
    asked.dial(outbound(sockets, "direct"), Destination("127.0.0.1", free_port()))
    assert (await asked.error()).failure is Failure.REFUSED
