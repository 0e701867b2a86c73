"""Loss: the retransmission timer (RFC 6298), fast retransmit and recovery (RFC 5681, 6582, 6675)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import App, Client
from packets import ACK, RST

from ztun.stack import Closed


def sending(client: Client, segments: int, window: int | None = None, **options: object) -> App:
    """A connection with so many segments of 1000 bytes in flight, each heard on its own line."""
    app = client.connects(mss=1000, wscale=8, **options)
    app.conn.tx.cc.cwnd = window or segments * 1000
    app.conn.tx.last_send = client.net.now
    app.sends(bytes(segments * 1000))
    client.hears_all()
    return app


# The timer.


def test_the_timer_follows_the_round_trip(client: Client) -> None:
    client.opens()
    client.hears(0x12)
    client.waits(0.5)
    client.says(ACK)  # SRTT 0.5, RTTVAR 0.25: RTO 1.5 (RFC 6298 2.2)
    assert client.conn.tx.rtt.rto == pytest.approx(1.5)
    client.app.sends(b"data")
    client.hears(ACK, b"data")
    client.waits(1.499)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, b"data", seq=1)


@pytest.mark.parametrize("lost", [1, 3])
def test_after_a_lost_handshake_the_timer_begins_with_three_seconds(client: Client, lost: int) -> None:
    """RFC 6298 5.7, however far it had backed off."""
    client.opens()
    for i in range(lost + 1):
        client.hears(0x12)
        client.waits(2**i if i < lost else 0.1)
    client.says(ACK)
    client.app.sends(b"data")
    client.hears(ACK, b"data")
    client.waits(2.999)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, b"data", seq=1)


def test_it_backs_off_then_gives_up(talk: Callable[..., Client]) -> None:
    client = talk(data_retries=5, max_rto=2.0)
    app = client.connects()
    app.sends(b"data")
    client.hears(ACK, b"data")
    for pause in (0.2, 0.4, 0.8, 1.6, 2.0):
        client.waits(pause - 0.001)
        client.hears_nothing()
        client.waits(0.001)
        client.hears(ACK, b"data", seq=1)
    client.waits(2.0)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT
    assert not client.net.stack.connections


def test_karn_a_retransmitted_segment_gives_no_sample(client: Client) -> None:
    app = client.connects()
    app.sends(b"data")
    client.hears(ACK)
    client.waits(0.2)
    client.hears(ACK, b"data")
    client.waits(0.3)
    client.acknowledges()
    assert client.conn.tx.rtt.rto == pytest.approx(0.4), "the back-off stays until a clean sample"
    app.sends(b"more")
    client.hears(ACK)
    client.waits(0.1)
    client.acknowledges()
    assert client.conn.tx.rtt.srtt == pytest.approx(0.1 / 8)
    assert not client.conn.tx.rtt.backed_off


def test_a_timestamp_resolves_karns_doubt(client: Client) -> None:
    app = client.connects_like_linux()
    app.sends(b"data")
    client.hears(ACK)
    client.waits(0.2)
    client.hears(ACK, b"data")
    client.waits(0.1)
    client.acknowledges()
    assert not client.conn.tx.rtt.backed_off
    assert client.conn.tx.rtt.srtt == pytest.approx(0.1 / 8)


def test_each_ack_starts_the_timer_again(client: Client) -> None:
    sending(client, 4)
    client.waits(0.15)
    client.acknowledges(1001)
    client.waits(0.15)
    client.hears_nothing()
    client.waits(0.05)
    client.hears(ACK, seq=1001, size=1000)


def test_when_all_is_acknowledged_the_timer_rests(client: Client) -> None:
    sending(client, 4)
    client.acknowledges()
    client.waits(60)
    client.hears_nothing()


def test_after_a_time_out_all_is_sent_again_in_slow_start(client: Client) -> None:
    sending(client, 10)
    client.waits(0.2)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(1001)
    client.hears(ACK, seq=1001, size=2000)
    client.acknowledges(3001)
    client.hears(ACK, seq=3001, size=4000)
    client.acknowledges(10001)
    client.hears_nothing()
    assert client.conn.tx.cc.ssthresh == 5000


def test_after_a_time_out_what_arrives_is_not_sent_again(client: Client) -> None:
    """The first was lost, the others wait at the client: its ACK jumps, and new data follows."""
    app = sending(client, 10)
    client.waits(0.2)
    client.hears(ACK, seq=1, size=1000)
    app.sends(bytes(2000))
    client.acknowledges(10001)
    client.hears(ACK, seq=10001, size=2000)


def test_sack_after_a_time_out_saves_what_is_there(client: Client) -> None:
    sending(client, 10, sack_ok=True)
    client.waits(0.205)
    client.hears(ACK, seq=9001, size=1000)  # the tail loss probe was lost, too
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(1001, sack=((3001, 9001),))
    client.hears(ACK, seq=1001, size=2000)
    client.acknowledges(9001)
    client.hears(ACK, seq=9001, size=1000)
    client.acknowledges(10001)


def test_a_lost_tail_is_probed_before_the_timer(client: Client) -> None:
    """RFC 8985 section 7: the last segment again, two round trips after it; its SACK tells what is missing."""
    sending(client, 10, sack_ok=True)
    client.conn.tx.rtt.sample(0.02)
    client.acknowledges(6001)
    client.waits(0.01)
    client.hears(ACK, seq=9001, size=1000)
    client.acknowledges(6001, sack=((9001, 10001),))
    client.hears(ACK, seq=6001, size=1000)
    client.hears(ACK, seq=7001, size=1000)
    client.acknowledges(8001, sack=((9001, 10001),))
    client.hears(ACK, seq=8001, size=1000)
    client.acknowledges(10001)
    client.waits(10)
    client.hears_nothing()


def test_a_single_segment_may_be_acknowledged_late(client: Client) -> None:
    app = client.connects(sack_ok=True)
    client.conn.tx.rtt.sample(0.3)
    app.sends(b"question")
    client.hears(ACK, b"question")
    client.waits(0.2 + 2 * client.conn.tx.rtt.srtt - 0.001)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, b"question", seq=1)
    client.acknowledges()


def test_one_probe_then_the_timer(client: Client) -> None:
    sending(client, 10, sack_ok=True)
    client.waits(0.005)
    client.hears(ACK, seq=9001, size=1000)
    client.waits(0.199)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, seq=1, size=1000)


def test_the_client_may_renege(client: Client) -> None:
    """RFC 2018 section 8: what was SACKed is kept until it is acknowledged, and sent again after a time-out."""
    sending(client, 10, sack_ok=True)
    client.acknowledges(1, sack=((1001, 10001),))
    client.hears(ACK, seq=1, size=1000)
    client.waits(0.2)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(1001)
    client.hears(ACK, seq=1001, size=2000)
    client.acknowledges(3001)
    client.hears(ACK, seq=3001, size=4000)
    client.acknowledges(7001)
    client.hears(ACK, seq=7001, size=3000)
    client.acknowledges(10001)


# Fast retransmit without SACK.


def test_the_third_duplicate_brings_the_segment_at_once(client: Client) -> None:
    """Also when half of a large window is still under way."""
    sending(client, 40)
    for _ in range(2):
        client.acknowledges(1)
        client.hears_nothing()
    client.acknowledges(1)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(40001)
    assert client.conn.tx.cc.cwnd == 20000


def test_a_window_update_is_no_duplicate(client: Client) -> None:
    sending(client, 10)
    for window in (200, 201, 202, 203):
        client.acknowledges(1, window=window)
    client.hears_nothing()


def test_an_ack_with_data_is_no_duplicate(client: Client) -> None:
    app = sending(client, 10)
    for _ in range(4):
        client.says(ACK, b"x", ack=1)
    client.hears_nothing()
    assert app.received == b"xxxx"
    client.waits(0.04)
    client.hears(ACK, ack=5)


def test_a_partial_ack_brings_the_next_hole_at_once(client: Client) -> None:
    sending(client, 40)
    for _ in range(3):
        client.acknowledges(1)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(5001)
    client.hears(ACK, seq=5001, size=1000)
    client.acknowledges(6001)
    client.hears(ACK, seq=6001, size=1000)
    client.acknowledges(40001)
    client.hears_nothing()


def test_duplicates_let_new_data_go(client: Client) -> None:
    """The first two before loss is certain (RFC 3042), more of them in recovery (RFC 5681 section 3.2 step 4)."""
    app = sending(client, 10)
    app.unsent += bytes(20000)
    for seq in (10001, 11001):
        client.acknowledges(1)
        client.hears(ACK, seq=seq, size=1000)
    client.acknowledges(1)
    client.hears(ACK, seq=1, size=1000)
    for _ in range(3):  # window 6, and 12 - 3 are under way
        client.acknowledges(1)
        client.hears_nothing()
    for seq in (12001, 13001):
        client.acknowledges(1)
        client.hears(ACK, seq=seq, size=1000)


def test_duplicates_of_what_was_sent_again_for_nothing_are_no_loss(client: Client) -> None:
    """RFC 6582 section 3.2 step 1: only what is beyond the last recovery can be lost anew."""
    app = sending(client, 10)
    client.waits(0.2)  # too early, all was only late
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(10001)
    app.sends(bytes(1000))
    client.hears(ACK, seq=10001)
    for _ in range(4):
        client.acknowledges(10001)
    client.hears_nothing()


def test_a_short_flight_needs_fewer_duplicates(client: Client) -> None:
    """RFC 5827: three segments and nothing to follow give two duplicates at most."""
    sending(client, 3)
    client.acknowledges(1)
    client.hears_nothing()
    client.acknowledges(1)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(3001)


# With SACK.


def test_a_short_flight_needs_less_sack(client: Client) -> None:
    sending(client, 3, sack_ok=True)
    client.acknowledges(1, sack=((1001, 2001),))
    client.hears_nothing()
    client.acknowledges(1, sack=((1001, 3001),))
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(3001)


def test_a_retransmission_that_is_lost_too_is_noticed(client: Client) -> None:
    """By what was sent after it and arrives, without waiting for the timer."""
    app = sending(client, 20, sack_ok=True)
    app.unsent += bytes(20000)
    client.acknowledges(1, sack=((1001, 20001),))
    client.hears(ACK, seq=1, size=1000)
    data = client.hears_all()
    client.acknowledges(1, sack=((1001, 20001 + len(data)),))
    client.hears(ACK, seq=1, size=1000)
    client.hears_all()


def test_a_retransmission_among_others_that_is_lost_too_is_noticed(client: Client) -> None:
    sending(client, 20, sack_ok=True)
    client.acknowledges(1, sack=((1001, 9001), (10001, 20001)))
    client.hears(ACK, seq=1, size=1000)
    client.hears(ACK, seq=9001, size=1000)
    client.acknowledges(1, sack=((1001, 20001),))
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(20001)


def test_sack_of_more_than_two_segments_is_loss(client: Client) -> None:
    """One ACK may tell of many segments, where the client merges them (GRO): no need for three duplicates."""
    sending(client, 10, sack_ok=True)
    client.acknowledges(1, sack=((1001, 3001),))
    client.hears_nothing()
    client.acknowledges(1, sack=((1001, 4001),))
    client.hears(ACK, seq=1, size=1000)


def test_all_holes_are_filled_in_one_round_trip(client: Client) -> None:
    sending(client, 20, sack_ok=True)
    client.acknowledges(1, sack=((18001, 20001), (10001, 16001), (4001, 8001)))
    client.hears(ACK, seq=1, size=1000)
    client.hears(ACK, seq=1001, size=3000)
    client.hears(ACK, seq=8001, size=2000)
    client.hears(ACK, seq=16001, size=2000) if client.net.sent else None
    client.acknowledges(20001)
    client.hears_nothing()
    assert client.conn.tx.cc.cwnd == 10000


def test_sacked_data_is_never_sent_again_in_recovery(client: Client) -> None:
    sending(client, 20, sack_ok=True)
    sacked = ((5001, 9001), (11001, 12001), (14001, 20001))
    for last in range(len(sacked)):
        client.acknowledges(1, sack=tuple(reversed(sacked[: last + 1])))
    resent: list[tuple[int, int]] = []
    while client.net.sent:
        heard = client.hears(ACK)
        seq = heard.seq - client.net.iss
        resent.append((seq, seq + len(heard.payload)))
    assert resent
    assert all(end <= left or start >= right for start, end in resent for left, right in sacked)
    assert len({start for start, _ in resent}) == len(resent), "and nothing twice"
    client.acknowledges(20001)


def test_a_lost_super_segment_costs_one_recovery(client: Client) -> None:
    """The TUN's queue drops packets of 64 KiB whole."""
    app = sending(client, 200, window=300_000, sack_ok=True)
    client.acknowledges(1, sack=((65001, 200_001),))
    lost = sum(client.hears(ACK).payload.__len__() for _ in range(len(client.net.sent)))
    assert lost == 65000
    client.acknowledges(200_001)
    assert app.conn.tx.flight() == 0


def test_new_data_flows_during_recovery(client: Client) -> None:
    app = sending(client, 20, sack_ok=True)
    app.unsent += bytes(50000)
    client.acknowledges(1, sack=((1001, 16001),))
    client.hears(ACK, seq=1, size=1000)
    data = client.hears_all()
    assert 0 < len(data) <= 10000


def test_reordering_by_two_is_no_loss(client: Client) -> None:
    sending(client, 10, sack_ok=True)
    client.acknowledges(1, sack=((1001, 2001),))
    client.acknowledges(1, sack=((1001, 3001),))
    client.acknowledges(3001)
    client.hears_nothing()


def test_a_keepalive_answer_is_no_news(client: Client) -> None:
    sending(client, 10, sack_ok=True)
    for _ in range(5):
        client.acknowledges(1)
    client.hears_nothing()


def test_a_lost_fin_after_lost_data_comes_with_it(client: Client) -> None:
    app = sending(client, 6, sack_ok=True)
    app.shuts_down()
    client.net.sent.clear()
    client.acknowledges(1, sack=((1001, 6001),))
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(6001)
    client.net.sent.clear()
    client.waits(0.2)
    client.hears(ACK | 1, seq=6001, size=0)
    client.expected = 6002
    client.acknowledges()
    assert client.conn.state.value == "fin-wait-2"


def test_a_second_loss_event_halves_again(client: Client) -> None:
    app = sending(client, 20, sack_ok=True)
    client.acknowledges(1, sack=((1001, 20001),))
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(20001)
    app.sends(bytes(10000))
    client.hears_all()
    client.acknowledges(20001, sack=((21001, 30001),))
    client.hears(ACK, seq=20001, size=1000)
    client.acknowledges(30001)
    assert client.conn.tx.cc.cwnd == 5000


def test_losses_within_one_window_halve_once(client: Client) -> None:
    sending(client, 20, sack_ok=True)
    client.acknowledges(1, sack=((1001, 9001),))
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(9001, sack=((10001, 20001),))
    client.hears(ACK, seq=9001, size=1000)
    client.acknowledges(20001)
    assert client.conn.tx.cc.cwnd == 10000
