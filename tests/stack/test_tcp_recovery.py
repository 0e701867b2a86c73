"""Loss found in time (RFC 8985), recoveries that were needless (RFC 3522, 4015, 2883), the corners of RFC 6675."""

from __future__ import annotations

import pytest
from conversation import App, Client
from packets import ACK, SYN

from ztun.stack.congestion import NewReno

_RTT = 0.04


def far_away(client: Client, segments: int, stamps: bool = False) -> App:
    """A client 40 ms away, which has just got so many segments of 1000 bytes."""
    options = {"ts": (client.clock(), 0)} if stamps else {}
    client.opens(mss=1012 if stamps else 1000, wscale=8, sack_ok=True, **options)
    client.stamps = stamps
    client.hears(SYN | ACK)
    client.waits(_RTT)
    client.says(ACK)
    window(client).cwnd = segments * 1000
    client.conn.tx.last_send = client.net.now
    client.app.sends(bytes(segments * 1000))
    client.hears_all()
    client.waits(_RTT)
    return client.app


def window(client: Client) -> NewReno:
    return client.conn.tx.cc


# Time tells what is lost (RFC 8985 section 6).


def test_what_was_overtaken_has_a_quarter_of_a_round_trip_to_arrive(client: Client) -> None:
    """One segment behind the hole is no proof, and there may never be a third."""
    far_away(client, 5)
    client.acknowledges(1, sack=((1001, 2001),))
    client.waits(_RTT / 4 - 0.001)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(5001)
    client.waits(10)
    client.hears_nothing()


def test_what_arrives_within_that_time_was_only_late(client: Client) -> None:
    far_away(client, 5)
    client.acknowledges(1, sack=((1001, 2001),))
    client.waits(_RTT / 4 - 0.001)
    client.acknowledges(2001)
    assert window(client).cwnd >= 5000
    client.acknowledges(5001)
    client.waits(10)
    client.hears_nothing()


def test_the_timer_of_retransmission_goes_on_meanwhile(client: Client) -> None:
    """Waiting for what may be late does not put off what is due."""
    far_away(client, 10)
    client.conn.tx.patience = 1
    client.acknowledges(1, sack=((1001, 2001),))
    client.waits(_RTT / 4)
    client.hears(ACK, seq=1, size=1000)
    began = client.net.now
    client.acknowledges(1, sack=((3001, 4001), (1001, 2001)))
    client.waits(_RTT)
    client.hears_nothing()
    client.waits(began + client.conn.tx.rtt.rto - client.net.now - 0.001)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, seq=1, size=1000)


def test_where_packets_overtake_each_other_three_are_no_proof(client: Client) -> None:
    """RFC 8985 section 6.2 step 4: once reordering was seen, only time counts."""
    app = far_away(client, 5)
    client.acknowledges(1, sack=((2001, 3001),))
    client.acknowledges(1, sack=((1001, 3001),))  # the second came after the third
    client.acknowledges(5001)
    window(client).cwnd = 10000
    app.sends(bytes(10000))
    client.hears_all()
    client.waits(_RTT)
    client.acknowledges(5001, sack=((6001, 10001),))
    client.waits(_RTT / 4 - 0.001)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, seq=5001, size=1000)
    client.acknowledges(15001)


def test_a_d_sack_teaches_more_patience(client: Client) -> None:
    """RFC 8985 section 6.2 step 4: what was sent again has arrived twice (RFC 2883)."""
    app = far_away(client, 5)
    client.acknowledges(1, sack=((1001, 2001),))
    client.waits(_RTT / 4)
    client.hears(ACK, seq=1, size=1000)
    client.acknowledges(5001)
    client.acknowledges(5001, sack=((1, 1001),))
    client.acknowledges(5001, sack=((1, 1001),))
    window(client).cwnd = 10000
    app.sends(bytes(5000))
    client.hears_all()
    client.waits(_RTT)
    client.acknowledges(5001, sack=((6001, 7001),))
    client.waits(_RTT / 2 - 0.001)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, seq=5001, size=1000)


def test_an_answer_sooner_than_any_round_trip_teaches_it_too(client: Client) -> None:
    """RFC 8985 section 6.2 step 2: it can only be the answer to what was sent first."""
    far_away(client, 10)
    client.acknowledges(1, sack=((1001, 9001),))
    client.hears(ACK, seq=1, size=1000)
    client.net.sent.clear()
    client.waits(_RTT / 8)
    client.acknowledges(9001)
    assert client.conn.tx.patience == 1
    client.acknowledges(10001)


# Needless recoveries (RFC 3522, RFC 4015).


def test_a_recovery_of_what_was_only_late_is_undone(client: Client) -> None:
    """The ACK echoes a time from before the retransmission."""
    far_away(client, 10, stamps=True)
    first = client.last_stamp
    client.acknowledges(1, sack=((1001, 10001),))
    client.hears(ACK, seq=1, size=1000)
    assert window(client).cwnd == 5000
    client.acknowledges(10001, ts=(client.clock(), first))
    assert window(client).cwnd >= 10000
    assert client.conn.tx.loss is None


def test_a_recovery_of_what_was_lost_is_not(client: Client) -> None:
    far_away(client, 10, stamps=True)
    client.acknowledges(1, sack=((1001, 10001),))
    client.hears(ACK, seq=1, size=1000)
    client.waits(_RTT)
    client.acknowledges(10001)
    assert window(client).cwnd == 5000


def test_one_late_segment_does_not_excuse_another_that_is_lost(client: Client) -> None:
    far_away(client, 10, stamps=True)
    first = client.last_stamp
    client.acknowledges(1, sack=((1001, 5001), (6001, 10001)))
    client.hears(ACK, seq=1, size=1000)
    client.hears(ACK, seq=5001, size=1000)
    client.acknowledges(5001, sack=((6001, 10001),), ts=(client.clock(), first))
    client.waits(_RTT)
    client.acknowledges(10001)
    assert window(client).cwnd == 5000


def test_a_needless_time_out_is_undone(client: Client) -> None:
    """All ACKs were late. What is in flight is not sent again, and the window is what it was."""
    far_away(client, 10, stamps=True)
    first = client.last_stamp
    client.waits(2.0)
    client.net.sent.clear()
    client.acknowledges(1001, ts=(client.clock(), first))
    client.hears_nothing()
    assert window(client).cwnd >= 10000
    client.acknowledges(10001)


def test_a_needed_time_out_is_not(client: Client) -> None:
    far_away(client, 10, stamps=True)
    client.waits(2.0)
    while client.net.sent:
        client.hears(ACK)
    client.acknowledges(1001)
    client.hears(ACK, seq=1001, size=2000)
    assert window(client).ssthresh == 5000


def test_a_lost_ack_does_not_count_as_a_slow_one(client: Client) -> None:
    """The answer to the first transmission was lost. That to the second one echoes the time of the first (RFC 7323
    section 5.3 drops what is repeated before it looks at its time), but it is as quick as ever."""
    app = far_away(client, 1, stamps=True)
    client.acknowledges()
    before = client.conn.tx.rtt.srtt
    app.sends(b"data")
    client.hears(ACK)
    first = client.last_stamp
    client.waits(client.conn.tx.rtt.rto)
    client.hears(ACK, b"data")
    client.waits(_RTT)
    client.acknowledges(1005, ts=(client.clock(), first))
    assert client.conn.tx.rtt.srtt <= before * 1.01


# Probes of the tail (RFC 8985 section 7.4).


def probed(client: Client) -> None:
    far_away(client, 10)
    client.acknowledges(8001)
    client.waits(2 * _RTT + 0.01)
    client.hears(ACK, seq=9001, size=1000)
    client.hears_nothing()
    window(client).cwnd = 20000


def test_a_loss_that_the_probe_repaired_lowers_the_window(client: Client) -> None:
    probed(client)
    client.acknowledges(10001)
    client.app.sends(bytes(1000))
    client.hears(ACK, seq=10001)
    client.acknowledges(11001)
    assert window(client).cwnd <= 10000


@pytest.mark.parametrize("duplicate", [{"sack": ((9001, 10001),)}, {}], ids=["d-sack", "plain"])
def test_a_probe_of_what_had_arrived_does_not(
    client: Client, duplicate: dict[str, tuple[tuple[int, int], ...]]
) -> None:
    """The second ACK tells that both have."""
    probed(client)
    client.acknowledges(10001)
    client.acknowledges(10001, **duplicate)
    client.app.sends(bytes(1000))
    client.hears(ACK, seq=10001)
    client.acknowledges(11001)
    assert window(client).cwnd >= 20000


# The rest of RFC 6675, and RFC 5681 section 4.3.


def test_the_end_of_the_flight_is_rescued_once(client: Client) -> None:
    """NextSeg (4): nothing is lost for sure and there is nothing new, but the window has room."""
    far_away(client, 10)
    client.acknowledges(1, sack=((1001, 7001),))
    client.hears(ACK, seq=1, size=1000)
    client.hears(ACK, seq=9001, size=1000)
    client.hears_nothing()
    client.acknowledges(7001)
    client.hears_nothing()


def test_the_loss_of_a_retransmission_lowers_the_window_again(client: Client) -> None:
    app = far_away(client, 20)
    app.unsent += bytes(40000)
    client.acknowledges(1, sack=((1001, 20001),))
    client.hears(ACK, seq=1, size=1000)
    assert window(client).cwnd == 10000
    sent = len(client.hears_all())
    client.waits(_RTT)
    client.acknowledges(1, sack=((1001, 20001 + sent),))
    client.hears(ACK, seq=1, size=1000)
    assert window(client).cwnd == 5000
    client.net.sent.clear()


def test_what_is_sacked_survives_a_time_out(client: Client) -> None:
    """RFC 6675 section 5.1 lets it, and a client that has let go of it shows that (test_the_client_may_renege)."""
    far_away(client, 10)
    client.acknowledges(1, sack=((2001, 5001), (6001, 10001)))
    client.waits(1.0)
    while client.net.sent:
        client.hears(ACK)
    client.acknowledges(5001)
    while client.net.sent:
        client.hears(ACK, seq=5001, size=1000)
    client.acknowledges(10001)
    client.waits(60)
    client.hears_nothing()


def test_when_nothing_is_missing_nothing_is_remembered(client: Client) -> None:
    """Ten thousand flows that idle need no scoreboards."""
    app = far_away(client, 10)
    assert app.conn.tx.loss is None
    client.acknowledges(1, sack=((1001, 10001),))
    client.hears(ACK, seq=1, size=1000)
    assert app.conn.tx.loss is not None
    client.acknowledges(10001)
    assert app.conn.tx.loss is None


def test_an_ack_that_a_probe_brought_gives_no_sample(client: Client) -> None:
    """Those before it may have been lost: the wait for the probe is no round trip (compare Karn)."""
    far_away(client, 2)
    before = client.conn.tx.rtt.srtt
    client.waits(2 * _RTT + 0.005 - _RTT)
    client.hears(ACK, seq=1001, size=1000)
    client.waits(_RTT)
    client.acknowledges(2001)
    assert client.conn.tx.rtt.srtt == before
