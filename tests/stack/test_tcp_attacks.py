"""What a blind attacker can send (RFC 5961), old duplicates (RFC 7323 PAWS), and other strange segments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import App, Client
from packets import ACK, FIN, RST, SYN

from ztun.stack import Closed, State


def test_a_reset_with_the_exact_number_ends_the_connection(client: Client) -> None:
    app = client.connects()
    client.says(RST, seq=1)
    assert app.how is Closed.RESET_BY_CLIENT
    assert not client.net.stack.connections


@pytest.mark.parametrize("seq", [2, 30000])
def test_a_reset_elsewhere_in_the_window_is_challenged(client: Client, seq: int) -> None:
    app = client.connects()
    client.says(RST, seq=seq)
    client.hears(ACK, seq=1, ack=1)
    assert app.how is None


@pytest.mark.parametrize("seq", [0, -1, 70000, 1 << 30])
def test_a_reset_outside_the_window_is_dropped(client: Client, seq: int) -> None:
    app = client.connects()
    client.says(RST, seq=seq)
    assert app.how is None
    assert client.dropped("tcp-reset-window") == 1


def test_a_reset_with_ack_needs_no_right_ack(client: Client) -> None:
    app = client.connects()
    client.says(RST | ACK, seq=1, ack=999)
    assert app.how is Closed.RESET_BY_CLIENT


@pytest.mark.parametrize("seq", [0, 1, 5000, -5000])
@pytest.mark.parametrize("flags", [SYN, SYN | ACK])
def test_a_syn_in_a_connection_is_challenged(client: Client, seq: int, flags: int) -> None:
    app = client.connects()
    client.says(flags, seq=seq, mss=1460)
    client.hears(ACK, seq=1, ack=1)
    assert app.how is None
    assert client.conn.state is State.ESTABLISHED


def test_a_client_that_lost_its_memory_gets_a_new_connection_through_the_challenge(client: Client) -> None:
    app = client.connects()
    client.says(SYN, seq=5000, mss=1460)
    client.hears(ACK, seq=1, ack=1)
    client.says(RST, seq=1)  # what its kernel answers to an ACK that it does not expect
    assert app.how is Closed.RESET_BY_CLIENT
    client.says(SYN, seq=5000, mss=1460)
    client.net.accepts()
    client.hears(SYN | ACK, ack=5001)


def test_challenges_are_throttled_per_flow(client: Client) -> None:
    """Not for all flows together, which would tell one client about another (CVE-2016-5696)."""
    other = Client(client.net, client.family, port=40001)
    client.connects()
    other.connects()
    for _ in range(100):
        client.says(SYN, seq=5000)
    client.hears(ACK)
    client.hears_nothing()
    other.says(SYN, seq=5000)
    other.hears(ACK)
    client.waits(0.5)
    client.says(SYN, seq=5000)
    client.hears(ACK)


@pytest.mark.parametrize("ack", [2, 100000, 1 << 30, -100000])
def test_an_ack_of_what_was_never_sent_is_challenged_and_its_data_dropped(client: Client, ack: int) -> None:
    app = client.connects()
    client.says(ACK, b"forged", ack=ack)
    client.hears(ACK, seq=1, ack=1)
    assert app.received == b""
    assert client.dropped("tcp-ack") == 1


def test_an_old_ack_is_no_reason_to_drop_the_data(client: Client) -> None:
    app = client.connects()
    app.sends(bytes(3000))
    client.hears_all()
    client.acknowledges()
    client.says(ACK, b"delayed", ack=1)
    assert app.received == b"delayed"
    client.waits(0.04)
    client.hears(ACK, ack=8)


def test_an_old_ack_does_not_bring_an_old_window_back(client: Client) -> None:
    app = client.connects()
    app.sends(bytes(3000))
    client.hears_all()
    client.acknowledges(window=50000)
    client.says(ACK, ack=1, window=7)
    assert client.conn.tx.wnd == 50000


def test_an_old_timestamp_is_dropped_and_answered(client: Client) -> None:
    app = client.connects_like_linux()
    client.says(ACK, b"new")
    client.waits(0.04)
    client.hears(ACK)
    client.says(ACK, b"from an earlier life", ts=(client.clock() - 1000, 0))
    client.hears(ACK, ack=4)
    assert app.received == b"new"
    assert client.dropped("tcp-paws") == 1


def test_old_empty_segments_are_answered_seldom(client: Client) -> None:
    client.connects_like_linux()
    for _ in range(10):
        client.says(ACK, ts=(client.clock() - 1000, 0))
    client.hears(ACK)
    client.hears_nothing()


def test_a_reset_needs_no_timestamp(client: Client) -> None:
    app = client.connects_like_linux()
    client.says(RST, seq=1, ts=False)
    assert app.how is Closed.RESET_BY_CLIENT


def test_a_segment_without_the_agreed_timestamp_is_dropped(client: Client) -> None:
    app = client.connects_like_linux()
    client.says(ACK, b"data", ts=False)
    assert app.received == b""
    assert client.dropped("tcp-no-timestamp") == 1


def test_a_segment_from_outside_the_window_cannot_poison_the_timestamp(client: Client) -> None:
    """RFC 7323 section 5.3: only an acceptable segment's TSval is remembered. Half of all numbers lie below ours."""
    app = client.connects_like_linux()
    client.says(ACK, b"forged", seq=-5000, ts=(client.clock() + (1 << 30), 0))
    client.hears(ACK, ack=1)
    client.says(ACK, b"genuine", seq=1)
    assert app.received == b"genuine"
    client.waits(0.04)
    client.hears(ACK, ack=8)


def test_a_timestamp_from_after_a_gap_is_not_echoed(client: Client) -> None:
    client.connects_like_linux()
    before = client.clock()
    client.waits(1.0)
    client.says(ACK, b"later", seq=6)
    assert client.hears(ACK, ack=1).options["ts"][1] == before


def test_timestamps_may_wrap(client: Client) -> None:
    wrap = 1 << 32
    app = _connect_with_stamp(client, wrap - 2)
    client.says(ACK, b"ab", ts=(wrap - 1, 0))
    client.waits(0.04)
    assert client.hears(ACK, ack=3).options["ts"][1] == wrap - 1
    client.says(ACK, b"cd", ts=(1, 0))
    assert app.received == b"abcd"
    client.waits(0.04)
    assert client.hears(ACK, ack=5).options["ts"][1] == 1


def test_after_weeks_of_silence_any_timestamp_is_believed(talk: Callable[..., Client]) -> None:
    client = talk(tcp_idle=1e9, keepalive_idle=1e8)
    app = _connect_with_stamp(client, 1000)
    client.waits(25 * 86400)
    client.says(ACK, b"back", ts=(900, 0))
    assert app.received == b"back"
    client.waits(0.04)
    client.hears(ACK)


def _connect_with_stamp(client: Client, stamp: int) -> App:
    client.opens(ts=(stamp, 0))
    client.hears(SYN | ACK)
    client.says(ACK, ts=(stamp, 0))
    return client.app


@pytest.mark.parametrize("sack", [((1, 1),), ((5, 3),), ((-5000, -3000),), ((0, 1 << 31),), ((2000, 999_999),)])
def test_sack_blocks_that_make_no_sense_are_ignored(client: Client, sack: tuple[tuple[int, int], ...]) -> None:
    app = client.connects(sack_ok=True)
    app.sends(bytes(3000))
    client.hears_all()
    client.acknowledges(1, sack=sack)
    assert client.conn.tx.sacked.total == 0
    client.acknowledges()


def test_sack_that_was_not_agreed_on_is_ignored(client: Client) -> None:
    app = client.connects()
    app.sends(bytes(3000))
    client.hears_all()
    client.acknowledges(1, sack=((1001, 2001),))
    assert client.conn.tx.sacked.total == 0


def test_the_scoreboard_is_bounded_against_crumbs(client: Client) -> None:
    """One byte here and there would make every later ACK expensive (as CVE-2019-11477 did)."""
    app = client.connects(sack_ok=True, wscale=7)
    app.conn.tx.cc.cwnd = 1 << 20
    app.sends(bytes(60000))
    client.hears_all()
    for start in range(1000, 20200, 8):
        client.acknowledges(1, sack=tuple((start + i, start + i + 1) for i in (0, 2, 4, 6)))
    client.net.sent.clear()
    assert len(client.conn.tx.sacked) <= 2048


def test_a_fin_with_a_wrong_ack_does_not_close(client: Client) -> None:
    app = client.connects()
    client.says(ACK | FIN, ack=5000)
    client.hears(ACK, ack=1)
    assert app.events == ["established"]
