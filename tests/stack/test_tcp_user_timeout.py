"""How long unacknowledged data is sent again: R1, R2 and the user time-out (RFC 9293 section 3.8.3)."""

from __future__ import annotations

from collections.abc import Callable

from conversation import App, Client
from packets import ACK, FIN, RST

from ztun.stack import Closed


def falls_silent(client: Client, app: App) -> list[float]:
    """The client is gone. Returns when something was sent again, in seconds, and last when the RST was."""
    app.sends(b"data")
    client.hears(ACK, b"data", seq=1)
    began = client.net.now
    times = []
    while app.how is None:
        client.waits(max((client.net.stack.get_timer() or client.net.now) - client.net.now, 0.001))
        times += [client.net.now - began] * len(client.net.sent)
        while client.net.sent:
            client.hears(ACK if app.how is None else RST | ACK)
    return times


def test_progress_is_waited_for_as_long_as_agreed(talk: Callable[..., Client]) -> None:
    client = talk(user_timeout=30.0, data_retries=100)
    app = client.connects()
    times = falls_silent(client, app)
    assert abs(times[-1] - 30.0) < 0.01, "at the moment itself, not with the retransmission after it"
    assert len(times) > 4
    assert app.how is Closed.TIMED_OUT


def test_one_connection_may_be_more_patient(talk: Callable[..., Client]) -> None:
    client = talk(user_timeout=30.0, data_retries=100)
    app = client.connects()
    client.conn.user_timeout = 90.0
    assert abs(falls_silent(client, app)[-1] - 90.0) < 0.01


def test_the_defaults_are_above_a_hundred_seconds_and_three_retransmissions(client: Client) -> None:
    times = falls_silent(client, client.connects())
    assert len(times) > 4
    assert 100 < times[-1] < 300


def test_progress_starts_the_user_time_out_again(talk: Callable[..., Client]) -> None:
    client = talk(user_timeout=10.0, data_retries=100, max_rto=2.0)
    app = client.connects(mss=1000)
    app.sends(bytes(5000))
    client.hears_all()
    for ack in (1001, 2001, 3001, 4001):
        client.waits(9.0)
        client.net.sent.clear()
        client.acknowledges(ack)
        client.net.sent.clear()
        assert app.how is None
    client.waits(10.5)
    client.net.sent.clear()
    assert app.how is Closed.TIMED_OUT


def test_a_shut_window_is_not_a_lack_of_progress(talk: Callable[..., Client]) -> None:
    client = talk(user_timeout=10.0, data_retries=100, max_rto=2.0)
    app = client.connects()
    client.acknowledges(window=0)
    app.sends(b"waiting")
    for _ in range(60):
        client.waits(1.0)
        while client.net.sent:
            client.hears(ACK, b"w", seq=1)
            client.acknowledges(1, window=0)
    assert app.how is None


def test_a_fin_is_waited_for_no_longer(talk: Callable[..., Client]) -> None:
    client = talk(user_timeout=5.0, data_retries=100)
    app = client.connects()
    app.shuts_down()
    client.hears(ACK | FIN)
    client.waits(5.1)
    while len(client.net.sent) > 1:
        client.hears(ACK | FIN)
    client.hears(RST | ACK)
    assert app.how is Closed.TIMED_OUT
