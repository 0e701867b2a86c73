"""Open files before and after every way in which a dial can end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable

import pytest

from ztun.outbound import OutboundSpec, make_outbounds
from ztun.outbound.base import BaseOutbound
from ztun.ports import Destination, OutboundError

from . import scripted
from .scripted import Step, drips, falls_silent, hears_until, resets, says
from .support import Sockets, same_descriptors, table, tools

HOW_IT_ENDS: dict[str, list[Step]] = {
    "socks5 granted": [says(b"\x05\x00"), hears_until(b"\x00\x50"), says(b"\x05\x00\x00\x01" + bytes(6))],
    "socks5 refused": [says(b"\x05\x00"), hears_until(b"\x00\x50"), says(b"\x05\x05\x00\x01" + bytes(6))],
    "socks5 relay": [says(b"\x05\x00"), hears_until(bytes(6)), says(b"\x05\x00\x00\x01" + bytes(5) + b"\x09")],
    "http granted": [hears_until(b"\r\n\r\n"), says(b"HTTP/1.1 200 OK\r\n\r\n220 banner")],
    "http refused": [hears_until(b"\r\n\r\n"), says(b"HTTP/1.1 403 No\r\n\r\n<html>")],
    "garbage": [says(b"\xff" * 3000)],
    "closes": [],
    "resets": [resets()],
    "silent": [falls_silent()],
    "drips": [drips(b"HTTP/1.1 200 OK\r\n", 0.01), falls_silent()],
}  # fmt: skip


async def connect(way: BaseOutbound) -> None:
    (await way.connect(Destination("four.example", 80))).close()


async def associate(way: BaseOutbound) -> None:
    (await way.open_datagrams(lambda *_: None, lambda _: None)).close()


async def connect_cancelled(way: BaseOutbound) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(connect(way), 0.02)


@pytest.mark.parametrize("ask", [connect, associate, connect_cancelled])
@pytest.mark.parametrize("ending", HOW_IT_ENDS)
@pytest.mark.parametrize("type", ["socks5", "http"])
async def test_no_ending_leaves_a_descriptor(
    type: str, ending: str, ask: Callable[[BaseOutbound], Awaitable[None]]
) -> None:
    sockets = Sockets(socket.socket)  # which keeps a reference: nothing is closed for being forgotten
    with same_descriptors():
        async with scripted.proxy(*HOW_IT_ENDS[ending], patient=False) as port:
            spec = OutboundSpec("it", type, "proxy.lan", port)
            resolve = table(proxy_lan=["127.0.0.1", "127.0.0.2"])
            ways = make_outbounds([spec], tools(sockets, resolve, 0.1))
            way = ways["it"]
            assert isinstance(way, BaseOutbound)
            endings = await asyncio.gather(*(ask(way) for _ in range(5)), return_exceptions=True)
        assert all(end is None or isinstance(end, OutboundError) for end in endings), endings
        await asyncio.sleep(0.02)
