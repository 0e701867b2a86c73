"""Two ends and a bad link between them, in virtual time: everything arrives, whole, and within a stated time."""

from __future__ import annotations

import random

import pytest
from conversation import Client, Net
from simulated import Weather, transfer

from ztun.stack import Closed, State

_SIZE = 256 << 10  # bytes, each way at once
# Seconds for them at a round trip of 20 ms, by loss. A link without loss takes 0.1.
_LIMITS = {0.0: 1.0, 0.01: 1.5, 0.05: 4.0, 0.1: 6.0}


@pytest.mark.parametrize("loss", _LIMITS)
@pytest.mark.parametrize("reorder", [0.0, 0.1])
@pytest.mark.parametrize("whole", [False, True], ids=["segments", "super-segments"])
@pytest.mark.parametrize("modern", [True, False], ids=["sack", "bare"])
def test_everything_arrives(loss: float, reorder: float, whole: bool, modern: bool) -> None:
    net = Net()
    client = Client(net, 4 if whole else 6, isn=(1 << 32) - 100_000)
    seed = f"{loss} {reorder} {whole} {modern}"
    down, up = random.Random(seed + "d").randbytes(_SIZE), random.Random(seed + "u").randbytes(_SIZE)
    weather = Weather(loss=loss, reorder=reorder, duplicate=0.02, whole=whole)
    options = {"sack_ok": True, "ts": (client.clock(), 0)} if modern else {}
    limit = _LIMITS[loss] * (1 if modern else 2)
    outcome = transfer(client, weather, seed, down, up, limit, **options)
    assert outcome.up == up
    assert outcome.down == down, f"{len(outcome.down)} bytes in {outcome.seconds} s"
    assert outcome.far.from_stack.lost > 0 or not loss
    assert outcome.app.how in (Closed.FINISHED, None)


def test_a_tenth_of_a_percent_of_loss_is_hardly_felt() -> None:
    net = Net()
    client = Client(net)
    down = random.Random(1).randbytes(2 << 20)
    weather = Weather(loss=0.001, rate=12.5e6)  # 100 Mb/s: 0.17 s for the bytes alone
    outcome = transfer(client, weather, "rare", down, b"", 2.0, sack_ok=True, ts=(client.clock(), 0))
    assert outcome.down == down
    assert outcome.seconds < 1.5
    assert outcome.far.from_stack.lost > 0


def test_without_loss_nothing_is_sent_twice() -> None:
    net = Net()
    client = Client(net)
    down = random.Random(2).randbytes(2 << 20)
    outcome = transfer(client, Weather(), "fair", down, down[: 1 << 20], 5.0, sack_ok=True, ts=(client.clock(), 0))
    assert outcome.down == down
    assert outcome.app.conn.tx.retransmits == 0


def test_buffers_and_connections_are_given_back() -> None:
    net = Net()
    client = Client(net)
    down = random.Random(3).randbytes(_SIZE)
    outcome = transfer(client, Weather(loss=0.05, reorder=0.1), "back", down, down, 20.0, sack_ok=True)
    outcome.far.clock.run(net.now + 400, lambda: outcome.app.conn.state is State.CLOSED)
    assert not net.stack.connections
    assert len(net.stack.pool) == net.stack.pool.allocated
    net.sent.clear()
