"""Connections of flows that live are kept alive; most flows do not live long enough to need it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Sequence
from ipaddress import ip_network

import pytest
from scapy.layers.inet import IP, TCP

from ztun import platform
from ztun.gateway import gateway as gateway_module
from ztun.gateway.gateway import Gateway, GatewayOptions
from ztun.names.pool import FakeIpPool
from ztun.outbound import Tools
from ztun.outbound.direct import DirectOutbound
from ztun.ports import Buffer
from ztun.rules import Rules
from ztun.wire import vnet

CLIENT, SERVER = "10.0.0.7", "192.0.2.1"


class Wire:
    """A device whose packets the test puts there, and that keeps what is sent."""

    name, mtu = "wire", 1500

    def __init__(self) -> None:
        self.sent: list[IP] = []
        self._there: list[bytes] = []
        self._bell, self._ring = os.pipe()

    def says(self, packet: IP) -> None:
        self._there.append(vnet.EMPTY + bytes(packet))
        os.write(self._ring, b"!")

    def fileno(self) -> int:
        return self._bell

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        if not self._there:
            os.read(self._bell, 1)
            return 0
        packet = self._there.pop(0)
        buffer[: len(packet)] = packet
        return len(packet)

    def send(self, buffers: Sequence[Buffer]) -> bool:
        self.sent.append(IP(b"".join(buffers)[len(vnet.EMPTY) :]))
        return True

    def close(self) -> None:
        os.close(self._bell)
        os.close(self._ring)


class ToLoopback(socket.socket):
    """A socket for which SERVER is on this host."""

    def connect_ex(self, address: tuple[str, int]) -> int:  # type: ignore[override]
        assert address[0] == SERVER
        return super().connect_ex(("127.0.0.1", address[1]))


class NoDns:
    def statistics(self) -> dict[str, int]:
        return {}

    def answer(self, query: bytes | memoryview, *, over_tcp: bool) -> Awaitable[bytes | None]:
        raise AssertionError


@contextlib.asynccontextmanager
async def gateway(wire: Wire, made: list[socket.socket]) -> AsyncIterator[Gateway]:
    """One that goes out directly, with sockets that are kept in `made`."""

    def factory(family: int, type: int) -> socket.socket:
        sock = ToLoopback(family, type | socket.SOCK_NONBLOCK)
        made.append(sock)
        return sock

    async def resolve(name: str) -> list[str]:
        raise AssertionError

    loop = asyncio.get_running_loop()
    poller = platform.poller_of(loop)
    it = Gateway(
        loop=loop,
        poller=poller,
        device=wire,
        rules=Rules([], "direct"),
        names=FakeIpPool(ip_network("198.18.0.0/15"), None, 16, 0.0, None),
        dns=NoDns(),
        outbounds={"direct": DirectOutbound(Tools(poller, factory, resolve, 5))},
        options=GatewayOptions(keepalive_interval=75),
    )
    it.start()
    try:
        yield it
    finally:
        await it.stop()
        wire.close()


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def establish(wire: Wire, port: int, sport: int) -> None:
    segment = IP(src=CLIENT, dst=SERVER) / TCP(sport=sport, dport=port, flags="S", seq=1000)
    wire.says(segment)
    await until(lambda: [packet for packet in wire.sent if packet[TCP].dport == sport])
    answer = next(packet for packet in wire.sent if packet[TCP].dport == sport)
    assert answer[TCP].flags == "SA"
    wire.says(IP(src=CLIENT, dst=SERVER) / TCP(sport=sport, dport=port, flags="A", seq=1001, ack=answer[TCP].seq + 1))


@pytest.mark.parametrize("make", [platform.make_event_loop, asyncio.new_event_loop], ids=["poller", "asyncio"])
def test_a_connection_that_lives_is_kept_alive(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gateway_module._YOUNG == 5
    monkeypatch.setattr(gateway_module, "_YOUNG", 0.3)
    with asyncio.Runner(loop_factory=make) as runner:  # type: ignore[arg-type]
        runner.run(_lives())


async def _lives() -> None:
    wire, made = Wire(), []
    with socket.create_server(("127.0.0.1", 0)) as server:
        async with gateway(wire, made):
            await establish(wire, server.getsockname()[1], 40000)
            await until(lambda: made)
            (sock,) = made
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            await until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 75
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 75
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
            await establish(wire, server.getsockname()[1], 40001)  # and the next one is young again
            assert made[1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
            await until(lambda: made[1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
