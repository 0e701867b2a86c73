"""Options: agreed on in the handshake, or not used at all (RFC 9293 section 3.2, RFC 7323, RFC 2018, RFC 6691)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import Client
from packets import ACK, SYN


def test_everything_offered_is_agreed_to(client: Client) -> None:
    client.opens(wscale=7, sack_ok=True, ts=(777, 0))
    heard = client.hears(SYN | ACK, mss=client.mss, wscale=5, sack_ok=True)
    assert heard.options["ts"][1] == 777


def test_nothing_offered_is_nothing_used(client: Client) -> None:
    client.opens()
    client.hears(SYN | ACK, mss=client.mss, wscale=None, sack_ok=None, ts=None, window=65535)
    client.says(ACK)
    client.app.sends(b"x")
    client.hears(ACK, b"x", ts=None, window=65535)


def test_each_option_is_agreed_to_on_its_own(talk: Callable[..., Client]) -> None:
    for offer in ({"wscale": 2}, {"sack_ok": True}, {"ts": (5, 0)}):
        client = talk()
        client.opens(**offer)
        heard = client.hears(SYN | ACK)
        assert set(heard.options) == {"mss", *offer}


@pytest.mark.parametrize(("buffer", "scale"), [(65535, 0), (65536, 1), (1 << 20, 5), (1 << 30, 14), (1 << 31, 14)])
def test_the_window_scale_is_the_smallest_that_can_say_the_buffer(
    talk: Callable[..., Client], buffer: int, scale: int
) -> None:
    client = talk(receive_buffer=buffer)
    client.opens(wscale=0)
    client.hears(SYN | ACK, wscale=scale, window=65535)  # the window of a SYN is never scaled (RFC 7323 2.2)


def test_a_gigabyte_of_window_can_be_said(talk: Callable[..., Client]) -> None:
    client = talk(receive_buffer=1 << 30)
    app = client.connects(wscale=14)
    app.sends(b"x")
    assert client.hears(ACK, b"x").window << 14 >= (1 << 30) - (1 << 14)


def test_a_window_scale_above_14_counts_as_14(client: Client) -> None:
    app = client.connects(wscale=15)
    client.acknowledges(window=1)
    assert client.conn.tx.wnd == 1 << 14
    app.sends(b"x")
    client.hears(ACK, b"x")


def test_without_mss_the_smallest_default_is_assumed(client: Client) -> None:
    app = client.connects(mss=None)
    app.sends(bytes(5000))
    default = 536 if client.family == 4 else 1220
    assert client.hears(ACK).gso_size == default


def test_segments_follow_the_mss_of_the_client_and_our_mtu(talk: Callable[..., Client]) -> None:
    client = talk(mtu=1400)
    app = client.connects(mss=9000)
    app.sends(bytes(5000))
    assert client.hears(ACK).gso_size == 1400 - (1500 - client.mss)
    client = talk()
    app = client.connects(mss=1000, ts=(1, 0))
    app.sends(bytes(5000))
    assert client.hears(ACK).gso_size == 1000 - 12  # RFC 6691: the option's bytes come off the payload


def test_an_absurd_mss_is_not_followed(client: Client) -> None:
    app = client.connects(mss=1)
    app.sends(bytes(500))
    assert client.hears(ACK).gso_size == 88


def test_broken_options_end_the_list_without_harm(client: Client) -> None:
    client.says(SYN, raw_options=bytes((2, 4, 5, 180, 8, 200, 1, 1)))
    client.net.accepts()
    client.hears(SYN | ACK, ts=None)
    assert client.conn.client_mss == 1460


def test_unknown_options_are_skipped(client: Client) -> None:
    client.says(SYN, raw_options=bytes((254, 4, 1, 2, 2, 4, 2, 0, 3, 3, 1, 0)))
    client.net.accepts()
    client.hears(SYN | ACK, wscale=5)
    assert client.conn.client_mss == 512


def test_every_segment_carries_the_agreed_timestamp(client: Client) -> None:
    app = client.connects(ts=(client.clock(), 0))
    client.says(ACK, b"up", ts=(client.clock() + 7, 0))
    client.waits(0.05)
    first = client.hears(ACK, ack=3).options["ts"]
    assert first[1] == client.clock() - 50 + 7
    client.waits(1.0)
    app.sends(b"down")
    second = client.hears(ACK, b"down").options["ts"]
    assert second[0] - first[0] == 1010  # milliseconds
    client.acknowledges()


def test_the_urgent_pointer_is_tolerated_and_its_data_delivered_in_line(client: Client) -> None:
    app = client.connects()
    client.says(ACK | 32, b"urgent", urgent=3)
    assert app.received == b"urgent"
    client.waits(0.05)
    client.hears(ACK, ack=7)
