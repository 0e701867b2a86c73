"""The ends of a connection: FIN in every order, TIME-WAIT (RFC 9293 section 3.6, 3.10.7.4; RFC 6191; RFC 1337)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import Client
from packets import ACK, FIN, RST, SYN

from ztun.stack import Closed, State


def test_the_client_closes_first(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, b"last words")
    client.hears(ACK, ack=12)
    assert app.received == b"last words"
    assert app.events == ["established", "eof"]
    assert client.conn.state is State.CLOSE_WAIT
    app.sends(b"and ours")
    client.hears(ACK, b"and ours")
    app.shuts_down()
    client.hears(ACK | FIN, seq=9)
    assert client.conn.state is State.LAST_ACK
    client.acknowledges()
    assert app.how is Closed.FINISHED
    client.says(ACK)  # LAST-ACK leaves nothing behind
    client.hears(RST)


def test_we_close_first(client: Client) -> None:
    app = client.connects()
    app.sends(b"all of it")
    client.hears(ACK, b"all of it")
    app.shuts_down()
    client.hears(ACK | FIN, seq=10)
    assert client.conn.state is State.FIN_WAIT_1
    client.acknowledges()
    assert client.conn.state is State.FIN_WAIT_2
    client.says(ACK, b"still uploading")
    client.waits(0.04)
    client.hears(ACK, ack=16)
    client.says(ACK | FIN)
    client.hears(ACK, seq=11, ack=17)
    assert app.received == b"still uploading"
    assert app.how is Closed.FINISHED
    client.says(ACK | FIN, seq=16)
    client.hears(ACK, seq=11, ack=17)  # TIME-WAIT answers


def test_a_fin_waits_for_the_data_before_it(client: Client) -> None:
    app = client.connects(mss=1000)
    client.acknowledges(window=1000)
    app.sends(bytes(1000))
    app.conn.send(memoryview(bytes(500)), client.net.now)
    app.shuts_down()
    client.hears(ACK, seq=1, size=1000)
    client.hears_nothing()
    client.acknowledges(window=1000)
    client.hears(ACK | FIN, seq=1001, size=500)


def test_both_close_at_once(client: Client) -> None:
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN, seq=1)
    client.says(ACK | FIN, ack=1)  # crossed ours
    client.hears(ACK, seq=2, ack=2)
    assert client.conn.state is State.CLOSING
    client.acknowledges(2)
    assert app.how is Closed.FINISHED
    client.says(ACK | FIN, seq=1)
    client.hears(ACK, seq=2, ack=2)


def test_fin_and_its_ack_in_one_segment(client: Client) -> None:
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN)
    client.says(ACK | FIN, ack=2)
    client.hears(ACK, seq=2, ack=2)
    assert app.how is Closed.FINISHED


def test_a_lost_fin_is_sent_again(client: Client) -> None:
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN, seq=1)
    client.waits(0.2)
    client.hears(ACK | FIN, seq=1)
    client.waits(0.4)
    client.hears(ACK | FIN, seq=1)
    client.acknowledges()
    client.waits(100)
    client.hears_nothing()


def test_a_lost_last_segment_comes_again_with_its_fin(client: Client) -> None:
    app = client.connects()
    app.sends(b"lost")
    app.shuts_down()
    client.hears(ACK, b"lost")
    client.hears(ACK | FIN)
    client.waits(0.2)
    client.hears(ACK | FIN, b"lost", seq=1)
    client.acknowledges()
    assert client.conn.state is State.FIN_WAIT_2


def test_a_fin_ahead_of_missing_data_waits(client: Client) -> None:
    app = client.connects(sack_ok=True)
    client.says(ACK | FIN, b"world", seq=6)
    client.hears(ACK, ack=1, sack=[(6, 11)])
    client.says(ACK | FIN, seq=11)
    client.hears(ACK, ack=1)
    assert app.events == ["established"]
    client.says(ACK, b"hello", seq=1)
    client.hears(ACK, ack=12)
    assert app.received == b"helloworld"
    assert app.events == ["established", "eof"]


def test_a_bare_fin_ahead_of_missing_data_is_a_gap(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, seq=6)
    client.hears(ACK, ack=1)
    client.says(ACK, b"hello", seq=1)
    client.waits(0.04)
    client.hears(ACK, ack=7)
    assert app.events == ["established", "eof"]


def test_data_after_the_fin_is_ignored(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, b"end")
    client.hears(ACK, ack=5)
    client.says(ACK, b"more", seq=5)
    client.says(ACK, b"end and more", seq=1)
    client.net.sent.clear()
    assert app.received == b"end"
    assert client.conn.rx.nxt == client.isn + 5


def test_data_beyond_a_fin_that_is_still_ahead_is_not_taken(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, seq=6)
    client.hears(ACK, ack=1)
    client.says(ACK, b"too much", seq=4)
    client.hears(ACK, ack=1)
    client.says(ACK, b"abc", seq=1)
    client.hears(ACK, ack=7)
    assert app.received == b"abcto"


def test_a_repeated_fin_is_acknowledged_again(client: Client) -> None:
    app = client.connects()
    for _ in range(3):
        client.says(ACK | FIN, seq=1)
        client.hears(ACK, ack=2)
    assert app.events == ["established", "eof"]


def test_a_client_that_never_closes_its_half_is_given_up(talk: Callable[..., Client]) -> None:
    client = talk(fin_wait_2=240)
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN)
    client.acknowledges()
    client.waits(200)
    client.says(ACK, b"slow, but alive")
    client.waits(239)
    client.hears(ACK, ack=16)
    client.waits(1)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT


def test_shutting_down_twice_is_once(client: Client) -> None:
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN)
    app.shuts_down()
    client.hears_nothing()


# TIME-WAIT.


@pytest.fixture
def waiting(client: Client) -> Client:
    """A client whose connection we closed first, just now in TIME-WAIT: its next number is 2, ours too."""
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN)
    client.says(ACK | FIN)
    client.hears(ACK, seq=2, ack=2)
    return client


def test_time_wait_ends_after_a_minute(waiting: Client) -> None:
    waiting.waits(59.9)
    waiting.says(ACK | FIN, seq=1)
    waiting.hears(ACK, seq=2, ack=2)
    waiting.waits(59.9)  # a repeated FIN starts it again
    waiting.says(ACK | FIN, seq=1)
    waiting.hears(ACK)
    waiting.waits(60.1)
    waiting.says(ACK | FIN, seq=1)
    waiting.hears(RST, seq=2)


def test_time_wait_does_not_answer_a_plain_ack(waiting: Client) -> None:
    """Two ends in TIME-WAIT would answer each other for ever."""
    waiting.says(ACK, seq=2)
    waiting.hears_nothing()


def test_time_wait_answers_what_does_not_belong(waiting: Client) -> None:
    waiting.says(ACK, b"old data", seq=1)
    waiting.hears(ACK, seq=2, ack=2)
    waiting.says(ACK, seq=-100)
    waiting.hears(ACK, seq=2, ack=2)


def test_a_reset_does_not_end_time_wait(waiting: Client) -> None:
    waiting.says(RST, seq=2)
    waiting.says(ACK | FIN, seq=1)
    waiting.hears(ACK, seq=2, ack=2)


def test_a_newer_syn_opens_the_connection_again(waiting: Client) -> None:
    waiting.says(SYN, seq=1000, mss=1460)
    waiting.net.accepts()
    heard = waiting.hears(SYN | ACK, ack=1001)
    # RFC 9293 3.10.7.4 (MAY-2): only with a number above all that the old connection used.
    assert heard.seq > waiting.net.iss + 2
    waiting.net.iss = heard.seq
    waiting.expected = 1
    waiting.says(ACK, b"again", seq=1001)
    assert waiting.net.apps[-1].received == b"again"
    waiting.waits(0.04)
    waiting.hears(ACK, ack=1006)


@pytest.mark.parametrize("seq", [2, 1, -1000])
def test_an_older_syn_is_answered_with_the_old_numbers(waiting: Client, seq: int) -> None:
    waiting.says(SYN, seq=seq, mss=1460)
    waiting.hears(ACK, seq=2, ack=2)
    assert len(waiting.net.incoming) == 1


def test_timestamps_decide_about_a_syn_where_both_have_them(client: Client) -> None:
    app = client.connects_like_linux()
    app.shuts_down()
    client.hears(ACK | FIN)
    client.says(ACK | FIN)
    client.hears(ACK, ack=2)
    client.waits(1.0)
    client.says(SYN, seq=5000, ts=(client.clock() - 5000, 0))
    assert client.hears(ACK, seq=2, ack=2).options["ts"][1] == client.clock() - 1000
    client.says(SYN, seq=-5000, ts=(client.clock(), 0))  # newer, though its number is lower (RFC 6191)
    client.net.accepts()
    client.hears(SYN | ACK, ack=-4999)


def test_time_wait_is_bounded(talk: Callable[..., Client]) -> None:
    client = talk(max_time_wait=1)
    other = Client(client.net, client.family, port=40001)
    for one in (client, other):
        app = one.connects()
        app.shuts_down()
        one.hears(ACK | FIN)
        one.says(ACK | FIN)
        one.hears(ACK)
    client.says(ACK | FIN, seq=1)
    client.hears(RST)  # forgotten
    other.says(ACK | FIN, seq=1)
    other.hears(ACK)
