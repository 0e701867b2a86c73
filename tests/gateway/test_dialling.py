"""What becomes of a Fake-IP when the client gives up on its connection."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address, ip_network

import pytest
from scapy.layers.inet import IP, TCP

from ztun import platform
from ztun.gateway.gateway import Gateway, GatewayOptions
from ztun.names.pool import FakeIpPool
from ztun.ports import Buffer, Connected, DatagramHandler, DatagramLink, Destination, Dialling, Failed, OutboundError
from ztun.rules import Rules
from ztun.wire import vnet

CLIENT = "10.0.0.7"


class Silent:
    """An outbound that never answers."""

    tag = type = "office"

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        return self

    def cancel(self) -> None: ...

    async def open_datagrams(
        self, on_datagram: DatagramHandler, on_failure: Callable[[OutboundError], None], on_unreachable: object = None
    ) -> DatagramLink:
        raise AssertionError

    async def close(self) -> None: ...


class Wire:
    """A device whose packets the test puts there; what is sent is lost."""

    name, mtu = "wire", 1500

    def __init__(self) -> None:
        self.there: list[bytes] = []
        self._bell, self._ring = os.pipe()

    def says(self, *packets: bytes) -> None:
        """Put them there in one batch."""
        self.there += packets
        os.write(self._ring, b"!")

    def fileno(self) -> int:
        return self._bell

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        if not self.there:
            os.read(self._bell, 1)
            return 0
        packet = self.there.pop(0)
        buffer[: len(packet)] = packet
        return len(packet)

    def send(self, buffers: Sequence[Buffer]) -> bool:
        return True

    def close(self) -> None:
        os.close(self._bell)
        os.close(self._ring)


class NoDns:
    def statistics(self) -> dict[str, int]:
        return {}

    def answer(self, query: bytes | memoryview, *, over_tcp: bool) -> Awaitable[bytes | None]:
        raise AssertionError


def segment(destination: bytes, flags: str, seq: int) -> bytes:
    packet = IP(src=CLIENT, dst=str(ip_address(destination))) / TCP(sport=40000, dport=443, flags=flags, seq=seq)
    return vnet.EMPTY + bytes(packet)


@pytest.mark.parametrize("batches", [1, 2], ids=["before the dial began", "while it is under way"])
async def test_a_client_that_gives_up_lets_go_of_its_fake_ip(batches: int) -> None:
    names = FakeIpPool(ip_network("198.18.0.0/15"), None, 16, 0.0, None)
    address = names.assign("www.test", 0.0).v4
    device = Wire()
    gateway = Gateway(
        loop=asyncio.get_running_loop(),
        poller=platform.poller_of(asyncio.get_running_loop()),
        device=device,
        rules=Rules([], "office"),
        names=names,
        dns=NoDns(),
        outbounds={"office": Silent()},
        options=GatewayOptions(),
    )
    gateway.start()
    try:
        opening, reset = segment(address, "S", 1000), segment(address, "R", 1001)
        if batches == 1:
            device.says(opening, reset)
        else:
            device.says(opening)
            await asyncio.sleep(0.05)
            device.says(reset)
        await asyncio.sleep(0.05)
        assert gateway.statistics()["tcp"]["total"] == 1
        assert gateway.statistics()["tcp"]["active"] == 0
        with pytest.raises(ValueError, match=r"."):
            names.release(address)  # nobody holds it any more
    finally:
        await gateway.stop()
        device.close()
