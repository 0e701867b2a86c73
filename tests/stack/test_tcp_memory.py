"""What the account of memory says is what Python takes, near enough, however clients try to make it more."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from conversation import Client, Net
from packets import ACK, SYN

from ztun.stack import StackSettings

_LIMIT = 1 << 20
_FLOWS = 80


class Hoarder:
    """An outbound that takes nothing: what little comes is copied, else the view is kept, as the relay does."""

    def __init__(self) -> None:
        self.kept: list[memoryview] = []

    def established(self, now: float) -> None:
        pass

    def data(self, payload: memoryview, now: float) -> int:
        self.kept.append(payload if len(payload) >= 8192 else memoryview(bytes(payload)))
        return len(payload)

    def eof(self, now: float) -> None:
        pass

    def writable(self, now: float) -> None:
        pass

    def closed(self, how: object, now: float) -> None:
        self.kept.clear()


class Crowd(Net):
    """Many clients, of whom nothing is checked between packets: that would take longer than all the rest."""

    def __init__(self) -> None:
        super().__init__(StackSettings(max_memory=_LIMIT))
        self.clients: list[Client] = []
        for port in range(1000, 1000 + _FLOWS):
            client = Client(self, 4, port=port)
            client.says(SYN, mss=1460, wscale=7, sack_ok=True)
            self.incoming[-1].accept(Hoarder(), self.now)
            client.says(ACK, ack=1)
            client.expected = 1
            self.clients.append(client)

    def collect(self) -> None:
        self.stack.outbox.clear()


def send_out_of_order(crowd: Crowd, size: int) -> None:
    for client in crowd.clients:
        for number in range(30):
            client.says(ACK, bytes(size), seq=10 + number * (size + 1))


def send_what_nobody_takes(crowd: Crowd, size: int) -> None:
    for client in crowd.clients:
        for number in range(10):
            client.says(ACK, bytes(size), seq=1 + number * size)


def acknowledge_nothing(crowd: Crowd, size: int) -> None:
    for conn in crowd.incoming:
        conn.tx.cc.cwnd = 1 << 22
        for _ in range(30):
            if (room := conn.room()) <= 0:
                break
            buffer = crowd.stack.pool.get()  # as the relay does
            count = min(room, size)
            if count < 8192:
                conn.send(memoryview(bytes(buffer[:count])), crowd.now)
                crowd.stack.pool.release(buffer)
            else:
                conn.send(buffer[:count], crowd.now, buffer)
            crowd.collect()


@pytest.fixture
def traced() -> Iterator[None]:
    gc.collect()
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("size", [1, 1460, 32000])
@pytest.mark.parametrize("attack", [send_out_of_order, send_what_nobody_takes, acknowledge_nothing])
@pytest.mark.usefixtures("traced")
def test_memory_is_what_the_account_says(attack: Callable[[Crowd, int], None], size: int) -> None:
    crowd = Crowd()
    before, _ = tracemalloc.get_traced_memory()
    attack(crowd, size)
    after, _ = tracemalloc.get_traced_memory()
    small = 300 * sum(len(conn.handler.kept) for conn in crowd.incoming if isinstance(conn.handler, Hoarder))
    slack = _FLOWS * (2 * 1460 + 3000)  # what each may hold beyond the bound, and the empty containers it has now
    assert crowd.stack.memory.used <= _LIMIT * 5 // 4 + crowd.stack.pool.size + _FLOWS * 2 * 1460
    assert after - before <= 2 * crowd.stack.memory.used + small + slack
    for conn in list(crowd.stack.connections.values()):
        conn.abort(crowd.now)
    assert crowd.stack.memory.used == 0
