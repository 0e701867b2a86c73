"""The finer points of RFC 9293 section 3.10.7.4, as whoever shortens the way of a segment would lose them."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import Client
from packets import ACK, FIN, RST

from ztun.stack import Closed, State

_DAY = 86400.0


def test_of_two_early_fins_the_one_that_is_reached_first_counts(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, b"56789", seq=6)
    client.hears(ACK, ack=1)
    client.says(ACK | FIN, b"567890123", seq=6)
    client.hears(ACK, ack=1)
    client.says(ACK, b"01234", seq=1)
    client.hears(ACK, ack=12)
    assert app.received == b"0123456789"
    assert client.conn.state is State.CLOSE_WAIT


def test_a_segment_that_acknowledges_what_is_old_brings_no_window(client: Client) -> None:
    """However new its own number is: SND.UNA =< SEG.ACK is asked first."""
    app = client.connects()
    app.sends(bytes(3000))
    client.hears_all()
    client.acknowledges(window=50000)
    client.says(ACK, b"new", window=50000)
    client.says(ACK, b" data", ack=1, window=7)
    assert client.conn.tx.wnd == 50000
    client.waits(0.05)
    client.hears(ACK, ack=9)


def test_an_ack_may_be_as_old_as_the_largest_window_was(client: Client) -> None:
    """RFC 5961 section 5.2: SND.UNA - MAX.SND.WND =< SEG.ACK, whatever the window is by now."""
    client.window = 1000  # 256,000 bytes
    app = client.connects(mss=1000, wscale=8)
    app.conn.tx.cc.cwnd = 1 << 20
    app.conn.tx.last_send = client.net.now
    app.sends(bytes(300_000))
    client.hears_all()
    client.acknowledges()
    client.hears_all()
    client.acknowledges(window=4)
    assert client.expected == 300_001
    client.says(ACK, b"late", ack=300_001 - 256_000)
    assert app.received == b"late"
    client.waits(0.05)
    client.hears(ACK, ack=5)
    client.says(ACK, b"forged", ack=300_000 - 256_000)
    client.hears(ACK, ack=5)
    assert app.received == b"late"
    assert client.dropped("tcp-ack") == 1


def test_what_waits_out_of_order_ends_at_the_edge_too(talk: Callable[..., Client]) -> None:
    client = talk(receive_buffer=20000)
    app = client.connects(sack_ok=True)
    client.says(ACK, bytes(2000), seq=19001)
    client.hears(ACK, ack=1, sack=[(19001, 20001)])
    client.says(ACK, bytes(19000), seq=1)
    client.hears(ACK, ack=20001)
    assert len(app.received) == 20000


def test_who_aborts_while_a_gap_is_filled_hears_no_more(client: Client) -> None:
    app = client.connects()
    client.says(ACK, b"second", seq=6)
    client.hears(ACK, ack=1)
    app.on_data = lambda: app.conn.abort(client.net.now)
    client.says(ACK, b"first", seq=1)
    client.hears(RST | ACK)
    assert app.received == b"first"
    assert app.how is Closed.ABORTED


@pytest.mark.parametrize("flags", [ACK, ACK | FIN])
def test_who_aborts_on_an_ack_gets_none_of_its_data(client: Client, flags: int) -> None:
    app = client.connects()
    app.sends(b"question")
    client.hears(ACK, b"question")
    app.writable = lambda now: app.conn.abort(now)  # type: ignore[method-assign]
    client.says(flags, b"answer")
    client.hears(RST | ACK, seq=9, ack=1)
    assert app.received == b""
    assert app.events == ["established"]


def test_data_that_brings_a_larger_window_is_good_news(client: Client) -> None:
    """Although it acknowledges nothing."""
    app = client.connects(mss=1000, wscale=0)
    client.acknowledges(window=4000)
    app.sends(bytes(8000))
    assert len(client.hears_all()) == 4000
    client.says(ACK, b"data", ack=1, window=8000)
    assert len(client.hears_all()) == 4000


def test_the_first_of_the_segments_that_one_ack_answers_is_timed(client: Client) -> None:
    """RFC 7323 section 4.3: the delay of the ACK is part of the round trip."""
    client.connects_like_linux()
    stamp = client.clock()
    client.says(ACK, b"first", ts=(stamp + 1, 0))
    client.says(ACK, b"second", ts=(stamp + 2, 0))
    client.waits(0.05)
    assert client.hears(ACK, ack=12).options["ts"][1] == stamp + 1


def test_data_is_an_answer_to_keep_alive(talk: Callable[..., Client]) -> None:
    client = talk(keepalive_idle=100, keepalive_interval=10, keepalive_probes=3)
    app = client.connects()
    for _ in range(5):
        client.waits(100)
        client.hears(ACK, seq=0, size=0)
        client.waits(10)
        client.hears(ACK, seq=0, size=0)
        client.says(ACK, b"here")
        client.waits(1)
        client.hears(ACK, seq=1)
    assert app.how is None
    client.waits(98)
    client.hears_nothing()


def test_a_header_longer_than_its_segment_does_nothing(client: Client) -> None:
    """Eight words are said, as with timestamps; six are there."""
    app = client.connects_like_linux()
    app.sends(b"data")
    client.hears(ACK, b"data")
    ports = (client.port, client.server_port)
    head = struct.pack("!HHIIHHHH", *ports, client.isn + 1, client.net.iss + 5, 8 << 12 | ACK, 500, 0, 0)
    packet = packets.ip_packet(client.address, client.server, 6, head + bytes((1, 1, 8, 10)))
    client.net.receives(packet, packets.NEEDS_CSUM)
    assert client.dropped("tcp-length") == 1
    assert app.conn.queued == 4


def test_old_data_is_answered_each_time(client: Client) -> None:
    """RFC 7323 section 5.3 R1: the throttle is for bare ACKs only."""
    client.connects_like_linux()
    client.says(ACK, b"now")
    client.waits(0.05)
    client.hears(ACK, ack=4)
    for _ in range(3):
        client.says(ACK, b"old", seq=1, ts=(client.clock() - 5000, 0))
        client.hears(ACK, ack=4)
    client.says(ACK | FIN, seq=4, ts=(client.clock() - 5000, 0))
    client.hears(ACK, ack=4)
    assert client.conn.state is State.ESTABLISHED


def test_an_active_connection_keeps_its_timestamp_however_long_it_lives(talk: Callable[..., Client]) -> None:
    """RFC 7323 section 5.5 counts from the last segment, not from the first."""
    client = talk(keepalive_idle=float("inf"), tcp_idle=float("inf"))
    app = client.connects_like_linux()
    for day in range(4):
        client.waits(10 * _DAY)
        client.says(ACK, b"x")
        client.waits(0.05)
        client.hears(ACK, ack=2 + day)
    client.waits(1.0)
    client.says(ACK, b"old", ts=(client.clock() - 5000, 0))
    client.hears(ACK, ack=5)
    assert app.received == b"xxxx"
    assert client.dropped("tcp-paws") == 1
