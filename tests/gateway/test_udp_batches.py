"""What a batch of datagrams costs between the device and a proxy's relay: system calls, counted."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from udp_world import SITE, Device, datagram

from ztun import platform
from ztun.gateway.engine import Engine
from ztun.gateway.limits import Limits
from ztun.gateway.routing import Route
from ztun.gateway.udp_relay import UdpRelay
from ztun.outbound.associate import AssociateLink, encode_header
from ztun.ports import Destination
from ztun.stack import BufferPool, Datagram, Stack, StackSettings
from ztun.wire import checksum, udp, vnet

UDP_GRO, SO_RCVBUFFORCE = 104, 33
HEADER = encode_header(Destination("192.0.2.7", 53))


class World:
    """A relay between a device and a SOCKS5 server's UDP socket, which the test holds. Everything is sent to SITE."""

    tag, type, tags = "socks", "socks5", ("socks",)

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.poller = platform.poller_of(loop)
        self.device = Device()
        self.pool = BufferPool()
        self.stack = Stack(self, StackSettings(), lambda key, now: 1, self.pool)
        self.engine = Engine(loop, self.poller, self.device, self.stack, self.pool)
        self.relay = UdpRelay(self.engine, self, self, 300.0, Limits(), lambda datagram: None)  # type: ignore[arg-type]
        self.server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.server.bind(("127.0.0.1", 0))
        self.server.settimeout(2)
        self.server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
        self.server.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        self.own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.own.setblocking(False)
        self.own.connect(self.server.getsockname())
        self.control, self._far_control = socket.socketpair()
        self.control.setblocking(False)

    # Router, outbound and listener.

    def route(self, *flow: object) -> Route:
        return Route(self, Destination("192.0.2.7", 53), 0, False)  # type: ignore[arg-type]

    def refuse_datagrams(self) -> None:
        return None

    async def open_datagrams(self, on_datagram: Any, on_failure: Any, on_unreachable: Any) -> AssociateLink:
        return AssociateLink(self.poller, self.control, self.own, on_datagram, on_failure, Counter())

    def udp_received(self, datagram: Datagram, now: float) -> None:
        self.relay.receive(datagram, now)

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nobody should ask for {name}")

    # What a test does.

    def client_says(self, payloads: Sequence[bytes]) -> None:
        """All of it is there when the device becomes readable."""
        for payload in payloads:
            self.device.said.append(datagram(payload))
        self.engine._readable(1)

    def server_hears(self, count: int) -> list[list[bytes]]:
        """The next datagrams, together where they were sent with one call."""
        calls: list[list[bytes]] = []
        while sum(map(len, calls)) < count:
            data, ancillary, _, _ = self.server.recvmsg(65536, 64)
            size = struct.unpack("=i", ancillary[0][2])[0] if ancillary else len(data)
            calls.append([data[at : at + size] for at in range(0, len(data), size)])
        return calls

    async def server_says(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            self.server.sendto(HEADER + payload, self.own.getsockname())
        await asyncio.sleep(0.02)


@asynccontextmanager
async def opened() -> AsyncIterator[World]:
    """The association is there, and one datagram has passed."""
    world = World()
    world.client_says([b"first"])
    await asyncio.sleep(0.01)
    assert world.server_hears(1) == [[HEADER + b"first"]]
    yield world
    world.relay.close()
    for sock in (world.server, world._far_control):
        sock.close()


def numbered(count: int, size: int) -> list[bytes]:
    return [struct.pack("!I", number) + bytes(size - 4) for number in range(count)]


async def test_up_64_reads_are_two_calls() -> None:
    async with opened() as world:
        payloads = numbered(64, 1200)
        world.client_says(payloads)
        heard = world.server_hears(64)
        assert [len(call) for call in heard] == [53, 11]
        assert [datagram for call in heard for datagram in call] == [HEADER + payload for payload in payloads]
        assert world.relay.sent == 65


async def test_down_54_datagrams_are_one_packet() -> None:
    async with opened() as world:
        payloads = numbered(54, 1200)
        for _ in range(2):  # as well when their size is known already
            await world.server_says(payloads)
            (packet,) = world.device.written
            assert udp.segment_size(memoryview(packet)) == 1200
            assert packet[vnet.LENGTH + 28 :] == b"".join(payloads)
            assert checksum.is_valid(packet[vnet.LENGTH : vnet.LENGTH + 20])
            world.device.written.clear()
        assert world.relay.received == 108


async def test_down_a_stranger_between_two_runs_has_its_own_packet() -> None:
    async with opened() as world:
        stranger = encode_header(Destination("192.0.2.9", 53))
        for payload in numbered(3, 100):
            world.server.sendto(HEADER + payload, world.own.getsockname())
        world.server.sendto(stranger + b"x" * 100, world.own.getsockname())
        await world.server_says(numbered(3, 100))
        sources = [packet[vnet.LENGTH + 12 : vnet.LENGTH + 16] for packet in world.device.written]
        assert sources == [SITE, bytes([192, 0, 2, 9]), SITE]
        assert [len(packet) - vnet.LENGTH - 28 for packet in world.device.written] == [300, 100, 300]
