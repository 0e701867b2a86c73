"""One transcript for each requirement of docs/conformance.md that has no better home: windows that shrink, congestion
windows, timers, TIME-WAIT, resets."""

from __future__ import annotations

from collections.abc import Callable

from conversation import App, Client, Net
from packets import ACK, FIN, RST, SYN

from ztun.stack import Closed, State


def avoids_congestion(app: App, window: int) -> None:
    """As if loss had set ssthresh to `window` long ago."""
    app.conn.tx.cc.ssthresh = app.conn.tx.cc.cwnd = window
    app.conn.tx.last_send = app.net.now


# Windows that shrink (RFC 9293 section 3.8.6).


def test_data_within_a_window_that_shrank_is_sent_again(client: Client) -> None:
    app = client.connects(mss=1000)
    app.sends(bytes(5000))
    client.hears_all()
    client.acknowledges(1, window=2000)
    client.waits(0.21)
    assert client.hears(ACK, seq=1).payload
    client.net.sent.clear()
    client.acknowledges(2001, window=3000)
    client.net.sent.clear()
    client.acknowledges(5001)
    assert app.conn.queued == 0


def test_data_beyond_a_window_that_shrank_is_no_reason_to_give_up(talk: Callable[..., Client]) -> None:
    client = talk(data_retries=3, user_timeout=20.0)
    app = client.connects(mss=1000)
    app.sends(bytes(5000))
    client.hears_all()
    client.acknowledges(2001, window=0)  # 3000 bytes are on their way to where there is no room any more
    for _ in range(1000):
        client.waits(0.1)
        if client.net.sent:
            client.net.sent.clear()
            client.acknowledges(2001, window=0)
            client.net.sent.clear()
    assert app.how is None
    client.acknowledges(2001, window=60000)
    client.net.sent.clear()
    client.acknowledges(5001, window=60000)
    assert app.conn.queued == 0


# Congestion control (RFC 5681).


def test_beyond_ssthresh_the_window_grows_by_one_segment_a_round_trip(client: Client) -> None:
    app = client.connects(mss=1000)
    avoids_congestion(app, 20_000)
    app.sends(bytes(400_000))
    began = app.conn.tx.cc.cwnd
    for _ in range(5):
        before = app.conn.tx.cc.cwnd
        client.hears_all()
        with client.net.batch():
            for ack in range(app.conn.tx.una - client.net.iss + 2000, client.expected + 1, 2000):
                client.says(ACK, ack=ack)
            client.acknowledges()
        assert before < app.conn.tx.cc.cwnd <= before + 1000
    assert app.conn.tx.cc.cwnd > began + 3000
    client.net.sent.clear()


def test_after_idle_time_the_window_begins_anew(client: Client) -> None:
    app = client.connects(mss=1000)
    for _ in range(3):
        app.sends(bytes(60_000))
        while client.net.sent:
            client.hears_all()
            client.acknowledges()
    assert app.conn.tx.cc.cwnd > 20_000
    client.waits(5.0)
    app.sends(bytes(60_000))
    assert len(client.hears_all()) == 10_000
    client.acknowledges()
    client.net.sent.clear()


def test_a_lost_syn_ack_shrinks_the_initial_window(client: Client) -> None:
    client.opens(mss=1000)
    client.hears(SYN | ACK)
    client.waits(1.0)
    client.hears(SYN | ACK)
    client.says(ACK)
    client.app.sends(bytes(5000))
    client.hears(ACK, size=1000)
    client.acknowledges()
    assert len(client.hears_all()) == 2000


def test_a_second_time_out_of_the_same_data_keeps_ssthresh(client: Client) -> None:
    app = client.connects(mss=1000)
    app.sends(bytes(10_000))
    client.hears_all()
    client.waits(0.2)
    client.hears(ACK, seq=1, size=1000)
    assert app.conn.tx.cc.ssthresh == 5000
    client.waits(0.4)
    client.hears(ACK, seq=1, size=1000)
    assert app.conn.tx.cc.ssthresh == 5000
    assert app.conn.tx.cc.cwnd == 1000


def test_the_first_two_duplicates_let_new_data_go(client: Client) -> None:
    """RFC 3042: so that the third can come about."""
    app = client.connects(mss=1000)
    avoids_congestion(app, 4000)
    app.sends(bytes(20_000))
    assert len(client.hears_all()) == 4000
    for seq in (4001, 5001):
        client.acknowledges(1)
        client.hears(ACK, seq=seq, size=1000)
    client.acknowledges(1)
    client.hears(ACK, seq=1, size=1000)
    client.net.sent.clear()


def test_a_partial_ack_takes_from_the_window_what_it_covers(client: Client) -> None:
    """RFC 6582 section 3.2 step 3: so many duplicates have said that they left the network."""
    app = client.connects(mss=1000, wscale=8)
    avoids_congestion(app, 40_000)
    app.sends(bytes(200_000))
    client.hears_all()
    for _ in range(39):
        client.acknowledges(1)
    client.net.sent.clear()
    flight = app.conn.tx.nxt - app.conn.tx.una
    client.acknowledges(20_001)  # the first of the twenty was lost, and so was the next
    heard = [client.hears(ACK) for _ in range(len(client.net.sent))]
    assert heard[0].seq - client.net.iss == 20_001
    assert sum(len(one.payload) for one in heard) <= 3000
    assert flight > 40_000
    client.net.sent.clear()


# Timers (RFC 6298, RFC 8985, RFC 9293 section 3.8.3).


def test_the_timer_never_exceeds_a_minute(talk: Callable[..., Client]) -> None:
    client = talk(data_retries=15, user_timeout=10_000.0)
    app = client.connects()
    app.sends(b"data")
    client.hears(ACK, b"data")
    client.waits(120.0)
    client.net.sent.clear()
    for _ in range(3):
        client.waits(60.0)
        client.hears(ACK, b"data", seq=1)
    assert app.how is None


def test_without_sack_there_is_no_tail_probe(client: Client) -> None:
    client.opens()
    client.waits(0.02)
    client.hears(SYN | ACK)
    client.says(ACK)
    client.app.sends(b"data")
    client.hears(ACK, b"data")
    client.waits(0.19)
    client.hears_nothing()
    client.waits(0.02)
    client.hears(ACK, b"data")


def test_a_syn_ack_can_be_repeated_for_three_minutes(talk: Callable[..., Client]) -> None:
    client = talk(syn_retries=7)
    client.opens()
    began = client.net.now
    while client.app.how is None:
        client.hears(SYN | ACK, seq=0)
        client.waits((client.net.stack.get_timer() or 0.0) - client.net.now)
    client.hears(RST | ACK)
    assert client.net.now - began >= 180
    assert client.app.how is Closed.TIMED_OUT


# Ends.


def test_an_abort_with_data_unread_is_a_reset(client: Client) -> None:
    app = client.connects()
    app.holds = True
    client.says(ACK, b"never read")
    app.resets()
    client.hears(RST | ACK, seq=1, ack=11)


def test_a_reset_carries_the_agreed_timestamp(client: Client) -> None:
    app = client.connects(ts=(client.clock(), 0))
    client.waits(1.0)
    app.resets()
    heard = client.hears(RST | ACK, seq=1, ack=1)
    assert heard.options["ts"][1] == client.clock() - 1000


def test_each_flow_has_a_timestamp_offset_of_its_own() -> None:
    """So that the clock does not tell how long ztun is up, nor one client of another (RFC 7323 section 7)."""
    net = Net()
    net.stack.isn = lambda flow, now: sum(at * byte for at, byte in enumerate(flow)) << 32
    stamps = []
    for port in (40000, 40001):
        client = Client(net, port=port)
        client.opens(ts=(1, 0))
        stamps.append(client.hears(SYN | ACK).options["ts"][0])
    assert stamps[0] != stamps[1]


def test_a_repeated_fin_starts_time_wait_again(client: Client) -> None:
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN)
    client.says(ACK | FIN)
    client.hears(ACK, ack=2)
    assert app.how is Closed.FINISHED
    client.waits(59)
    client.says(ACK | FIN, seq=1)
    client.hears(ACK, seq=2, ack=2)
    client.waits(59)
    client.says(ACK | FIN, seq=1)
    client.hears(ACK, seq=2, ack=2)
    client.waits(60)
    client.says(ACK | FIN, seq=1)
    client.hears(RST)
    assert client.conn.state is State.CLOSED
