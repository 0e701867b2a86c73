"""UDP (RFC 768) both ways, and fragments (RFC 791, RFC 8200 section 4.5)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import Client

from ztun.stack import DatagramHeader


def say(client: Client, payload: bytes, flags: int = 0, **fields: int) -> None:
    packet = packets.udp_packet(client.address, client.server, (client.port, 53), payload, **fields)
    client.net.receives(packet, flags)


def answer(client: Client, payload: bytes) -> None:
    ports = struct.pack("!HH", 53, client.port)
    client.net.stack.send_udp(DatagramHeader(client.server + client.address + ports), payload)
    client.net.collect()


@pytest.mark.parametrize("size", [0, 1, 2, 511, 1472, 9000, 65507])
def test_datagrams_in(client: Client, size: int) -> None:
    payload = bytes(i % 253 for i in range(size))
    say(client, payload)
    assert client.net.datagrams == [(client.address, client.port, client.server, 53, payload)]


def test_the_packet_is_there_to_be_quoted(client: Client) -> None:
    say(client, b"question")
    assert client.net.invoking == [packets.udp_packet(client.address, client.server, (client.port, 53), b"question")]


def test_no_checksum_is_fine_over_ipv4(client: Client) -> None:
    say(client, b"unchecked", check=0)
    assert len(client.net.datagrams) == (1 if client.family == 4 else 0)


def test_a_checksum_left_to_the_card_is_not_looked_at(client: Client) -> None:
    say(client, b"on its way", flags=packets.NEEDS_CSUM, check=0x1234)
    assert len(client.net.datagrams) == 1


def test_what_follows_the_datagram_is_not_part_of_it(client: Client) -> None:
    packet = packets.udp_packet(client.address, client.server, (client.port, 53), b"four")
    client.net.receives(packet + bytes(20))
    assert client.net.datagrams[0][-1] == b"four"


def test_a_length_within_the_packet_rules(client: Client) -> None:
    say(client, b"datagram", flags=packets.NEEDS_CSUM, length=12)
    assert client.net.datagrams[0][-1] == b"data"


@pytest.mark.parametrize("size", [0, 1, 100, 1200])
def test_datagrams_out(client: Client, size: int) -> None:
    payload = bytes(i % 253 for i in range(size))
    answer(client, payload)
    assert packets.read_udp(client.net.sent.popleft()) == (53, client.port, payload)


def test_a_sum_of_zero_goes_out_as_ones(client: Client) -> None:
    """RFC 768: zero says that there is no checksum."""
    for guess in range(0x10000):
        payload = struct.pack("!HH", guess, 0)
        packet = packets.udp_packet(client.server, client.address, (53, client.port), payload)
        if packet[26 if client.family == 4 else 46 :][:2] == b"\xff\xff":
            break
    answer(client, payload)
    assert packets.complete(client.net.sent.popleft()) == _as_sent(client, packet)
    answer(client, payload + bytes(3000))
    pieces = [packets.complete(client.net.sent.popleft()) for _ in range(len(client.net.sent))]
    assert _reassembled(client, pieces)[6:8] != b"\0\0"


def _as_sent(client: Client, packet: bytes) -> bytes:
    """`packet` with the IP header that the stack writes: ID 0, do not fragment."""
    if client.family == 6:
        return packet
    head = packet[:4] + b"\0\0\x40\0" + packet[8:10] + b"\0\0" + packet[12:20]
    return head[:10] + struct.pack("!H", packets.naive_checksum(head)) + head[12:] + packet[20:]


def _reassembled(client: Client, pieces: list[bytes]) -> bytes:
    payload = b""
    for i, piece in enumerate(pieces):
        assert len(piece) <= 1500
        last = i == len(pieces) - 1
        if client.family == 4:
            flags = struct.unpack_from("!H", piece, 6)[0]
            assert (flags & 0x1FFF) * 8 == len(payload)
            assert bool(flags & 0x2000) is not last
            assert not flags & 0x4000
            payload += piece[20:]
        else:
            assert piece[6] == 44
            following, offset = piece[40], struct.unpack_from("!H", piece, 42)[0]
            assert following == 17
            assert offset & 0xFFF8 == len(payload)
            assert bool(offset & 1) is not last
            payload += piece[48:]
    identifications = {piece[4:6] if client.family == 4 else piece[44:48] for piece in pieces}
    assert len(identifications) == 1
    return payload


@pytest.mark.parametrize("size", [1473, 3000, 9001, 65507])
def test_what_exceeds_the_mtu_goes_out_in_fragments(client: Client, size: int) -> None:
    payload = bytes(i % 253 for i in range(size))
    answer(client, payload)
    pieces = [packets.complete(client.net.sent.popleft()) for _ in range(len(client.net.sent))]
    whole = _reassembled(client, pieces)
    assert whole == packets.udp_packet(client.server, client.address, (53, client.port), payload)[-len(whole) :]


def test_each_fragmented_datagram_has_its_own_identification(client: Client) -> None:
    seen = set()
    for _ in range(3):
        answer(client, bytes(3000))
        piece = packets.complete(client.net.sent[0])
        seen.add(piece[4:6] if client.family == 4 else piece[44:48])
        client.net.sent.clear()
    assert len(seen) == 3


@pytest.mark.parametrize("size", [65508, 70000])
def test_what_no_datagram_can_carry_is_dropped(client: Client, size: int) -> None:
    if client.family == 6 and size == 65508:
        size = 65528
    answer(client, bytes(size))
    client.hears_nothing()
    assert client.dropped("udp-too-long") == 1


def test_datagrams_to_a_group_are_not_for_us(client: Client) -> None:
    """The kernel's own multicasts reach a TUN; no proxy can carry them."""
    group = bytes([224, 0, 0, 251]) if client.family == 4 else bytes([0xFF, 2] + [0] * 13 + [0xFB])
    client.net.receives(packets.udp_packet(client.address, group, (5353, 5353), b"query"))
    assert not client.net.datagrams
    assert client.dropped("ip-destination") == 1


# Fragments in.


def cut(client: Client, packet: bytes, size: int = 1480, ident: int = 9) -> list[bytes]:
    """The packet in fragments of `size` bytes of payload."""
    head = 20 if client.family == 4 else 40
    payload = packet[head:]
    pieces = []
    for offset in range(0, len(payload), size):
        piece, more = payload[offset : offset + size], offset + size < len(payload)
        if client.family == 4:
            word = offset // 8 | (0x2000 if more else 0)
            pieces.append(packets.ip_packet(client.address, client.server, packet[9], piece, flags=word))
        else:
            front = struct.pack("!BBHI", packet[6], 0, offset | more, ident)
            pieces.append(packets.ip_packet(client.address, client.server, 44, front + piece))
    return pieces


@pytest.fixture
def datagram(client: Client) -> bytes:
    payload = bytes(i % 253 for i in range(4000))
    return packets.udp_packet(client.address, client.server, (client.port, 53), payload)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 1, 1, 2)])
def test_fragments_in_any_order_make_a_datagram(client: Client, datagram: bytes, order: tuple[int, ...]) -> None:
    pieces = cut(client, datagram)
    for index in order:
        client.net.receives(pieces[index])
    assert [one[-1] for one in client.net.datagrams] == [datagram[-4000:]]


def test_a_missing_fragment_makes_none(client: Client, datagram: bytes) -> None:
    pieces = cut(client, datagram)
    client.net.receives(pieces[0])
    client.net.receives(pieces[2])
    assert not client.net.datagrams


def test_a_checksum_over_fragments_counts(client: Client, datagram: bytes) -> None:
    broken = datagram[:-1] + bytes((datagram[-1] ^ 1,))
    for piece in cut(client, broken):
        client.net.receives(piece)
    assert not client.net.datagrams
    assert client.dropped("udp-checksum") == 1


def test_overlapping_fragments_are_not_put_together(client: Client, datagram: bytes) -> None:
    """RFC 5722."""
    first, second, third = cut(client, datagram)
    shifted = cut(client, datagram[:-8], size=1472)[1]
    client.net.receives(first)
    client.net.receives(shifted)
    client.net.receives(third)
    assert not client.net.datagrams
    assert client.dropped("ip-fragment-overlap") >= 1
    assert second


def test_a_tcp_segment_in_fragments_is_a_segment(talk: Callable[..., Client]) -> None:
    client = talk()
    app = client.connects()
    segment = packets.tcp_packet(
        client.address, client.server, (client.port, 80), client.isn + 1, client.net.iss + 1, 16, 9, b"", b"d" * 3000
    )
    for piece in cut(client, segment):
        client.net.receives(piece)
    assert app.received == b"d" * 3000
    client.hears(16, ack=3001)


def test_fragments_are_forgotten_after_a_minute(client: Client, datagram: bytes) -> None:
    pieces = cut(client, datagram)
    client.net.receives(pieces[0])
    client.waits(61)
    client.net.sent.clear()  # Time Exceeded, perhaps
    client.net.receives(pieces[1])
    client.net.receives(pieces[2])
    assert not client.net.datagrams
