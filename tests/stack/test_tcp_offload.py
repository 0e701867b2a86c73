"""Connections that somebody else carries: the stack answers the SYN on his terms, and hears of the end."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import Client
from packets import ACK, FIN, RST, SYN

from ztun.stack import Closed, State

LINUX = {"mss": 1460, "sack_ok": True, "wscale": 7, "ts": (100, 0)}


def test_the_offer_is_what_the_syn_said(client: Client) -> None:
    client.says(SYN, **LINUX)
    offer = client.conn.offer()
    assert offer.key == client.conn.key
    assert (offer.number, offer.mss, offer.scale, offer.sack, offer.stamp) == (client.isn + 1, 1460, 7, True, 100)
    client.conn.abort(client.net.now)
    client.net.collect()
    client.hears(RST | ACK)


def test_what_a_plain_syn_does_not_say_is_not_offered(client: Client) -> None:
    client.says(SYN)
    offer = client.conn.offer()
    assert (offer.mss, offer.scale, offer.sack, offer.stamp) == (536 if client.family == 4 else 1220, None, False, None)
    client.conn.abort(client.net.now)
    client.net.collect()
    client.hears(RST | ACK)


def test_the_syn_is_answered_on_the_terms_of_who_carries(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.net.hands_over(number=77_000, mss=1380, scale=11, window=70_000)
    heard = client.hears(SYN | ACK, seq=0, ack=1, mss=1380, wscale=11, sack_ok=True, window=0xFFFF)
    assert heard.options["ts"][1] == 100
    assert client.conn.state is State.OFFLOADED


def test_no_more_is_said_than_fits_into_our_mtu(talk: Callable[..., Client]) -> None:
    client = talk(mtu=1300)
    client.says(SYN, **LINUX)
    client.net.hands_over(mss=8960)
    client.hears(SYN | ACK, mss=1300 - (40 if client.family == 4 else 60))


def test_options_that_were_not_agreed_are_left_out(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.net.hands_over(scale=None, sack=False, stamps=False)
    client.hears(SYN | ACK, wscale=None, sack_ok=None, ts=None)


def test_nobody_asks_for_an_answer_to_the_syn_ack(client: Client) -> None:
    client.says(SYN, **LINUX)
    app = client.net.hands_over()
    client.hears(SYN | ACK)
    client.waits(10_000.0)  # neither retransmission, keep-alive nor idle time: that is for who carries
    client.hears_nothing()
    assert app.events == []


def test_it_is_half_open_until_who_carries_has_heard_of_the_client(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.net.hands_over()
    client.hears(SYN | ACK)
    stack = client.net.stack
    assert stack.half_open == 1
    client.conn.heard()
    client.conn.heard()
    assert stack.half_open == 0
    client.conn.conclude(Closed.FINISHED, client.net.now)
    assert stack.half_open == 0


def test_a_syn_that_comes_again_is_answered_again(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.net.hands_over()
    first = client.hears(SYN | ACK)
    client.waits(1.0)
    client.says(SYN, seq=0, mss=1460)
    again = client.hears(SYN | ACK)
    assert (again.seq, again.ack, again.options) == (first.seq, first.ack, first.options)


def test_the_answer_is_repeated_on_demand(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.net.hands_over()
    client.hears(SYN | ACK)
    client.conn.repeat_answer()
    client.net.collect()
    client.hears(SYN | ACK, ack=1)


def test_segments_that_nobody_could_carry_are_dropped_and_counted(client: Client) -> None:
    client.says(SYN, **LINUX)
    app = client.net.hands_over()
    client.hears(SYN | ACK)
    client.says(ACK, b"hello")
    client.says(ACK | FIN)
    client.says(RST)
    client.hears_nothing()
    assert client.dropped("tcp-offloaded") == 3
    assert app.how is None


def test_another_syn_is_challenged_while_the_connection_lives(client: Client) -> None:
    """RFC 5961 section 4: a client that began anew resets what it does not know."""
    client.says(SYN, **LINUX)
    client.net.hands_over()
    client.hears(SYN | ACK)
    client.says(SYN, seq=5000, **LINUX)
    client.hears(ACK, ack=1)
    assert len(client.net.incoming) == 1


def test_another_syn_begins_anew_what_turns_out_to_be_over(client: Client) -> None:
    client.says(SYN, **LINUX)
    app = client.net.hands_over()
    client.hears(SYN | ACK)
    first, stack = client.conn, client.net.stack
    stack.settle = lambda conn: first.conclude(Closed.FINISHED, client.net.now)
    client.says(SYN, seq=5000, **LINUX)
    assert app.how is Closed.FINISHED
    assert client.conn is not first
    client.net.accepts()
    client.hears(SYN | ACK, ack=5001)
    assert stack.opened == 2


@pytest.mark.parametrize("how", [Closed.FINISHED, Closed.RESET_BY_CLIENT, Closed.ABORTED])
def test_an_end_that_both_know_of_is_not_talked_about(client: Client, how: Closed) -> None:
    client.says(SYN, **LINUX)
    app = client.net.hands_over()
    client.hears(SYN | ACK)
    client.conn.conclude(how, client.net.now)
    client.net.collect()
    client.hears_nothing()
    assert app.how is how
    assert not client.net.stack.connections
    assert client.net.stack.admission.half_open == 0


def test_an_abort_tells_the_client_with_the_numbers_it_has_now(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.net.hands_over()
    client.hears(SYN | ACK)
    client.conn.catch_up(7000, 500, client.net.iss + 7001, client.net.iss + 7001, client.isn + 501, client.net.now)
    client.conn.abort(client.net.now)
    client.net.collect()
    client.hears(RST | ACK, seq=7001, ack=501)
    assert (client.conn.sent, client.conn.received) == (7000, 500)


def test_an_abort_in_the_middle_fits_whatever_has_arrived(client: Client) -> None:
    """The client believes a reset with the very number that it waits for (RFC 5961 section 3.2)."""
    client.says(SYN, **LINUX)
    client.net.hands_over()
    client.hears(SYN | ACK)
    client.conn.catch_up(9000, 500, client.net.iss + 7001, client.net.iss + 9001, client.isn + 501, client.net.now)
    client.conn.abort(client.net.now)
    client.net.collect()
    assert {client.hears(RST | ACK, ack=501).seq - client.net.iss for _ in range(2)} == {7001, 9001}


@pytest.mark.parametrize("mtu", [1300, 9000])
def test_a_client_is_told_what_the_way_behind_us_takes(client: Client, mtu: int) -> None:
    """RFC 1191 section 4, RFC 4443 section 3.2: it goes by what is quoted, and that the number is one of its own."""
    client.says(SYN, **LINUX)
    client.net.hands_over()
    client.hears(SYN | ACK)
    client.net.stack.send_too_big(client.conn.key, client.isn + 2801, mtu, client.net.now)
    client.net.collect()
    kind, code, rest = packets.read_icmp(client.net.sent.popleft())
    assert (kind, code) == ((3, 4) if client.family == 4 else (2, 0))
    assert int.from_bytes(rest[:4], "big") == mtu
    quoted = rest[4 + 20 :] if client.family == 4 else rest[4 + 40 :]
    assert struct.unpack("!HHI", quoted) == (client.port, client.server_port, client.isn + 2801)


def test_a_client_that_gave_up_is_not_answered(client: Client) -> None:
    client.says(SYN, **LINUX)
    client.says(RST, seq=1)
    app = client.net.hands_over()
    client.hears_nothing()
    assert app.how is None
