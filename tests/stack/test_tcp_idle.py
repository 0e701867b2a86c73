"""Silence: keep-alive (RFC 9293 section 3.8.4) and idle time-outs, and what the timers leave behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

from conversation import Client
from packets import ACK, FIN, RST

from ztun.stack import Closed


def test_a_silent_client_is_asked_whether_it_is_there(talk: Callable[..., Client]) -> None:
    client = talk(keepalive_idle=600, keepalive_interval=75)
    app = client.connects()
    client.waits(599.9)
    client.hears_nothing()
    client.waits(0.1)
    client.hears(ACK, seq=0, ack=1, size=0)
    client.acknowledges()
    client.waits(599.9)
    client.hears_nothing()
    client.waits(0.2)
    client.hears(ACK, seq=0)
    assert app.how is None


def test_one_that_does_not_answer_is_given_up(talk: Callable[..., Client]) -> None:
    client = talk(keepalive_idle=600, keepalive_interval=75, keepalive_probes=3)
    app = client.connects()
    client.waits(600)
    for _ in range(3):
        client.hears(ACK, seq=0)
        client.waits(75)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT
    assert client.net.stack.keepalive == {"probes": 3, "given_up": 1}


def test_keep_alive_can_be_turned_off(talk: Callable[..., Client]) -> None:
    client = talk(keepalive_idle=float("inf"), tcp_idle=float("inf"))
    app = client.connects()
    client.waits(30 * 86400)
    client.hears_nothing()
    assert app.how is None


def test_what_is_outstanding_asks_in_place_of_keep_alive(talk: Callable[..., Client]) -> None:
    """RFC 9293 section 3.8.4: only while nothing is outstanding (MUST-26)."""
    client = talk(keepalive_idle=5, keepalive_interval=1, min_rto=20.0)
    app = client.connects()
    app.sends(b"data")
    client.hears(ACK, b"data", seq=1)
    client.waits(19.9)
    client.hears_nothing()
    client.waits(0.2)
    client.hears(ACK, b"data", seq=1)
    client.acknowledges()
    client.waits(5.1)
    client.hears(ACK, seq=4, size=0)


def test_one_that_forgot_the_connection_resets_it(client: Client) -> None:
    app = client.connects()
    client.waits(600)
    client.hears(ACK, seq=0)
    client.says(RST, seq=1)
    assert app.how is Closed.RESET_BY_CLIENT


def test_our_answer_to_the_clients_keep_alive(client: Client) -> None:
    client.connects()
    for payload in (b"", b"\0"):  # with and without the one octet that old stacks send
        client.says(ACK, payload, seq=0)
        client.hears(ACK, seq=1, ack=1)
        client.waits(1)


def test_keep_alive_answers_are_no_activity(talk: Callable[..., Client]) -> None:
    client = talk(tcp_idle=1000, keepalive_idle=600, keepalive_interval=75)
    app = client.connects()
    client.waits(600)
    client.hears(ACK, seq=0)
    client.acknowledges()
    client.waits(399.9)
    client.hears_nothing()
    client.waits(0.1)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT


def test_the_idle_time_out_may_be_shorter_than_the_keep_alive(talk: Callable[..., Client]) -> None:
    client = talk(tcp_idle=30, keepalive_idle=600)
    app = client.connects()
    client.waits(29.9)
    client.hears_nothing()
    client.waits(0.1)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT


def test_data_either_way_is_activity(talk: Callable[..., Client]) -> None:
    client = talk(tcp_idle=100)
    app = client.connects()
    client.waits(90)
    client.says(ACK, b"up")
    client.waits(90)
    client.hears(ACK, ack=3)
    app.sends(b"down")
    client.hears(ACK, b"down")
    client.acknowledges()
    client.waits(90)
    assert app.how is None


def test_a_half_closed_client_is_watched_too(talk: Callable[..., Client]) -> None:
    client = talk(keepalive_idle=600, keepalive_interval=75, keepalive_probes=1)
    app = client.connects()
    client.says(ACK | FIN)
    client.hears(ACK)
    client.waits(600)
    client.hears(ACK, seq=0)
    client.waits(75)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT


def test_a_closed_connection_is_not_kept_by_its_timers(client: Client) -> None:
    """A deadline ten minutes ahead must not hold what belonged to thousands of short connections."""
    app = client.connects()
    client.waits(30)  # past every short timer: the next one is the keep-alive
    app.conn.handler = ours = _Handler()
    ref = weakref.ref(ours)
    client.says(RST, seq=1)
    client.net.incoming.clear()
    client.net.apps.clear()
    del client.app, app, ours
    gc.collect()
    assert ref() is None


class _Handler:
    """Dies with the connection that refers to it."""

    def closed(self, how: Closed, now: float) -> None:
        pass


def test_many_short_connections_leave_few_timers(client: Client) -> None:
    net = client.net
    for port in range(1, 400):
        one = Client(net, client.family, port=port)
        one.connects()
        net.now += 1.01
        net.stack.handle_timer(net.now)
        one.says(RST, seq=1)
    assert len(net.stack.timers) <= 100
