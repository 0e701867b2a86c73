"""Direct connections: to a router that answers with real ICMP, and to hosts with several addresses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import pytest

from ztun.outbound import tcp
from ztun.outbound.base import BaseOutbound, Resolve
from ztun.outbound.direct import DirectOutbound
from ztun.ports import Destination, Failure

from . import netns
from .netns import CLIENT4, NO_ROUTE4, NO_ROUTE6, ROUTER4, ROUTER6, SILENT4, SILENT6, Namespace
from .peers import banner_server, converse
from .support import DEADLINE, MARK, Sockets, nobody, outbound, refused, table, tools, until


def direct(client: Sockets, resolve: Resolve = nobody, deadline: float = 5) -> BaseOutbound:
    return DirectOutbound(tools(client, resolve, deadline))


@contextlib.asynccontextmanager
async def listening(router: Namespace, *addresses: str, port: int = 8080) -> AsyncIterator[list[str]]:
    """Listeners on the router; gives the addresses at which clients arrived."""
    arrived: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(writer.get_extra_info("sockname")[0])
        writer.close()

    async with contextlib.AsyncExitStack() as stack:
        for address in addresses:
            sock = router.socket(tcp.family_of(address), socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, port))
            await stack.enter_async_context(await asyncio.start_server(serve, sock=sock))
        yield arrived


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_an_address(sockets: Sockets, host: str) -> None:
    async with banner_server(host) as port:
        sock = await outbound(sockets, "direct").connect(Destination(host, port))
        assert sockets.made == [sock]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert not sock.getblocking()
        await converse(sock)


async def test_a_name_is_resolved_by_the_injected_resolver(sockets: Sockets) -> None:
    way = outbound(sockets, "direct", resolve=table(server_example=["127.0.0.1"]))
    async with banner_server() as port:
        await converse(await way.connect(Destination("server.example", port)))
    assert (await refused(way, "other.example")).failure is Failure.NAME_NOT_FOUND


async def test_a_name_without_addresses(sockets: Sockets) -> None:
    way = outbound(sockets, "direct", resolve=table(server_example=[]))
    assert (await refused(way, "server.example")).failure is Failure.NAME_NOT_FOUND


async def test_a_resolver_that_does_not_answer(sockets: Sockets) -> None:
    async def never(name: str) -> list[str]:
        await asyncio.sleep(60)
        return []

    way = outbound(sockets, "direct", resolve=never, deadline=DEADLINE)
    assert (await refused(way, "server.example")).failure is Failure.TIMED_OUT


@pytest.mark.parametrize(
    ("host", "failure"),
    [
        (ROUTER4, Failure.REFUSED),
        (ROUTER6, Failure.REFUSED),
        (netns.UNREACHABLE4, Failure.HOST_UNREACHABLE),
        (netns.UNREACHABLE6, Failure.HOST_UNREACHABLE),
        (netns.PROHIBITED4, Failure.HOST_UNREACHABLE),  # Linux reads "administratively prohibited" so for IPv4
        (netns.PROHIBITED6, Failure.PROHIBITED),
        (NO_ROUTE4, Failure.NETWORK_UNREACHABLE),
        (NO_ROUTE6, Failure.NETWORK_UNREACHABLE),
        (SILENT4, Failure.TIMED_OUT),
        (SILENT6, Failure.TIMED_OUT),
    ],
)
async def test_failures_over_the_cable(client: Sockets, host: str, failure: Failure) -> None:
    way = direct(client, deadline=DEADLINE)
    error = await refused(way, host)
    assert error.failure is failure
    assert f"{host} port 80" in str(error)
    assert way.failures == {failure: 1}


@pytest.mark.parametrize(
    ("dead", "pause"),
    [(SILENT6, tcp.ATTEMPT_DELAY), (NO_ROUTE6, 0), (netns.UNREACHABLE6, 0), (ROUTER6, 0)],
    ids=["silent", "no route", "unreachable", "refused"],
)
async def test_ipv4_takes_over_from_an_ipv6_address_that_fails(
    client: Sockets, router: Namespace, dead: str, pause: float
) -> None:
    """RFC 8305, section 5: after the delay, or at once when the attempt failed."""
    way = direct(client, table(dual_example=[ROUTER4, dead]))
    async with listening(router, ROUTER4) as arrived:
        started = time.monotonic()
        (await way.connect(Destination("dual.example", 8080))).close()
        assert pause <= time.monotonic() - started < pause + 0.2
        await until(lambda: arrived == [ROUTER4])
    assert len(client.made) == 2


async def test_ipv6_is_tried_first_and_alone_when_it_answers(client: Sockets, router: Namespace) -> None:
    way = direct(client, table(dual_example=[ROUTER4, ROUTER6]))
    async with listening(router, ROUTER4, ROUTER6) as arrived:
        (await way.connect(Destination("dual.example", 8080))).close()
        await until(lambda: arrived == [ROUTER6])
    assert len(client.made) == 1


async def test_of_several_failures_the_most_telling_is_reported(client: Sockets) -> None:
    way = direct(client, table(dual_example=[NO_ROUTE6, netns.UNREACHABLE4, ROUTER4, NO_ROUTE4]))
    assert (await refused(way, "dual.example")).failure is Failure.REFUSED
    assert len(client.made) == 4


async def test_the_deadline_ends_all_attempts(client: Sockets) -> None:
    way = direct(client, table(dual_example=[SILENT6, SILENT4]), deadline=DEADLINE)
    assert (await refused(way, "dual.example")).failure is Failure.TIMED_OUT
    assert [sock.fileno() for sock in client.made] == [-1, -1]


async def test_cancelling_ends_all_attempts(client: Sockets) -> None:
    dial = asyncio.ensure_future(
        direct(client, table(dual_example=[SILENT6, SILENT4])).connect(Destination("dual.example", 80))
    )
    await until(lambda: len(client.made) == 2)
    dial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dial
    assert [sock.fileno() for sock in client.made] == [-1, -1]


async def test_a_dial_that_is_cancelled_as_it_succeeds_leaves_nothing(sockets: Sockets) -> None:
    """The connection is there, but who asked for it is not any more."""
    async with banner_server() as port:
        for turns in range(6):
            dial = asyncio.ensure_future(outbound(sockets, "direct").connect(Destination("127.0.0.1", port)))
            for _ in range(turns):
                await asyncio.sleep(0)
            dial.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await dial).close()
    sockets.check()


@pytest.mark.parametrize("type", ["socks5", "http"])
@pytest.mark.parametrize("host", [SILENT4, NO_ROUTE4, netns.UNREACHABLE6])
async def test_a_proxy_that_cannot_be_reached(client: Sockets, type: str, host: str) -> None:
    error = await refused(outbound(client, type, 1080, host=host, deadline=DEADLINE), CLIENT4)
    assert error.failure is Failure.PROXY_UNREACHABLE


async def test_a_proxy_whose_name_does_not_resolve(sockets: Sockets) -> None:
    way = outbound(sockets, "socks5", 1080, host="proxy.lan", resolve=table())
    error = await refused(way, "four.example")
    assert error.failure is Failure.PROXY_UNREACHABLE
    assert "its name does not resolve: proxy.lan does not exist" in str(error)


async def test_no_descriptors_left(client: Sockets) -> None:
    def none_left(family: int, type: int) -> socket.socket:
        raise OSError(24, "Too many open files")

    error = await refused(DirectOutbound(tools(none_left, nobody, 5)), ROUTER4)
    assert error.failure is Failure.EXHAUSTED
    assert "Too many open files" in str(error)


async def test_block_refuses_everything(sockets: Sockets) -> None:
    way = outbound(sockets, "block")
    assert (await refused(way, "four.example")).failure is Failure.PROHIBITED
    assert not sockets.made
    assert way.failures == {Failure.PROHIBITED: 1}
