"""Buffers of the pool: reused, but never while a packet in the outbox still shows their bytes."""

from __future__ import annotations

import pytest
from conversation import Client, Net
from packets import ACK, RST

from ztun.stack import BufferPool


def test_a_buffer_comes_back_after_it_was_released() -> None:
    pool = BufferPool(size=100)
    first = pool.get()
    pool.release(first)
    assert pool.get() is first
    assert (pool.allocated, pool.reused) == (1, 1)


def test_a_retired_buffer_rests_until_the_outbox_is_empty() -> None:
    pool = BufferPool(size=100)
    pool.outbox = outbox = [b"a packet"]
    buffer = pool.get()
    pool.retire(buffer)
    assert pool.get() is not buffer
    outbox.clear()
    assert pool.get() is buffer


def test_no_more_than_the_most_are_held() -> None:
    pool = BufferPool(size=10, keep=1, most=3)
    for _ in range(4):
        pool.release(memoryview(bytearray(10)))
        pool.retire(memoryview(bytearray(10)))
    assert len(pool) == 3
    assert pool.freed == 5


def test_trimming_lets_go_of_what_nobody_needed() -> None:
    pool = BufferPool(size=10, keep=1)
    for _ in range(5):
        pool.release(memoryview(bytearray(10)))
    pool.trim()
    pool.get()
    pool.trim()
    assert len(pool) == 1


@pytest.mark.parametrize("ending", ["acknowledged", "reset", "aborted"])
def test_packets_that_wait_in_the_outbox_keep_their_bytes(ending: str) -> None:
    """In one batch: data goes out, its need ends, and another flow's data is read into a buffer."""
    net = Net()
    mine, other = Client(net, port=1), Client(net, port=2)
    app = mine.connects()
    other_app = other.connects()
    with net.batch():
        app.sends(b"a" * 8000)
        if ending == "acknowledged":
            mine.acknowledges(8001)  # guessed, before it can have arrived
        elif ending == "reset":
            mine.says(RST, seq=1)
        else:
            app.resets()
        other_app.sends(b"b" * 8000)
    assert mine.hears(ACK, seq=1).payload == b"a" * 8000
    if ending == "aborted":
        mine.hears(RST | ACK)
    assert other.hears(ACK, seq=1).payload == b"b" * 8000


def test_buffers_come_home_when_the_data_is_acknowledged_or_the_connection_ends() -> None:
    net = Net()
    client = Client(net)
    app = client.connects()
    app.sends(bytes(10000))
    client.hears_all()
    client.acknowledges()
    assert len(net.stack.pool) == net.stack.pool.allocated > 0
    app.sends(bytes(10000))
    client.hears_all()
    app.resets()
    client.hears(RST | ACK)
    assert len(net.stack.pool) == net.stack.pool.allocated
