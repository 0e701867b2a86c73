"""Connections through real proxies: microsocks, Dante or sing-box (`socks_udp`), tinyproxy."""

from __future__ import annotations

import asyncio
import socket

import pytest

from ztun.ports import Destination, Failure

from . import peers
from .peers import LONG_NAME, PASSWORD, USER, banner_server, converse
from .support import MARK, Sockets, outbound, refused, table

NAMES = ("127.0.0.1", "four.example", LONG_NAME)


@pytest.mark.parametrize("host", NAMES)
async def test_microsocks_carries_a_conversation_and_resolves_the_name(
    sockets: Sockets, microsocks: int, host: str
) -> None:
    way = outbound(sockets, "socks5", microsocks)
    async with banner_server() as port:
        await converse(await way.connect(Destination(host, port)))


@pytest.mark.parametrize("host", ["::1", "six.example"])
async def test_microsocks_reaches_an_ipv6_destination(sockets: Sockets, microsocks: int, host: str) -> None:
    way = outbound(sockets, "socks5", microsocks)
    async with banner_server("::1") as port:
        await converse(await way.connect(Destination(host, port)))


async def test_a_proxy_on_an_ipv6_address(sockets: Sockets, tmp_path_factory: pytest.TempPathFactory) -> None:
    with peers.microsocks(tmp_path_factory.mktemp("six"), host="::1") as proxy:
        way = outbound(sockets, "socks5", proxy, host="::1")
        async with banner_server() as port:
            await converse(await way.connect(Destination("127.0.0.1", port)))


async def test_a_proxy_given_by_name_is_resolved_by_us(sockets: Sockets, microsocks: int) -> None:
    way = outbound(sockets, "socks5", microsocks, host="proxy.lan", resolve=table(proxy_lan=["127.0.0.1"]))
    async with banner_server() as port:
        await converse(await way.connect(Destination("four.example", port)))


@pytest.mark.parametrize("kind", ["microsocks_auth", "socks_udp_auth"])
async def test_socks5_with_username_and_password(sockets: Sockets, request: pytest.FixtureRequest, kind: str) -> None:
    way = outbound(sockets, "socks5", request.getfixturevalue(kind), username=USER, password=PASSWORD)
    async with banner_server() as port:
        await converse(await way.connect(Destination("four.example", port)))


@pytest.mark.parametrize("kind", ["microsocks_auth", "socks_udp_auth"])
@pytest.mark.parametrize(("username", "password"), [(USER, "wrong"), ("nobody", PASSWORD), (None, None)])
async def test_socks5_with_wrong_or_no_credentials(
    sockets: Sockets, request: pytest.FixtureRequest, kind: str, username: str | None, password: str | None
) -> None:
    way = outbound(sockets, "socks5", request.getfixturevalue(kind), username=username, password=password)
    error = await refused(way, "127.0.0.1")
    assert error.failure is Failure.PROXY_AUTHENTICATION
    assert way.failures == {Failure.PROXY_AUTHENTICATION: 1}


@pytest.mark.parametrize("host", NAMES)
async def test_socks5_server_that_can_do_udp_carries_a_conversation(
    sockets: Sockets, socks_udp: int, host: str
) -> None:
    way = outbound(sockets, "socks5", socks_udp)
    async with banner_server() as port:
        await converse(await way.connect(Destination(host, port)))


@pytest.mark.parametrize("kind", ["microsocks", "socks_udp"])
async def test_socks5_tells_that_the_destination_refused(
    sockets: Sockets, request: pytest.FixtureRequest, kind: str
) -> None:
    way = outbound(sockets, "socks5", request.getfixturevalue(kind))
    error = await refused(way, "127.0.0.1", peers.free_port())
    assert error.failure is Failure.REFUSED


async def test_socks5_tells_that_its_ruleset_forbids(sockets: Sockets, socks_udp: int) -> None:
    error = await refused(outbound(sockets, "socks5", socks_udp), "127.0.0.66")
    assert error.failure is peers.FORBIDDEN


@pytest.mark.parametrize("host", NAMES)
async def test_tinyproxy_carries_a_conversation_and_resolves_the_name(
    sockets: Sockets, tinyproxy: int, host: str
) -> None:
    way = outbound(sockets, "http", tinyproxy)
    async with banner_server() as port:
        await converse(await way.connect(Destination(host, port)))


@pytest.mark.parametrize("host", ["::1", "six.example"])
async def test_tinyproxy_reaches_an_ipv6_destination(sockets: Sockets, tinyproxy: int, host: str) -> None:
    way = outbound(sockets, "http", tinyproxy)
    async with banner_server("::1") as port:
        await converse(await way.connect(Destination(host, port)))


async def test_http_with_username_and_password(sockets: Sockets, tinyproxy_auth: int) -> None:
    way = outbound(sockets, "http", tinyproxy_auth, username=USER, password=PASSWORD)
    async with banner_server() as port:
        await converse(await way.connect(Destination("four.example", port)))


@pytest.mark.parametrize(("username", "password"), [(USER, "wrong"), (None, None)])
async def test_http_with_wrong_or_no_credentials(
    sockets: Sockets, tinyproxy_auth: int, username: str | None, password: str | None
) -> None:
    way = outbound(sockets, "http", tinyproxy_auth, username=username, password=password)
    assert (await refused(way, "four.example")).failure is Failure.PROXY_AUTHENTICATION


async def test_tinyproxy_tells_that_its_filter_forbids(sockets: Sockets, tinyproxy: int) -> None:
    assert (await refused(outbound(sockets, "http", tinyproxy), "blocked.example")).failure is Failure.PROHIBITED


@pytest.mark.parametrize("type", ["socks5", "http"])
async def test_nobody_listens_where_the_proxy_should_be(sockets: Sockets, type: str) -> None:
    error = await refused(outbound(sockets, type, peers.free_port()), "four.example")
    assert error.failure is Failure.PROXY_UNREACHABLE
    assert "Connection refused" in str(error)


@pytest.mark.parametrize(("type", "kind"), [("socks5", "microsocks"), ("http", "tinyproxy")])
async def test_the_socket_is_ours_marked_and_prompt(
    sockets: Sockets, request: pytest.FixtureRequest, type: str, kind: str
) -> None:
    way = outbound(sockets, type, request.getfixturevalue(kind))
    async with banner_server() as port:
        sock = await way.connect(Destination("127.0.0.1", port))
        assert sockets.made == [sock]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert not sock.getblocking()
        await converse(sock)


async def test_forty_connections_at_once(sockets: Sockets, microsocks: int) -> None:
    way = outbound(sockets, "socks5", microsocks)
    async with banner_server() as port:
        opened = await asyncio.gather(*(way.connect(Destination("four.example", port)) for _ in range(40)))
        assert way.statistics()["dialling"] == 0
        await asyncio.gather(*(converse(sock) for sock in opened))
    assert way.statistics() == {
        "type": "socks5", "dials": 40, "dialling": 0, "datagram_links": 0, "failures": {}, "drops": {},
        "udp": {"verdict": "proxy", "opened": 0, "lost": 0, "refused": 0, "reason": None},
        "together": None,
    }  # fmt: skip
