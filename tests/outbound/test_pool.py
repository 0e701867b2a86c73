"""Connections that wait for a flow: through real proxies, and through scripted ones that do not keep them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ztun import platform
from ztun.outbound import OutboundSpec, Tools, make_outbounds
from ztun.outbound.base import ProxyOutbound
from ztun.outbound.pool import WarmPool
from ztun.outbound.socks5 import Socks5Outbound
from ztun.ports import Carry, Connected, Destination, Dialling, Failed, Failure, Outbound, OutboundError

from .netns import ROUTER4, Namespace
from .support import Sockets, nobody, until

HELLO, WELCOME = b"\x05\x01\x00", b"\x05\x00"
GRANTED = b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
TO = Destination("192.0.2.1", 80)
_SILENCE = """add table inet silence; add chain inet silence out { type filter hook output priority 0; };
    add rule inet silence out meta l4proto tcp drop"""
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


def one_by_one(made: Outbound) -> Outbound:
    """Its proxy is not asked whether it takes all at once: test_together.py does that."""
    if isinstance(made, Socks5Outbound):
        made._together.close()
    return made


@asynccontextmanager
async def proxy(talk: Talk) -> AsyncIterator[int]:
    """A SOCKS5 server that greets, and leaves the rest to `talk(reader, writer, number of the connection)`."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        number = count
        try:
            assert await reader.readexactly(3) == HELLO
            writer.write(WELCOME)
            await talk(reader, writer, number)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def grant(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    """Grant the request and say the number of the connection."""
    assert (await reader.readexactly(10))[:4] == b"\x05\x01\x00\x01"
    writer.write(GRANTED + bytes((number,)))
    await reader.read()


def warmed(sockets: Sockets, port: int, kind: str = "socks5", warm: int = 2, most: int = 4) -> ProxyOutbound:
    tools = Tools(platform.poller_of(asyncio.get_running_loop()), sockets, nobody, 5, 75, warm, most)
    made = one_by_one(make_outbounds([OutboundSpec("it", kind, "127.0.0.1", port)], tools)["it"])
    assert isinstance(made, ProxyOutbound)
    return made


def pool_of(outbound: ProxyOutbound) -> dict[str, int]:
    found: dict[str, int] = outbound.statistics()["pool"]
    return found


async def test_one_whose_proxy_fell_silent_is_found_by_probes_and_dropped(client: Sockets, router: Namespace) -> None:
    """`pool.keepalive_interval` of one second: a probe after one, three without an answer, and it is gone."""
    with router.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind((ROUTER4, 0))
        listener.listen()
        listener.setblocking(False)
        poller = platform.poller_of(asyncio.get_running_loop())
        spec = OutboundSpec("it", "socks5", ROUTER4, listener.getsockname()[1])
        way = one_by_one(make_outbounds([spec], Tools(poller, client, nobody, 5, 1, 1, 1))["it"])
        assert isinstance(way, ProxyOutbound)
        way.warm_up()
        loop = asyncio.get_running_loop()
        far, _address = await loop.sock_accept(listener)
        assert await loop.sock_recv(far, 3) == HELLO
        await loop.sock_sendall(far, WELCOME)
        await until(lambda: pool_of(way)["waiting"] == 1)
        router.run(f"nft {_SILENCE}")
        try:
            await until(lambda: pool_of(way)["lost"] == 1, 10)
        finally:
            router.run("nft delete table inet silence")
            far.close()
        await way.close()


async def first_byte(sock: socket.socket) -> int:
    with sock:
        return (await asyncio.get_running_loop().sock_recv(sock, 1))[0]


async def test_a_flow_takes_what_waits(sockets: Sockets) -> None:
    async with proxy(grant) as port:
        way = warmed(sockets, port)
        way.warm_up()
        await until(lambda: pool_of(way)["waiting"] == 2)
        assert await first_byte(await way.connect(TO)) == 2  # the latest one: it is the least likely to be stale
        assert await first_byte(await way.connect(TO)) == 1
        assert pool_of(way) == {"waiting": 0, "hits": 2, "misses": 0, "lost": 0, "expired": 0}
        assert way.statistics()["dials"] == 2
        await until(lambda: pool_of(way)["waiting"] == 2)
        await way.close()


async def test_more_wait_when_more_are_wanted_at_once(sockets: Sockets) -> None:
    async with proxy(grant) as port:
        way = warmed(sockets, port, warm=1, most=3)
        way.warm_up()
        await until(lambda: pool_of(way)["waiting"] == 1)
        for found in await asyncio.gather(*(way.connect(TO) for _ in range(6))):
            found.close()
        assert pool_of(way)["hits"] == 1
        assert pool_of(way)["misses"] == 5
        await until(lambda: pool_of(way)["waiting"] == 3)
        await way.close()


async def test_one_that_the_proxy_ended_is_not_handed_out(sockets: Sockets) -> None:
    async def leave_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number > 2:
            await grant(reader, writer, number)

    async with proxy(leave_first) as port:
        way = warmed(sockets, port)
        way.warm_up()
        await until(lambda: pool_of(way)["lost"] == 2)
        assert await first_byte(await way.connect(TO)) == 3
        assert pool_of(way)["hits"] == 0
        await way.close()


async def test_one_that_ends_when_it_is_asked_costs_a_second_dial_and_no_flow(sockets: Sockets) -> None:
    """The proxy's FIN was on its way when the flow came."""

    async def hang_up_when_asked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 1:
            await reader.readexactly(1)
        else:
            await grant(reader, writer, number)

    async with proxy(hang_up_when_asked) as port:
        way = warmed(sockets, port, warm=1)
        way.warm_up()
        await until(lambda: pool_of(way)["waiting"] == 1)
        assert await first_byte(await way.connect(TO)) > 1
        assert way.failures == {}
        await way.close()


async def test_a_refusal_is_one_on_a_connection_that_waited_too(sockets: Sockets) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.readexactly(10)
        writer.write(b"\x05\x05\x00\x01" + bytes(6))

    async with proxy(refuse) as port:
        way = warmed(sockets, port, warm=1)
        way.warm_up()
        await until(lambda: pool_of(way)["waiting"] == 1)
        with pytest.raises(OutboundError) as caught:
            await way.connect(TO)
        assert caught.value.failure is Failure.REFUSED
        await way.close()


async def test_a_new_network_forgets_what_waits(sockets: Sockets) -> None:
    async with proxy(grant) as port:
        way = warmed(sockets, port)
        way.warm_up()
        await until(lambda: pool_of(way)["waiting"] == 2)
        way.forget_connections()
        assert pool_of(way)["waiting"] == 0
        await way.close()


async def test_without_warm_up_there_is_no_pool(sockets: Sockets) -> None:
    async with proxy(grant) as port:
        way = warmed(sockets, port, warm=0)
        way.warm_up()
        assert await first_byte(await way.connect(TO)) == 1
        assert "pool" not in way.statistics()
        await way.close()


@pytest.mark.parametrize("kind", ["socks5", "http"])
async def test_real_proxies_keep_what_waits(sockets: Sockets, kind: str, microsocks: int, tinyproxy: int) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read(16))
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    site = server.sockets[0].getsockname()[1]
    way = warmed(sockets, microsocks if kind == "socks5" else tinyproxy, kind)
    way.warm_up()
    await until(lambda: pool_of(way)["waiting"] == 2)
    loop = asyncio.get_running_loop()
    for _ in range(2):
        with await way.connect(Destination("127.0.0.1", site)) as sock:
            await loop.sock_sendall(sock, b"hello")
            assert await loop.sock_recv(sock, 16) == b"hello"
    assert pool_of(way)["hits"] == 2
    await way.close()
    server.close()


class Proxies:
    """Makes connections of socket pairs, and counts them; refuses while `down`."""

    def __init__(self) -> None:
        self.poller = platform.poller_of(asyncio.get_running_loop())
        self.made = 0
        self.down = False
        self.far: list[socket.socket] = []
        self.over = True
        self.carry: Carry | None = None

    def cancel(self) -> None: ...

    def begin(self, connected: Connected, failed: Failed) -> Dialling:
        self.made += 1
        if self.down:
            failed(OutboundError(Failure.PROXY_UNREACHABLE, "it is down"))
            return self
        near, far = socket.socketpair()
        near.setblocking(False)
        self.far.append(far)
        self.poller.watch(near.fileno(), lambda mask: None)
        connected(near, False)
        return self

    def close(self) -> None:
        for sock in self.far:
            sock.close()


async def test_what_nobody_takes_is_replaced_and_in_the_end_fewer_wait() -> None:
    proxies = Proxies()
    pool = WarmPool(proxies.poller, 1, 3, proxies.begin, lambda sock: None, idle_limit=0.1)
    pool.fill()
    taken = [pool.take(), pool.take(), pool.take()]
    assert [sock is not None for sock in taken] == [True, False, False]
    await until(lambda: len(pool) == 3)
    await until(lambda: pool.expired >= 4 and len(pool) == 1)
    pool.close()
    if taken[0] is not None:
        taken[0].close()
    proxies.close()


async def test_under_load_none_are_made_until_it_is_over() -> None:
    """They would save nobody's time, and each costs more than one that is made for its flow."""
    proxies = Proxies()
    pool = WarmPool(proxies.poller, 2, 2, proxies.begin, lambda sock: None)
    pool.fill()
    taken = [pool.take() for _ in range(30)]
    for _ in range(20):
        await asyncio.sleep(0.01)
        taken += [pool.take() for _ in range(8)]
    assert (proxies.made, pool.hits) == (2, 2)
    await until(lambda: len(pool) == 2)
    assert proxies.made == 4
    pool.close()
    for sock in taken:
        if sock is not None:
            sock.close()
    proxies.close()


async def test_a_proxy_that_is_down_is_asked_less_and_less_until_a_flow_comes() -> None:
    proxies = Proxies()
    proxies.down = True
    pool = WarmPool(proxies.poller, 2, 3, proxies.begin, lambda sock: None)
    pool.fill()
    assert proxies.made == 2
    await asyncio.sleep(0.3)
    assert proxies.made == 2
    proxies.down = False
    assert pool.take() is None  # the flow that asks makes its own
    await asyncio.sleep(0.3)
    assert proxies.made <= 5
    pool.close()
    proxies.close()
