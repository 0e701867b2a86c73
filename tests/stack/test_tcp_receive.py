"""Data from the client: order, overlap, acknowledgments, SACK (RFC 9293 3.10.7.4, RFC 5681 4.2, RFC 2018)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conversation import Client
from packets import ACK, FIN

from ztun.stack import State


def test_data_is_delivered_and_acknowledged_a_little_later(client: Client) -> None:
    app = client.connects()
    client.says(ACK, b"hello")
    assert app.received == b"hello"
    client.waits(0.039)
    client.hears_nothing()
    client.waits(0.001)
    client.hears(ACK, seq=1, ack=6)


def test_every_second_full_segment_is_acknowledged_at_once(client: Client) -> None:
    client.connects()
    client.says(ACK, bytes(client.mss))
    client.hears_nothing()
    client.says(ACK, bytes(client.mss))
    client.hears(ACK, ack=1 + 2 * client.mss)
    client.says(ACK, bytes(client.mss))
    client.waits(0.04)
    client.hears(ACK, ack=1 + 3 * client.mss)


def test_a_batch_of_segments_costs_one_ack(client: Client) -> None:
    client.connects()
    with client.net.batch():
        for _ in range(10):
            client.says(ACK, bytes(client.mss))
    client.hears(ACK, ack=1 + 10 * client.mss)


def test_a_super_segment_is_taken_whole(client: Client) -> None:
    app = client.connects()
    client.says(ACK, bytes(60000))
    assert len(app.received) == 60000
    client.hears(ACK, ack=60001)


def test_an_answer_carries_the_ack(client: Client) -> None:
    app = client.connects()
    with client.net.batch():
        client.says(ACK, b"request")
        app.sends(b"answer")
    client.hears(ACK, b"answer", ack=8)
    client.waits(0.1)
    client.hears_nothing()
    client.acknowledges()


def test_a_gap_is_told_at_once_and_so_is_its_filling(client: Client) -> None:
    app = client.connects(sack_ok=True)
    client.says(ACK, b"world", seq=6)
    client.hears(ACK, ack=1, sack=[(6, 11)])
    assert app.received == b""
    client.says(ACK, b"hello", seq=1)
    client.hears(ACK, ack=11, sack=None)
    assert app.received == b"helloworld"


def test_without_sack_a_gap_is_told_by_a_bare_duplicate(client: Client) -> None:
    client.connects()
    client.says(ACK, b"world", seq=6)
    client.hears(ACK, ack=1, sack=None)
    client.says(ACK, b"hello", seq=1)
    client.hears(ACK, ack=11)


@pytest.mark.parametrize(("stamps", "most"), [(False, 4), (True, 3)])
def test_the_block_with_the_latest_arrival_comes_first(client: Client, stamps: bool, most: int) -> None:
    client.connects(sack_ok=True, ts=(1, 0) if stamps else None)
    for seq in (11, 31, 51, 71, 91):
        client.says(ACK, bytes(5), seq=seq)
        heard = client.hears(ACK, ack=1)
        assert client_blocks(client, heard)[0] == (seq, seq + 5)
    assert len(client_blocks(client, heard)) == most
    client.says(ACK, bytes(5), seq=36)  # grows the second block
    heard = client.hears(ACK, ack=1)
    assert client_blocks(client, heard)[0] == (31, 41)


def client_blocks(client: Client, heard: object) -> list[tuple[int, int]]:
    return [(left - client.isn, right - client.isn) for left, right in heard.options["sack"]]  # type: ignore[attr-defined]


def test_recently_told_blocks_are_repeated_before_older_ones(client: Client) -> None:
    """RFC 2018 section 4: so that every block is told in at least three ACKs."""
    client.connects(sack_ok=True, ts=(1, 0))
    for seq in (11, 31, 51, 71):
        client.says(ACK, bytes(5), seq=seq)
        heard = client.hears(ACK, ack=1)
    assert client_blocks(client, heard) == [(71, 76), (51, 56), (31, 36)]


def test_a_duplicate_is_acknowledged_and_not_delivered_again(client: Client) -> None:
    app = client.connects()
    client.says(ACK, b"hello")
    client.says(ACK, b"hello", seq=1)
    client.hears(ACK, ack=6)
    assert app.received == b"hello"


def test_overlap_is_trimmed_on_both_sides(client: Client) -> None:
    app = client.connects(sack_ok=True)
    client.says(ACK, b"cdef", seq=3)
    client.hears(ACK, ack=1, sack=[(3, 7)])
    client.says(ACK, b"abCD", seq=1)
    client.hears(ACK, ack=7)
    assert app.received == b"abCDef"
    client.says(ACK, b"EFgh", seq=5)
    assert app.received == b"abCDefgh"
    client.waits(0.04)
    client.hears(ACK, ack=9)


def test_one_segment_over_several_pieces_fills_all_gaps(client: Client) -> None:
    app = client.connects(sack_ok=True)
    for seq, data in ((3, b"c"), (5, b"e"), (7, b"g")):
        client.says(ACK, data, seq=seq)
        client.hears(ACK, ack=1)
    client.says(ACK, b"abcdefgh", seq=1)
    client.hears(ACK, ack=9)
    assert app.received == b"abcdefgh"


def test_data_beyond_the_window_is_cut_off(talk: Callable[..., Client]) -> None:
    client = talk(receive_buffer=10000)
    app = client.connects()
    app.holds = True
    client.says(ACK, bytes(12000))
    client.hears(ACK, ack=10001, window=0)
    assert len(app.received) == 10000
    assert client.conn.rx.held == 10000


def test_data_wholly_outside_the_window_is_answered_and_dropped(talk: Callable[..., Client]) -> None:
    client = talk(receive_buffer=10000)
    app = client.connects()
    client.says(ACK, b"far off", seq=10001)
    client.hears(ACK, ack=1)
    client.says(ACK, b"long ago", seq=-5000)
    client.hears(ACK, ack=1)
    assert app.received == b""
    assert client.dropped("tcp-window") == 2


def test_the_last_bytes_again_with_a_fin_bring_only_the_fin(client: Client) -> None:
    """The handler is never told of no bytes: it may hold on to views."""
    app = client.connects()
    app.holds = True
    client.says(ACK, b"hello")
    client.says(ACK | FIN, b"hello", seq=1)
    assert app.received == b"hello"
    assert app.events == ["established", "eof"]
    client.hears(ACK, ack=7)
    assert client.conn.state is State.CLOSE_WAIT


def test_a_handler_that_aborts_in_the_middle_hears_no_more(client: Client) -> None:
    app = client.connects(sack_ok=True)
    client.says(ACK, b"late", seq=6)
    client.hears(ACK, ack=1)
    app.on_data = lambda: app.conn.abort(client.net.now)
    client.says(ACK | FIN, b"hello", seq=1)
    client.hears(4 | ACK)
    assert app.received == b"hello"
    assert app.events == ["established"]
    assert not client.net.stack.connections


def test_pieces_that_wait_out_of_order_are_bounded(talk: Callable[..., Client]) -> None:
    """One-byte pieces far apart cost much more memory than they are worth: beyond a bound they are not kept."""
    client = talk(receive_buffer=100_000)
    app = client.connects(sack_ok=True, wscale=7)
    with client.net.batch():
        for seq in range(3, 803, 2):
            client.says(ACK, b"x", seq=seq)
    client.net.sent.clear()
    assert client.conn.rx.reassembly.size == 256
    client.says(ACK, bytes(810), seq=1)
    client.hears(ACK, ack=811)
    assert len(app.received) == 810
