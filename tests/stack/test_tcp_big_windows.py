"""Windows of up to a gigabyte, by a scale of 14 both ways (RFC 7323 section 2)."""

from __future__ import annotations

from collections.abc import Callable

from conversation import Client
from packets import ACK, SYN

_GIGABYTE = 1 << 30
_LARGEST = 0xFFFF << 14


def opens_wide(talk: Callable[..., Client], **settings: int) -> Client:
    client = talk(receive_buffer=_GIGABYTE, send_buffer=_GIGABYTE, max_memory=4 * _GIGABYTE, **settings)
    client.connects(wscale=14, sack_ok=True)
    return client


def test_both_ends_may_use_a_scale_of_14(talk: Callable[..., Client]) -> None:
    client = talk(receive_buffer=_GIGABYTE)
    client.opens(wscale=14)
    client.hears(SYN | ACK, wscale=14, window=65535)
    client.says(ACK)
    assert client.conn.tx.wnd == _LARGEST


def test_a_gigabyte_is_sent_into_a_window_of_a_gigabyte(talk: Callable[..., Client]) -> None:
    client = opens_wide(talk)
    conn = client.conn
    conn.tx.cc.cwnd = 1 << 40  # as if the network had taken it all along
    block = memoryview(bytes(client.mss * 44))
    sent = 0
    while conn.room() and sent < _GIGABYTE + len(block):
        conn.tx.last_send = client.net.now
        conn.send(block[: min(conn.room(), len(block))], client.net.now)
        sent = conn.tx.nxt - conn.tx.una
        client.net.stack.outbox.clear()
    assert _LARGEST - 64 * client.mss < sent <= _LARGEST
    for ack in (_GIGABYTE // 2, sent + 1):
        client.acknowledges(ack)
        client.net.sent.clear()
        assert conn.tx.una - client.net.iss == ack
    assert conn.queued == 0


def test_a_gigabyte_of_window_is_honoured_to_its_edge(talk: Callable[..., Client]) -> None:
    client = opens_wide(talk)
    client.says(ACK, b"first")
    client.waits(0.05)
    heard = client.hears(ACK, ack=6)
    edge = 6 + (heard.window << 14)
    assert edge > _LARGEST - (1 << 14)
    client.says(ACK, b"last", seq=edge - 4)
    client.hears(ACK, ack=6, sack=[(edge - 4, edge)])
    client.says(ACK, b"beyond", seq=edge + 20000)
    client.hears(ACK, ack=6)
    assert client.dropped("tcp-window") == 1
    assert client.app.received == b"first"


def test_numbers_half_a_gigabyte_apart_are_not_mistaken(talk: Callable[..., Client]) -> None:
    """Over the edge of 2**32, with something of a whole window in between."""
    client = talk(receive_buffer=_GIGABYTE, isn=0xFFFFFFFF - (1 << 29), iss=0xFFFFFFFF - 5)
    client.connects(wscale=14, sack_ok=True)
    client.says(ACK, b"1")
    client.waits(0.05)
    client.hears(ACK, ack=2)  # until here the window is that of the SYN,ACK, which is never scaled
    client.says(ACK, b"far", seq=(1 << 29) + 100)
    client.hears(ACK, ack=2, sack=[((1 << 29) + 100, (1 << 29) + 103)])
    client.says(ACK, b"near", seq=2)
    client.hears(ACK, ack=6, sack=[((1 << 29) + 100, (1 << 29) + 103)])
