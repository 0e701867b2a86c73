"""The window we advertise (RFC 9293 section 3.8.6): what the relay can still hold, never less than was promised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import Client
from packets import ACK, FIN, SYN

from ztun.stack import State


@pytest.fixture
def slow(talk: Callable[..., Client]) -> Client:
    """A client whose outbound holds everything, with 20,000 bytes of room."""
    client = talk(receive_buffer=20000)
    client.connects().holds = True
    return client


def test_held_bytes_are_missing_from_the_window(slow: Client) -> None:
    slow.says(ACK, bytes(8000))
    slow.hears(ACK, ack=8001, window=12000)
    slow.app.takes(3000)
    slow.hears_nothing()
    slow.says(ACK, bytes(4000))
    slow.hears(ACK, ack=12001, window=11000)


def test_bytes_passed_on_at_once_leave_the_window_as_it_was(client: Client) -> None:
    client.connects()
    client.says(ACK, bytes(8000))
    client.hears(ACK, ack=8001, window=65535)


def test_an_opened_window_is_told_of_when_it_is_worth_it(slow: Client) -> None:
    slow.says(ACK, bytes(20000))
    slow.hears(ACK, ack=20001, window=0)
    slow.app.takes(1000)  # less than two segments: silly window avoidance (3.8.6.2.2)
    slow.hears_nothing()
    slow.app.takes(4000)
    slow.hears(ACK, ack=20001, window=5000)


def test_a_window_below_one_segment_stays_shut(slow: Client) -> None:
    slow.says(ACK, bytes(20000))
    slow.hears(ACK, window=0)
    slow.app.takes(slow.mss - 1)
    slow.says(ACK, seq=20000)  # a probe as Linux does it: an old number, nothing in it
    slow.hears(ACK, ack=20001, window=0)


def test_a_probe_of_one_byte_into_a_shut_window_is_answered_every_time(slow: Client) -> None:
    slow.says(ACK, bytes(20000))
    slow.hears(ACK, window=0)
    for _ in range(5):
        slow.says(ACK, b"p", seq=20001)
        slow.hears(ACK, ack=20001, window=0)
        slow.waits(0.2)
    slow.app.takes(20000)
    slow.hears(ACK, ack=20001, window=20000)
    slow.says(ACK, b"p", seq=20001)
    slow.waits(0.04)
    slow.hears(ACK, ack=20002)
    assert len(slow.app.received) == 20001


def test_acks_are_taken_from_segments_that_meet_a_shut_window(slow: Client) -> None:
    """RFC 9293 3.10.7.4: special allowance for valid ACKs when the window is zero."""
    slow.says(ACK, bytes(20000))
    slow.hears(ACK, window=0)
    slow.app.sends(b"answer")
    slow.hears(ACK, b"answer")
    slow.says(ACK, b"more", seq=20001, ack=7)
    slow.hears(ACK, ack=20001, window=0)
    assert slow.conn.tx.una == slow.conn.tx.nxt
    assert len(slow.app.received) == 20000


def test_a_bare_fin_is_taken_through_a_shut_window(slow: Client) -> None:
    slow.says(ACK, bytes(20000))
    slow.hears(ACK, window=0)
    slow.says(ACK | FIN, seq=20001)
    slow.hears(ACK, ack=20002)
    assert slow.conn.state is State.CLOSE_WAIT


@pytest.mark.parametrize("scale", [None, 7])
def test_the_right_edge_never_moves_back(talk: Callable[..., Client], scale: int | None) -> None:
    client = talk(receive_buffer=1 << 20)
    app = client.connects(wscale=scale)
    shift = 5 if scale else 0
    edge = 0
    for size in [1, 2, 3, 31, 33, 1000, 1459, 7, 5, 3001] * 3:
        client.says(ACK, bytes(size))
        client.waits(0.05)
        while client.net.sent:
            heard = client.hears(ACK)
            right = heard.ack + (heard.window << shift)
            assert right >= edge
            edge = right
    assert app.how is None


def test_a_full_buffer_takes_back_less_than_one_unit_of_the_scale(talk: Callable[..., Client]) -> None:
    """RFC 7323 section 2.4: with scaling the edge cannot always be said exactly; what was promised is still taken."""
    client = talk(receive_buffer=1 << 20)
    client.connects(wscale=7).holds = True
    client.says(ACK, bytes(60001))
    edges = []
    for _ in range(40):
        client.says(ACK, b"x")
        client.waits(0.05)
        while client.net.sent:
            heard = client.hears(ACK)
            edges.append(heard.ack + (heard.window << 5) - client.isn)
    promised = max(edges)
    assert promised - 32 < min(edges[edges.index(promised) :]) < promised
    client.says(ACK, bytes(10), seq=promised - 10)
    client.hears(ACK, ack=60042)
    assert client.conn.rx.reassembly.size == 10


def test_without_scaling_the_window_stays_within_16_bits(talk: Callable[..., Client]) -> None:
    client = talk(receive_buffer=1 << 24)
    client.opens()
    client.hears(SYN | ACK, window=65535)
    client.says(ACK, bytes(60000))
    client.hears(ACK, window=65535)


def test_consuming_after_the_end_is_harmless(slow: Client) -> None:
    slow.says(ACK, bytes(20000))
    slow.hears(ACK)
    slow.says(4, seq=20001)
    slow.app.takes(20000)
    slow.hears_nothing()


def test_window_updates_stop_when_the_client_is_done(slow: Client) -> None:
    slow.says(ACK | FIN, bytes(20000))
    slow.hears(ACK, ack=20002)
    slow.app.takes(20000)
    slow.hears_nothing()
