"""Sending within the client's window: segments, super-segments, shut and silly windows (RFC 9293 section 3.8.6)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import App, Client
from packets import ACK, PSH, RST

from ztun.stack import Closed


def open_wide(app: App) -> None:
    """As if a long transfer had opened the congestion window, just now."""
    app.conn.tx.cc.cwnd = 1 << 20
    app.conn.tx.last_send = app.net.now


def test_small_data_goes_at_once(client: Client) -> None:
    app = client.connects()
    app.sends(b"one")
    client.hears(ACK | PSH, b"one", seq=1)
    app.sends(b"two")
    client.hears(ACK | PSH, b"two", seq=4)
    client.acknowledges()


def test_large_data_goes_as_super_segments_of_the_clients_mss(client: Client) -> None:
    app = client.connects(mss=1000, wscale=8)
    open_wide(app)
    data = bytes(range(256)) * 500
    app.sends(data)
    heard = client.hears(ACK, seq=1, gso_size=1000)
    assert len(heard.payload) == 65000
    assert heard.payload + client.hears_all() == data
    client.acknowledges()


def test_the_first_flight_is_ten_segments(client: Client) -> None:
    app = client.connects(mss=1000)
    app.sends(bytes(50000))
    assert len(client.hears_all()) == 10000  # RFC 6928
    client.acknowledges()
    assert len(client.hears_all()) == 20000  # slow start
    client.acknowledges()
    assert len(client.hears_all()) == 20000


def test_the_window_of_the_client_is_not_exceeded(client: Client) -> None:
    app = client.connects(mss=1000)
    client.acknowledges(window=4000)
    app.sends(bytes(20000))
    assert len(client.hears_all()) == 4000
    client.acknowledges(2001, window=2500)
    client.hears_nothing()  # 500 bytes are not worth a segment
    client.acknowledges(window=8000)
    assert len(client.hears_all()) == 8000


def test_a_window_that_opens_with_data_lets_go_what_waited(client: Client) -> None:
    """The update need not be a segment of its own, nor acknowledge anything."""
    app = client.connects(mss=1000)
    client.acknowledges(window=2500)
    app.sends(bytes(20000))
    assert len(client.hears_all()) == 2000
    client.acknowledges(2001, window=500)
    client.hears_nothing()  # not worth a segment
    client.says(ACK | PSH, b"more room", ack=2001, window=8000)
    assert len(client.hears_all()) == 8000


def test_a_scaled_window_is_read_with_its_scale(client: Client) -> None:
    app = client.connects(mss=1000, wscale=3)
    client.acknowledges(window=500)
    app.sends(bytes(20000))
    assert len(client.hears_all()) == 4000


def test_a_shut_window_is_probed_until_it_opens(client: Client) -> None:
    app = client.connects(mss=1000)
    client.acknowledges(window=0)
    app.sends(b"abcdefgh" * 100)
    client.hears_nothing()
    for pause in (0.2, 0.4, 0.8, 1.6):  # RFC 9293 3.8.6.1: first after an RTO, then ever more slowly
        client.waits(pause - 0.001)
        client.hears_nothing()
        client.waits(0.001)
        client.hears(ACK, b"a", seq=1)
        client.expected = 1
        client.acknowledges(window=0)
    client.acknowledges(window=5000)
    client.hears(ACK, b"abcdefgh" * 100, seq=1)  # from the octet on that was never taken
    client.acknowledges()
    assert client.conn.tx.flight() == 0


def test_a_probe_that_is_taken_moves_on(client: Client) -> None:
    app = client.connects(mss=1000)
    client.acknowledges(window=0)
    app.sends(b"abc")
    client.waits(0.2)
    client.hears(ACK, b"a")
    client.acknowledges(2, window=0)
    client.waits(0.2)
    client.hears(ACK, b"b", seq=2)
    client.acknowledges(3, window=1000)
    client.hears(ACK, b"c", seq=3)
    client.acknowledges()


def test_answers_to_probes_are_no_sign_of_loss(client: Client) -> None:
    app = client.connects(mss=1000)
    client.acknowledges(window=0)
    app.sends(bytes(5000))
    window = client.conn.tx.cc.cwnd
    for _ in range(6):
        client.waits(60)
        while client.net.sent:
            client.hears(ACK, size=1)
        client.acknowledges(1, window=0)
    assert client.conn.tx.cc.cwnd == window
    client.expected = 1
    client.acknowledges(window=20000)
    assert len(client.hears_all()) == 5000
    client.acknowledges()


def test_after_a_shut_window_the_timer_is_as_quick_as_before(client: Client) -> None:
    """The pauses between probes say nothing about the path."""
    app = client.connects(mss=1000)
    client.acknowledges(window=0)
    app.sends(b"tail")
    for _ in range(5):
        client.waits(30)
        client.net.sent.clear()
        client.acknowledges(1, window=0)
    client.acknowledges(1, window=5000)
    client.hears(ACK, b"tail", seq=1)
    client.waits(0.2)
    client.hears(ACK, b"tail", seq=1)


def test_a_lost_window_update_is_no_deadlock(client: Client) -> None:
    """All is acknowledged, the window is shut, the client's update is lost: what waits must be probed with."""
    app = client.connects(mss=1000)
    client.acknowledges(window=3000)
    app.sends(bytes(10000))
    client.hears_all()
    client.acknowledges(window=0)
    client.waits(0.2)
    client.hears(ACK, seq=3001, size=1)
    client.expected = 3001
    client.acknowledges(window=20000)
    assert len(client.hears_all()) == 7000
    client.acknowledges()


def test_a_window_shut_from_the_start_is_probed_too(client: Client) -> None:
    app = client.connects()
    client.acknowledges(window=0)
    app.sends(bytes(100000))
    assert app.conn.tx.queue.end - app.conn.tx.una <= 1460, "what cannot be sent stays with the outbound"
    client.waits(0.2)
    client.hears(ACK, size=1)


def test_a_client_that_answers_probes_is_kept(talk: Callable[..., Client]) -> None:
    client = talk(data_retries=3, tcp_idle=7440.0)
    app = client.connects()
    client.acknowledges(window=0)
    app.sends(b"waiting")
    for _ in range(50):
        client.waits(0.2)
        if client.net.sent:
            client.hears(ACK, b"w", seq=1)
            client.acknowledges(1, window=0)
    assert app.how is None
    assert client.conn.tx.rtt.rto > 3.0


def test_a_client_that_stays_shut_is_idle_in_the_end(talk: Callable[..., Client]) -> None:
    """RFC 6429: it may be an attack on our memory."""
    client = talk(tcp_idle=600.0)
    app = client.connects()
    client.acknowledges(window=0)
    app.sends(b"waiting")
    for _ in range(9):
        client.waits(60)
        client.net.sent.clear()
        client.acknowledges(1, window=0)
    client.waits(59)
    client.net.sent.clear()
    client.waits(1)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT


def test_a_client_that_answers_no_probe_is_given_up(talk: Callable[..., Client]) -> None:
    client = talk(data_retries=3)
    app = client.connects()
    client.acknowledges(window=0)
    app.sends(b"waiting")
    for pause in (0.2, 0.4, 0.8):
        client.waits(pause)
        client.hears(ACK, b"w", seq=1)
    client.waits(1.6)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT


def test_silly_windows_are_not_filled(client: Client) -> None:
    app = client.connects(mss=1000)
    client.acknowledges(window=5000)
    app.sends(bytes(20000))
    assert len(client.hears_all()) == 5000
    client.acknowledges(window=100)
    client.hears_nothing()
    client.waits(0.2)  # the override time-out: what fits
    client.hears(ACK, seq=5001, size=100)
    client.acknowledges(window=5000)
    assert 4000 < len(client.hears_all()) <= 5000


def test_a_small_buffer_is_filled_by_halves(client: Client) -> None:
    """A client whose whole buffer is less than a segment."""
    app = client.connects(mss=1000)
    client.window = 600
    client.acknowledges()
    client.conn.tx.max_wnd = 600
    app.sends(bytes(3000))
    client.hears(ACK, size=600)
    client.acknowledges(window=200)
    client.hears_nothing()
    client.acknowledges(window=400)
    client.hears(ACK, size=400)
    client.acknowledges(window=600)
    client.hears(ACK, size=600)


def test_segments_below_a_full_one_are_rare_within_a_window(client: Client) -> None:
    """What the outbound has is cut at whole segments, whatever the window's odd bytes."""
    app = client.connects(mss=1000, wscale=0)
    open_wide(app)
    app.sends(bytes(500_000))
    runts = total = 0
    while client.net.sent:
        size = client.hears(ACK).payload.__len__()
        total += 1
        runts += size % 1000 != 0
        client.acknowledges(window=20_500)
    assert client.expected == 500_001
    assert runts <= 2 < total


def test_a_window_that_shrinks_stops_the_sending(client: Client) -> None:
    app = client.connects(mss=1000)
    app.sends(bytes(10000))
    assert len(client.hears_all()) == 10000
    client.acknowledges(2001, window=1000)
    client.hears_nothing()
    assert app.conn.tx.wnd == 1000


def test_many_small_pieces_are_joined_when_they_are_sent_again(client: Client) -> None:
    """A packet goes out with one writev, which takes 1024 pieces."""
    app = client.connects()
    for i in range(1200):
        app.sends(bytes((i % 256,)))
    while client.net.sent:
        client.hears(ACK, size=1)
    sent = client.net.stack.outbox
    client.net.now += 0.2
    client.net.stack.handle_timer(client.net.now)
    assert max(len(packet) for packet in sent) < 300
    client.net.collect()
    assert client.hears(ACK, seq=1).payload == bytes(i % 256 for i in range(1200))


def test_sending_after_the_end_is_harmless(client: Client) -> None:
    app = client.connects()
    client.says(RST, seq=1)
    app.conn.send(memoryview(b"too late"), client.net.now)
    app.shuts_down()
    app.resets()
    client.net.collect()
    client.hears_nothing()


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 1999, 2000, 65000, 65001])
def test_every_size_arrives_whole(client: Client, size: int) -> None:
    app = client.connects(mss=1000, wscale=8)
    open_wide(app)
    data = bytes(i * 7 % 251 for i in range(size))
    app.sends(data)
    assert client.hears_all() == data
    client.acknowledges()
