"""Path MTU from ICMP (RFC 1191, RFC 8201), believed only when it quotes what is in flight (RFC 5927 section 4.1)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import App, Client
from packets import ACK

_ROUTER = {4: bytes([10, 0, 0, 1]), 6: bytes([0xFD] + [0] * 14 + [1])}


def too_big(client: Client, mtu: int, quoted: bytes) -> None:
    """A router on the way says that a packet of ours, of which `quoted` is the beginning, was larger than `mtu`."""
    kind, code = (3, 4) if client.family == 4 else (2, 0)
    message = struct.pack("!I", mtu) + quoted
    client.net.receives(packets.icmp_packet(_ROUTER[client.family], client.server, kind, code, message))


def segment(client: Client, seq: int, port: int | None = None, length: int = 8) -> bytes:
    """The beginning of a packet that the stack has sent."""
    port = client.port if port is None else port
    packet = packets.tcp_packet(
        client.server, client.address, (client.server_port, port), client.net.iss + seq, 0, ACK, 0, b"", bytes(1000)
    )
    return packet[: (20 if client.family == 4 else 40) + length]


@pytest.fixture
def sending(client: Client) -> App:
    app = client.connects(sack_ok=True)
    app.sends(bytes(14000))
    client.hears_all()
    return app


def test_the_flight_is_sent_again_in_smaller_segments(client: Client, sending: App) -> None:
    window = sending.conn.tx.cc.cwnd
    too_big(client, 1400, segment(client, 1))
    heard = client.hears(ACK, seq=1)
    assert heard.gso_size == 1400 - (1500 - client.mss)
    client.hears_all()
    assert sending.conn.tx.cc.cwnd == window, "this is no congestion"
    client.acknowledges(client.expected)
    client.hears_all()


def test_later_segments_are_small_from_the_start(client: Client, sending: App) -> None:
    too_big(client, 1400, segment(client, 1))
    client.hears_all()
    client.acknowledges()
    client.hears_all()
    client.acknowledges()
    sending.sends(bytes(5000))
    assert client.hears(ACK).gso_size == 1400 - (1500 - client.mss)
    client.hears_all()
    client.acknowledges()


def test_timestamps_take_their_share(client: Client) -> None:
    app = client.connects_like_linux()
    app.sends(bytes(10000))
    client.hears_all()
    too_big(client, 1400, segment(client, 1))
    assert client.hears(ACK).gso_size == 1400 - (1500 - client.mss) - 12
    client.hears_all()


@pytest.mark.parametrize("mtu", [1500, 9000, 65535])
def test_a_path_is_never_made_larger(client: Client, sending: App, mtu: int) -> None:
    too_big(client, mtu, segment(client, 1))
    client.hears_nothing()


def test_no_path_is_smaller_than_the_protocol_allows(client: Client, sending: App) -> None:
    too_big(client, 68 if client.family == 4 else 100, segment(client, 1))
    assert client.hears(ACK).gso_size == (28 if client.family == 4 else 1280 - 60)
    client.net.sent.clear()


def test_a_router_that_does_not_know_the_size(client: Client, sending: App) -> None:
    """RFC 1191 section 5 for IPv4."""
    too_big(client, 0, segment(client, 1))
    assert client.hears(ACK).gso_size == (576 - 40 if client.family == 4 else 1280 - 60)
    client.net.sent.clear()


@pytest.mark.parametrize("seq", [0, -1000, 14000 + 1, 1 << 30])
def test_a_quote_of_what_is_not_in_flight_is_a_forgery(client: Client, sending: App, seq: int) -> None:
    too_big(client, 1300, segment(client, seq))
    client.hears_nothing()
    assert client.dropped("icmp-sequence") == 1


def test_a_quote_of_a_foreign_flow_changes_nothing(client: Client, sending: App) -> None:
    too_big(client, 1300, segment(client, 1, port=client.port + 1))
    client.hears_nothing()
    assert client.dropped("icmp-error") == 1


@pytest.mark.parametrize("length", range(8))
def test_a_quote_too_short_to_believe(client: Client, sending: App, length: int) -> None:
    too_big(client, 1300, segment(client, 1, length=length))
    client.hears_nothing()


def test_a_quote_of_nothing(client: Client, sending: App) -> None:
    too_big(client, 1300, b"")
    too_big(client, 1300, b"\x4f")
    client.hears_nothing()


def test_a_smaller_path_during_recovery(client: Client, sending: App) -> None:
    client.acknowledges(1, sack=((5001, 14001),))
    client.net.sent.clear()
    too_big(client, 1300, segment(client, 1))
    client.net.sent.clear()
    client.acknowledges(14000 + 1)
    assert sending.conn.tx.flight() == 0


def test_other_errors_do_not_end_a_connection(client: Client, sending: App) -> None:
    """Soft errors (RFC 1122 section 4.2.3.9, RFC 5461)."""
    kinds = [(3, 1), (3, 3), (11, 0), (12, 0)] if client.family == 4 else [(1, 0), (1, 4), (3, 0), (4, 0)]
    for kind, code in kinds:
        message = bytes(4) + segment(client, 1)
        client.net.receives(packets.icmp_packet(_ROUTER[client.family], client.server, kind, code, message))
    assert client.dropped("icmp-soft") == len(kinds)
    assert sending.how is None


def test_a_corrupt_error_is_not_believed(client: Client, sending: App) -> None:
    kind, code = (3, 4) if client.family == 4 else (2, 0)
    message = struct.pack("!I", 1300) + segment(client, 1)
    packet = packets.icmp_packet(_ROUTER[client.family], client.server, kind, code, message, corrupt=1)
    client.net.receives(packet)
    client.hears_nothing()
    assert client.dropped("icmp-checksum") == 1


def test_nobody_shrinks_an_idle_connection(client: Client, talk: Callable[..., Client]) -> None:
    client.connects()
    too_big(client, 1300, segment(client, 0))
    too_big(client, 1300, segment(client, 1))
    assert client.dropped("icmp-sequence") == 2
