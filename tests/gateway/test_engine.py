"""The read loop, with a device and a clock made by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ztun.gateway.engine import Engine
from ztun.platform import poller_of
from ztun.ports import Buffer
from ztun.stack import BufferPool, Connection, Datagram, Stack, StackSettings


class Device:
    """Notes when packets are written, among whatever else `order` has."""

    name, mtu = "wire", 1500

    def __init__(self, order: list[str]) -> None:
        self._order = order

    def fileno(self) -> int:
        raise AssertionError("nothing is read here")

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        return 0

    def send(self, buffers: Sequence[Buffer]) -> bool:
        self._order.append("packet")
        return True

    def reopen(self) -> None: ...

    def close(self) -> None: ...


class Nobody:
    """A listener that nothing comes to."""

    def tcp_incoming(self, conn: Connection, now: float) -> None: ...

    def udp_received(self, datagram: Datagram, now: float) -> None: ...

    def udp_refused(self, quoted: bytes | memoryview, now: float) -> None: ...

    def echo_requested(self, *_: object) -> bool:
        return False


async def test_after_a_silence_the_heart_beats_before_the_first_packet() -> None:
    order: list[str] = []
    loop = asyncio.get_running_loop()
    poller, pool = poller_of(loop), BufferPool()
    poller.pulse = lambda: order.append("pulse")
    stack = Stack(Nobody(), StackSettings(), lambda key, now: 1, pool)
    engine = Engine(loop, poller, Device(order), stack, pool)
    now = 1000.0
    engine.now = lambda: now

    stack.outbox += [(b"one",), (b"two",)]
    engine.send()
    assert order == ["pulse", "packet", "packet"]

    now += 0.01
    stack.outbox.append((b"three",))
    engine.send()
    assert order[3:] == ["packet"]

    now += 60  # it stood still
    engine.send()  # with nothing to say
    stack.outbox.append((b"four",))
    engine.send()
    assert order[4:] == ["pulse", "packet"]
