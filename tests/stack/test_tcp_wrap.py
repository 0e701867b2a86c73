"""Sequence numbers that pass 2**32 (RFC 9293 section 3.4), on both sides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import App, Client
from packets import ACK, FIN, RST

from ztun.stack import Closed

_EDGE = (1 << 32) - 1


@pytest.fixture(params=[0, 1, 2, 3, 1000, 5000])
def near(request: pytest.FixtureRequest, talk: Callable[..., Client]) -> Client:
    """Both sides begin so many numbers before the end of the number space."""
    return talk(isn=_EDGE - request.param, iss=_EDGE - request.param)


def test_a_conversation_over_the_edge(near: Client) -> None:
    app = near.connects(sack_ok=True, mss=1000)
    near.says(ACK, bytes(3000))
    near.hears(ACK, ack=3001)
    app.sends(bytes(3000))
    assert near.hears_all() == bytes(3000)
    near.acknowledges()
    near.says(ACK | FIN)
    near.hears(ACK, ack=3002)
    app.shuts_down()
    near.hears(ACK | FIN, seq=3001)
    near.acknowledges()
    assert app.how is Closed.FINISHED


def test_gaps_and_sack_over_the_edge(near: Client) -> None:
    app = near.connects(sack_ok=True)
    near.says(ACK, b"c" * 1000, seq=2001)
    near.hears(ACK, ack=1, sack=[(2001, 3001)])
    near.says(ACK, b"b" * 1000, seq=1001)
    near.hears(ACK, ack=1, sack=[(1001, 3001)])
    near.says(ACK, b"a" * 1000, seq=1)
    near.hears(ACK, ack=3001)
    assert app.received == b"a" * 1000 + b"b" * 1000 + b"c" * 1000


def test_recovery_over_the_edge(near: Client) -> None:
    app = _sending(near)
    near.acknowledges(1, sack=((1001, 10001),))
    near.hears(ACK, seq=1, size=1000)
    near.acknowledges(10001)
    assert app.conn.tx.flight() == 0


def _sending(client: Client) -> App:
    app = client.connects(mss=1000, sack_ok=True)
    app.sends(bytes(10000))
    client.hears_all()
    return app


def test_time_outs_over_the_edge(near: Client) -> None:
    _sending(near)
    near.waits(0.205)
    near.hears(ACK, seq=9001)
    near.hears(ACK, seq=1)
    near.acknowledges(10001)


def test_windows_and_resets_over_the_edge(near: Client) -> None:
    app = near.connects()
    near.says(RST, seq=30000)
    near.hears(ACK, ack=1)
    near.says(ACK, ack=2)  # never sent
    assert near.dropped("tcp-ack") == 1
    near.says(RST, seq=1)
    assert app.how is Closed.RESET_BY_CLIENT


def test_time_wait_over_the_edge(near: Client) -> None:
    app = near.connects()
    app.shuts_down()
    near.hears(ACK | FIN)
    near.says(ACK | FIN)
    near.hears(ACK, seq=2, ack=2)
    near.says(ACK | FIN, seq=1)
    near.hears(ACK, seq=2, ack=2)
    near.says(2, seq=5000)
    near.net.accepts()
    near.hears(0x12, ack=5001)
