"""ICMP and ICMPv6: pings answered for those who are up, errors where due, never too many (RFC 792, 4443, 1122)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import packets
import pytest
from conversation import Client, Net
from packets import ACK, RST, SYN

from ztun.stack import Closed
from ztun.stack.tokenbucket import SourceBuckets
from ztun.wire.icmp import Reason


def ping(client: Client, payload: bytes, kind: int | None = None) -> None:
    kind = (8 if client.family == 4 else 128) if kind is None else kind
    message = struct.pack("!HH", 77, 3) + payload
    client.net.receives(packets.icmp_packet(client.address, client.server, kind, 0, message))


@pytest.mark.parametrize("size", [0, 1, 56, 57, 1400])
def test_a_ping_comes_back_with_its_payload(client: Client, size: int) -> None:
    client.net.pingable.add(client.server)
    payload = bytes(i % 251 for i in range(size))
    ping(client, payload)
    kind, code, rest = packets.read_icmp(client.net.sent.popleft())
    assert (kind, code) == ((0, 0) if client.family == 4 else (129, 0))
    assert rest == struct.pack("!HH", 77, 3) + payload


def test_the_reply_goes_the_way_back(client: Client) -> None:
    client.net.pingable.add(client.server)
    ping(client, b"x")
    packet = packets.complete(client.net.sent.popleft())
    source, destination = (packet[12:16], packet[16:20]) if client.family == 4 else (packet[8:24], packet[24:40])
    assert (source, destination) == (client.server, client.address)


def test_a_ping_to_nobody_is_told_so(client: Client) -> None:
    ping(client, b"anyone?")
    kind, code, rest = packets.read_icmp(client.net.sent.popleft())
    assert (kind, code) == ((3, 13) if client.family == 4 else (1, 1))
    assert rest[4:].endswith(b"anyone?")
    assert rest[:4] == bytes(4)


def test_errors_are_rate_limited(talk: Callable[..., Client]) -> None:
    client = talk(icmp_rate=10, icmp_burst=3)
    for _ in range(5):
        ping(client, b"")
    assert len(client.net.sent) == 3
    assert client.dropped("icmp-rate") == 2
    client.waits(0.1)
    ping(client, b"")
    ping(client, b"")
    assert len(client.net.sent) == 4
    client.net.sent.clear()


def test_replies_are_not_errors_and_not_limited(talk: Callable[..., Client]) -> None:
    client = talk(icmp_rate=1, icmp_burst=1)
    client.net.pingable.add(client.server)
    for _ in range(20):
        ping(client, b"")
    assert len(client.net.sent) == 20
    client.net.sent.clear()


def test_errors_and_replies_are_never_answered(client: Client) -> None:
    kinds = (0, 3, 4, 5, 11, 12) if client.family == 4 else (1, 2, 3, 4, 100, 127, 129)
    for kind in kinds:
        ping(client, bytes(40), kind=kind)
    client.hears_nothing()


def test_nobody_is_told_of_multicast(client: Client) -> None:
    group = bytes([224, 0, 0, 5]) if client.family == 4 else bytes([0xFF, 2] + [0] * 13 + [5])
    kind = 8 if client.family == 4 else 128
    client.net.receives(packets.icmp_packet(client.address, group, kind, 0, bytes(8)))
    client.net.stack.send_unreachable(
        packets.udp_packet(client.address, group, (1, 2), b"x"), Reason.PORT, client.net.now
    )
    client.net.stack.send_unreachable(
        packets.udp_packet(group, client.server, (1, 2), b"x"), Reason.PORT, client.net.now
    )
    client.net.collect()
    client.hears_nothing()


@pytest.mark.parametrize(
    ("reason", "v4", "v6"),
    [
        (Reason.NETWORK, (3, 0), (1, 0)),
        (Reason.HOST, (3, 1), (1, 3)),
        (Reason.PORT, (3, 3), (1, 4)),
        (Reason.PROHIBITED, (3, 13), (1, 1)),
    ],
)
def test_each_reason_has_its_code(client: Client, reason: Reason, v4: tuple[int, int], v6: tuple[int, int]) -> None:
    invoking = packets.udp_packet(client.address, client.server, (1000, 53), b"question")
    client.net.stack.send_unreachable(invoking, reason, client.net.now)
    client.net.collect()
    kind, code, rest = packets.read_icmp(client.net.sent.popleft())
    assert (kind, code) == (v4 if client.family == 4 else v6)
    assert rest[4:] == invoking


def test_a_quotation_is_cut_where_the_rfcs_say(client: Client) -> None:
    invoking = packets.udp_packet(client.address, client.server, (1000, 53), bytes(1400))
    client.net.stack.send_unreachable(invoking, Reason.PORT, client.net.now)
    client.net.collect()
    packet = packets.complete(client.net.sent.popleft())
    assert len(packet) == (576 if client.family == 4 else 1280)


# Larger than a packet.


@pytest.mark.parametrize("size", [1473, 4000, 65535 - 20 - 8 - 60])
def test_a_ping_in_fragments_comes_back_in_fragments(client: Client, size: int) -> None:
    client.net.pingable.add(client.server)
    payload = bytes(i % 251 for i in range(size))
    kind = 8 if client.family == 4 else 128
    whole = packets.icmp_packet(client.address, client.server, kind, 0, struct.pack("!HH", 77, 3) + payload)
    for piece in pieces_of(client, whole):
        client.net.receives(piece)
    message = together(client, [packets.complete(raw) for raw in client.net.sent])
    client.net.sent.clear()
    assert message[:2] == (b"\0\0" if client.family == 4 else b"\x81\0")
    assert message[4:] == struct.pack("!HH", 77, 3) + payload
    pseudo = b"" if client.family == 4 else client.server + client.address + struct.pack("!II", len(message), 58)
    assert packets.naive_checksum(pseudo + message) == 0


def pieces_of(client: Client, packet: bytes) -> Iterator[bytes]:
    """The packet in fragments of 1400 bytes."""
    payload = packet[20 if client.family == 4 else 40 :]
    for at in range(0, len(payload), 1400):
        more = at + 1400 < len(payload)
        if client.family == 4:
            piece = payload[at : at + 1400]
            yield packets.ip_packet(client.address, client.server, 1, piece, flags=at // 8 | more << 13)
        else:
            piece = struct.pack("!BBHI", 58, 0, at | more, 5) + payload[at : at + 1400]
            yield packets.ip_packet(client.address, client.server, 44, piece)


def together(client: Client, fragments: list[bytes]) -> bytes:
    """What fragments carry, which come in order."""
    data = b""
    for number, packet in enumerate(fragments):
        if client.family == 4:
            word = int.from_bytes(packet[6:8], "big")
            offset, more, piece = (word & 0x1FFF) * 8, bool(word & 0x2000), packet[20:]
        else:
            word = int.from_bytes(packet[42:44], "big")
            offset, more, piece = word & 0xFFF8, bool(word & 1), packet[48:]
        assert (offset, more) == (len(data), number + 1 < len(fragments))
        data += piece
    return data


# Errors that clients send about packets of ours.

# (type, code): what may change, what stays true.
_SOFT = {4: [(3, 0), (3, 1), (3, 5), (11, 0), (11, 1), (12, 0)], 6: [(1, 0), (1, 3), (3, 0), (3, 1), (4, 0), (4, 1)]}
_HARD = {4: [(3, 2), (3, 3), (3, 9), (3, 10), (3, 13)], 6: [(1, 1), (1, 4), (1, 5), (1, 6)]}


def error(
    client: Client, kind: int, code: int, quoted: bytes, *, source: bytes | None = None, corrupt: int = 0
) -> None:
    """The client, or another host, sends an error that quotes a packet of the server."""
    packet = packets.icmp_packet(source or client.address, client.server, kind, code, bytes(4) + quoted, corrupt)
    client.net.receives(packet)


def segment(client: Client, seq: int) -> bytes:
    """The beginning of a segment of ours, as routers quote it."""
    ports = (client.server_port, client.port)
    packet = packets.tcp_packet(
        client.server, client.address, ports, client.net.iss + seq, 0, ACK, 9, payload=bytes(20)
    )
    return packet[: (20 if client.family == 4 else 40) + 8]


def test_a_hard_error_ends_a_handshake(client: Client) -> None:
    """RFC 1122 section 4.2.3.9: only that of a connection that is not established, and only about our SYN,ACK."""
    for port, (kind, code) in enumerate(_HARD[client.family], start=1000):
        one = Client(client.net, client.family, port=port)
        one.opens()
        one.hears(SYN | ACK)
        app = one.app
        error(one, kind, code, segment(one, 1))
        assert app.how is None
        assert one.dropped("icmp-sequence") == port - 999
        error(one, kind, code, segment(one, 0))
        assert app.how is Closed.ABORTED
        one.hears(RST | ACK)
    assert client.dropped("icmp-hard") == len(_HARD[client.family])
    assert client.net.stack.half_open == 0


def test_a_soft_error_does_not(client: Client) -> None:
    client.opens()
    client.hears(SYN | ACK)
    for kind, code in _SOFT[client.family]:
        error(client, kind, code, segment(client, 0))
    assert client.dropped("icmp-soft") == len(_SOFT[client.family])
    client.waits(1)
    client.hears(SYN | ACK)  # it is sent again, as if nothing had been said
    client.says(ACK)
    assert client.app.events == ["established"]


def test_no_error_ends_a_connection(client: Client) -> None:
    """RFC 5927 section 5.2: in synchronized states hard errors are soft ones."""
    app = client.connects()
    app.sends(b"in flight")
    client.hears(ACK, b"in flight")
    errors = _SOFT[client.family] + _HARD[client.family]
    for kind, code in errors:
        error(client, kind, code, segment(client, 1))
    assert app.how is None
    assert client.dropped("icmp-soft") == len(errors)
    client.acknowledges()
    for kind, code in errors:
        error(client, kind, code, segment(client, 1))
    assert client.dropped("icmp-sequence") == len(errors)


def test_an_error_about_a_dial_is_a_forgery(client: Client) -> None:
    """Nothing of ours is under way yet."""
    client.says(SYN)
    for kind, code in _HARD[client.family]:
        error(client, kind, code, segment(client, 0))
    assert client.dropped("icmp-sequence") == len(_HARD[client.family])
    client.net.accepts()
    client.hears(SYN | ACK)


def test_an_error_about_nobody(client: Client) -> None:
    client.connects()
    stranger = Client(client.net, client.family, port=999)
    for kind, code in _HARD[client.family]:
        error(client, kind, code, segment(stranger, 1))
    assert client.dropped("icmp-error") == len(_HARD[client.family])


def reply(client: Client) -> bytes:
    """A datagram that the server sent to the client."""
    return packets.udp_packet(client.server, client.address, (53, client.port), b"answer")


def key_of(client: Client) -> bytes:
    return client.address + client.server + struct.pack("!HH", client.port, 53)


def test_a_client_without_a_socket_is_noticed(client: Client) -> None:
    kind, code = (3, 3) if client.family == 4 else (1, 4)
    error(client, kind, code, reply(client))
    error(client, kind, code, reply(client)[: (20 if client.family == 4 else 40) + 8])
    assert client.net.refused == [key_of(client)] * 2
    assert client.dropped("icmp-port") == 2


def test_and_so_it_is_of_a_datagram_in_fragments(client: Client) -> None:
    """Over IPv6 a Fragment header stands in the quotation."""
    kind, code = (3, 3) if client.family == 4 else (1, 4)
    quoted = reply(client)
    if client.family == 6:
        quoted = packets.ip_packet(client.server, client.address, 44, struct.pack("!BBHI", 17, 0, 1, 9) + quoted[40:])
    error(client, kind, code, quoted)
    assert client.net.refused == [key_of(client)]


def test_only_the_client_knows_of_its_sockets(client: Client) -> None:
    kind, code = (3, 3) if client.family == 4 else (1, 4)
    router = bytes([10, 0, 0, 1]) if client.family == 4 else bytes([0xFD] + [0] * 14 + [1])
    error(client, kind, code, reply(client), source=router)
    for other_kind, other_code in _SOFT[client.family]:
        error(client, other_kind, other_code, reply(client))
    error(client, kind, code, reply(client), corrupt=1)
    assert client.net.refused == []
    assert client.dropped("icmp-error") == 1 + len(_SOFT[client.family])
    assert client.dropped("icmp-checksum") == 1


@pytest.mark.parametrize("length", [0, 8, 19, 27, 39, 47])
def test_a_quotation_that_is_too_short(client: Client, length: int) -> None:
    error(client, *((3, 3) if client.family == 4 else (1, 4)), reply(client)[:length])
    short = 28 if client.family == 4 else 48
    assert client.dropped("icmp-truncated") == (length < short)
    assert len(client.net.refused) == (length >= short)


def test_a_quotation_of_the_other_version(client: Client) -> None:
    other = packets.udp_packet(
        bytes(16 if client.family == 4 else 4), bytes(16 if client.family == 4 else 4), (1, 2), b""
    )
    error(client, *((3, 3) if client.family == 4 else (1, 4)), other + bytes(40))
    assert client.dropped("icmp-truncated") == 1


# Errors that are never sent.


def test_no_error_is_told_of(client: Client) -> None:
    """However it comes: RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e)."""
    kinds = (3, 4, 5, 11, 12) if client.family == 4 else (1, 2, 3, 4, 100, 127)
    for kind in kinds:
        message = packets.icmp_packet(client.address, client.server, kind, 0, bytes(40))
        client.net.stack.send_unreachable(message, Reason.HOST, client.net.now)
    client.net.collect()
    client.hears_nothing()
    assert client.dropped("icmp-not-due") == len(kinds)


def test_a_broken_datagram_of_errors_is_not_told_of() -> None:
    """Its first fragment tells what it is."""
    client = Client(Net(), 6)
    data = struct.pack("!BBHI", 58, 0, 1, 9) + bytes((1, 0, 0, 0))
    client.net.receives(packets.ip_packet(client.address, client.server, 44, data))
    client.hears_nothing()
    assert client.dropped("ip-fragment-tiny") == client.dropped("icmp-not-due") == 1


def test_a_later_fragment_is_not_told_of() -> None:
    client = Client(Net(), 4)
    packet = packets.ip_packet(client.address, client.server, 17, bytes(100), flags=7)
    client.net.stack.send_unreachable(packet, Reason.HOST, client.net.now)
    client.net.collect()
    client.hears_nothing()
    assert client.dropped("icmp-not-due") == 1


# Who gets the tokens.


def test_one_source_leaves_tokens_to_the_others(talk: Callable[..., Client]) -> None:
    client = talk(icmp_rate_per_source=10, icmp_burst_per_source=2)
    for _ in range(10):
        ping(client, b"")
    assert len(client.net.sent) == 2
    assert client.dropped("icmp-rate-source") == 8
    client.address = bytes([10, 0, 0, 77]) if client.family == 4 else bytes([0xFD, 1] + [0] * 13 + [2])
    ping(client, b"")
    assert len(client.net.sent) == 3
    client.net.sent.clear()


def test_buckets_are_few() -> None:
    buckets = SourceBuckets(1, 1)
    for number in range(3000):
        assert buckets.take(number.to_bytes(4, "big"), 0.0)
    assert len(buckets) == 1024
    assert not buckets.take((2999).to_bytes(4, "big"), 0.5)
    assert buckets.take((2999).to_bytes(4, "big"), 1.5)
