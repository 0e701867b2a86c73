"""Run in a network namespace of its own: a Gateway on a real TUN that loses packets, and this kernel's TCP as client.

Prints one line of JSON: what arrived, how long it took, and what the stack did. Usage: lossy_world.py JSON-OPTIONS.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from ztun import platform
from ztun.gateway.gateway import Gateway, GatewayOptions
from ztun.platform.linux.tun import TunDevice, open_tun
from ztun.ports import Buffer, Connected, DatagramLink, Destination, Dialling, Failed, Failure, OutboundError
from ztun.rules import Decision, FlowInfo

_CLIENTS_VIEW = {4: "10.99.0.5", 6: "fd99::5"}  # addresses behind the TUN; any will do
_NAME = "zlossy"


class BadDevice:
    """A TunDevice that drops, repeats and delays packets both ways, by chance. A super-segment is one packet."""

    def __init__(self, device: TunDevice, seed: int, drop: float, repeat: float, delay: float) -> None:
        self.name, self.mtu = device.name, device.mtu
        self.bad = False  # handshakes may pass: a lost SYN costs a second and says nothing about the transfer
        self.dropped = 0
        self._device = device
        self._random = random.Random(seed)
        self._chances = (drop, drop + repeat, drop + repeat + delay)
        self._in: list[tuple[int, bytes]] = []  # (after so many packets, packet)
        self._out: list[tuple[int, bytes]] = []

    def fileno(self) -> int:
        return self._device.fileno()

    def close(self) -> None:
        self._device.close()

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        while True:
            if self._in and self._in[0][0] <= 0:
                _, late = self._in.pop(0)
                buffer[: len(late)] = late
                return len(late)
            length = self._device.recv_into(buffer)
            if not length:
                return 0
            self._in = [(after - 1, packet) for after, packet in self._in]
            if not self._is_hindered(self._in, bytes(buffer[:length])):
                return length

    def send(self, buffers: Sequence[Buffer]) -> bool:
        packet = b"".join(buffers)
        self._out = [(after - 1, late) for after, late in self._out]
        if not self._is_hindered(self._out, packet):
            self._device.send((packet,))
        while self._out and self._out[0][0] <= 0:
            self._device.send((self._out.pop(0)[1],))
        return True

    def _is_hindered(self, late: list[tuple[int, bytes]], packet: bytes) -> bool:
        """True when the packet does not pass now."""
        chance = self._random.random() if self.bad else 1.0
        drop, repeat, delay = self._chances
        if chance < drop:
            self.dropped += 1
            return True
        if chance < repeat:
            late.append((1, packet))
            return False
        if chance < delay:
            late.append((self._random.randint(1, 3), packet))
            return True
        return False


class AllDirect:
    """Rules, names, DNS and outbound in one: everything goes to the same port on the loopback interface."""

    tag = type = "loopback"
    asks_origin = False

    def statistics(self) -> dict[str, int]:
        return {}

    def decide(self, flow: FlowInfo) -> Decision:
        return Decision("loopback", 0)

    def decide_learned(self, flow: FlowInfo, rule: int) -> Decision:
        return Decision("loopback", rule)

    def contains(self, address: bytes) -> bool:
        return False

    def name_of(self, address: bytes) -> str | None:
        return None

    def acquire(self, address: bytes) -> None: ...

    def release(self, address: bytes) -> None: ...

    async def answer(self, query: bytes | memoryview, *, over_tcp: bool) -> bytes | None:
        return None

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        sock = socket.create_connection(("127.0.0.1", destination.port))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        platform.poller_of(asyncio.get_running_loop()).watch(sock.fileno(), lambda mask: None)
        connected(sock, True)
        return self

    def cancel(self) -> None: ...

    async def open_datagrams(self, *args: Any) -> DatagramLink:
        raise OutboundError(Failure.UNSUPPORTED, "no datagrams here")

    async def close(self) -> None: ...


async def serve(payload: bytes, uploads: asyncio.Queue[bytes]) -> tuple[int, int, list[asyncio.Server]]:
    """Two servers: one sends `payload` and closes, one takes everything, says so and closes. Their ports come first."""

    async def source(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(payload)
        await writer.drain()
        writer.close()

    async def sink(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await uploads.put(await reader.read())
        writer.write(b"taken")
        writer.close()

    servers = [await asyncio.start_server(handler, "127.0.0.1", 0) for handler in (source, sink)]
    ports = [server.sockets[0].getsockname()[1] for server in servers]
    return ports[0], ports[1], servers


def set_up(mtu: int) -> TunDevice:
    device = open_tun(_NAME, mtu)
    for command in (
        "link set lo up",
        f"addr add 10.99.0.1/24 dev {_NAME}",
        f"-6 addr add fd99::1/64 dev {_NAME} nodad",
        f"link set {_NAME} up mtu {mtu} txqueuelen 1000",
    ):
        subprocess.run(["ip", *command.split()], check=True)
    return device


async def run(options: dict[str, Any]) -> dict[str, Any]:
    payload = random.Random(7).randbytes(options["size"])
    device = BadDevice(set_up(1500), options["seed"], options["drop"], options["repeat"], options["delay"])
    world: Any = AllDirect()
    gateway = Gateway(
        loop=asyncio.get_running_loop(),
        poller=platform.poller_of(asyncio.get_running_loop()),
        device=device,
        rules=world,
        names=world,
        dns=world,
        outbounds={"loopback": world},
        options=GatewayOptions(hijack_dns=False),
    )
    gateway.start()
    uploads: asyncio.Queue[bytes] = asyncio.Queue()
    down_port, up_port, servers = await serve(payload, uploads)
    host = _CLIENTS_VIEW[options["family"]]
    try:
        reader, writer = await asyncio.open_connection(host, down_port)
        device.bad = True
        began = time.monotonic()
        downloaded = await reader.read()
        writer.close()
        down_took = time.monotonic() - began
        device.bad = False
        reader, writer = await asyncio.open_connection(host, up_port)
        device.bad = True
        began = time.monotonic()
        writer.write(payload)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        up_took = time.monotonic() - began
    finally:
        device.bad = False
        for server in servers:
            server.close()
    statistics = gateway.statistics()
    await gateway.stop()
    device.close()
    return {
        "down": downloaded == payload,
        "up": await uploads.get() == payload and answer == b"taken",
        "down_took": round(down_took, 3),
        "up_took": round(up_took, 3),
        "dropped": device.dropped,
        "errors": gateway.engine.errors,
        "drops": statistics["drops"],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.loads(sys.argv[1])))))
