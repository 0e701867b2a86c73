"""Outbounds from their settings, and a proxy whose name server fails."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Iterable

import pytest

from ztun import platform
from ztun.errors import ConfigError
from ztun.outbound import OutboundSpec, Tools, base, make_outbounds
from ztun.ports import Destination, Failure, OutboundError

from .peers import banner_server, converse
from .support import Sockets, nobody, outbound, table


def make(*specs: OutboundSpec) -> dict[str, str]:
    loop = platform.make_event_loop()
    try:
        some = Tools(platform.poller_of(loop), Sockets(socket.socket), nobody, 5)
        return {tag: way.type for tag, way in make_outbounds(specs, some).items()}
    finally:
        loop.close()


def test_direct_and_block_are_always_there() -> None:
    office, web = OutboundSpec("office", "socks5", "::1", 1080), OutboundSpec("web", "http", "proxy.lan", 3128)
    assert make(office, web) == {"direct": "direct", "block": "block", "office": "socks5", "web": "http"}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (OutboundSpec("block", "socks5", "::1", 1080), "this tag is taken"),
        (OutboundSpec("it", "socks4", "::1", 1080), "unknown type 'socks4'"),
        (OutboundSpec("it", "socks5", "", 1080), "HOST:PORT"),
        (OutboundSpec("it", "http", "::1", 65536), "HOST:PORT"),
        (OutboundSpec("it", "socks5", "::1", 1080, "u" * 256, "p"), "1 to 255 bytes"),
        (OutboundSpec("it", "socks5", "::1", 1080, "u", "ü" * 128), "1 to 255 bytes"),
        (OutboundSpec("it", "socks5", "::1", 1080, "u"), "1 to 255 bytes"),
        (OutboundSpec("it", "http", "::1", 3128, "u:v", "p"), "without a colon"),
        (OutboundSpec("it", "http", "::1", 3128, None, "p"), "needs a username"),
        (OutboundSpec("it", "http", "::1", 3128, udp="proxy"), "set udp to reject or direct"),
    ],
)
def test_settings_that_no_proxy_could_be_used_with(spec: OutboundSpec, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make(spec)
    assert f"outbound '{spec.tag}'" in str(caught.value)


async def test_a_proxy_stays_reachable_while_its_name_does_not_resolve(
    sockets: Sockets, microsocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_REMEMBERED", 0.0)
    answers: list[list[str] | None] = [["127.0.0.1"], None, []]

    async def resolve(name: str) -> list[str]:
        answer = answers.pop(0)
        if answer is None:
            raise OutboundError(Failure.TIMED_OUT, "no name server answered")
        return answer

    way = outbound(sockets, "socks5", microsocks, host="proxy.lan", resolve=resolve)
    async with banner_server() as port:
        for _ in range(3):
            await converse(await way.connect(Destination("four.example", port)))
    assert not answers


async def test_a_burst_of_dials_asks_for_the_proxys_name_once(
    sockets: Sockets, microsocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "_REMEMBERED", 60.0)
    asked = []
    answer = table(proxy_lan=["127.0.0.1"])

    def resolve(name: str) -> Awaitable[Iterable[str]]:
        asked.append(name)
        return answer(name)

    way = outbound(sockets, "socks5", microsocks, host="proxy.lan", resolve=resolve)
    async with banner_server() as port:
        for _ in range(5):
            await converse(await way.connect(Destination("four.example", port)))
    assert asked == ["proxy.lan"]
