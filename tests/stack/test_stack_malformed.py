"""Packets that break their format: dropped, counted under a name, never answered where that would be wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import CLIENT, SERVER, Client, Net
from packets import ACK, RST, SYN

_TCP, _UDP = 6, 17


def drops_of(packet: bytes, flags: int = 0) -> dict[str, int]:
    net = Net()
    net.receives(packet, flags)
    net.is_silent()
    assert not net.incoming
    assert not net.datagrams
    return net.stack.drops


def syn(family: int = 4, corrupt: int = 0, options: bytes = b"") -> bytes:
    return packets.tcp_packet(CLIENT[family], SERVER[family], (1000, 80), 1, 0, SYN, 1000, options, corrupt=corrupt)


def with_byte(packet: bytes, at: int, value: int) -> bytes:
    return packet[:at] + bytes((value,)) + packet[at + 1 :]


def v4(payload: bytes, protocol: int = _TCP, **fields: int) -> bytes:
    return packets.ip_packet(CLIENT[4], SERVER[4], protocol, payload, **fields)


def v6(payload: bytes, protocol: int = _TCP, **fields: int) -> bytes:
    return packets.ip_packet(CLIENT[6], SERVER[6], protocol, payload, **fields)


def short_tcp(words: int) -> bytes:
    """A TCP header that says it is so many words long."""
    return struct.pack("!HHIIHHHH", 1000, 80, 1, 0, words << 12 | SYN, 1000, 0, 0)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", "ip-truncated"),
        (b"\x45", "ip-truncated"),
        (syn()[:19], "ip-truncated"),
        (syn()[:30], "ip-length"),
        (syn(6)[:39], "ip-truncated"),
        (with_byte(syn(), 0, 0x55), "ip-version"),
        (with_byte(syn(), 0, 0x00), "ip-version"),
        (with_byte(syn(), 0, 0x44), "ip-length"),
        (v4(bytes(30), total=15), "ip-length"),
        (v4(bytes(30), total=60), "ip-length"),
        (v4(bytes(40), total=39), "ip-length"),
        (v6(bytes(30), total=31), "ip-length"),
        (v6(bytes(19)), "tcp-length"),
        (v4(bytes(20), check=1), "ip-checksum"),
        (v4(bytes(20), _UDP, check=1), "ip-checksum"),
        (syn(corrupt=1), "tcp-checksum"),
        (syn(6, corrupt=1), "tcp-checksum"),
        (v4(short_tcp(4)), "tcp-checksum"),
        (v6(bytes(20), 59), "ip-no-next-header"),
        (v6(bytes((6, 9, 0, 0, 0, 0, 0, 0)), 60), "ip-extension"),
        (v6(bytes(4), 0), "ip-extension"),
        (v6(bytes((60, 0) + (0,) * 6) * 9, 60), "ip-extension"),
        (v4(bytes(7), _UDP), "udp-truncated"),
        (packets.udp_packet(CLIENT[4], SERVER[4], (1, 2), b"data", length=7), "udp-length"),
        (packets.udp_packet(CLIENT[4], SERVER[4], (1, 2), b"data", length=13), "udp-length"),
        (packets.udp_packet(CLIENT[4], SERVER[4], (1, 2), b"data", check=1), "udp-checksum"),
        (packets.udp_packet(CLIENT[6], SERVER[6], (1, 2), b"data", check=1), "udp-checksum"),
        (packets.udp_packet(CLIENT[6], SERVER[6], (1, 2), b"data", check=0), "udp-checksum"),
        (v4(bytes(7), 1), "icmp-truncated"),
        (v6(bytes(7), 58), "icmp-truncated"),
        (packets.icmp_packet(CLIENT[4], SERVER[4], 8, 0, bytes(8), corrupt=1), "icmp-checksum"),
        (packets.icmp_packet(CLIENT[6], SERVER[6], 128, 0, bytes(8), corrupt=1), "icmp-checksum"),
        (packets.icmp_packet(CLIENT[4], SERVER[4], 13, 0, bytes(16)), "icmp-type"),
        (packets.icmp_packet(CLIENT[6], SERVER[6], 133, 0, bytes(16)), "icmp-type"),
    ],
)
def test_each_has_its_name(packet: bytes, reason: str) -> None:
    assert drops_of(packet) == {reason: 1}


@pytest.mark.parametrize("words", [0, 4, 6, 15])
@pytest.mark.parametrize("family", [4, 6])
def test_a_tcp_header_that_lies_about_its_length(family: int, words: int) -> None:
    build = v4 if family == 4 else v6
    assert drops_of(build(short_tcp(words)), packets.NEEDS_CSUM) == {"tcp-length": 1}


def test_lengths_are_checked_in_a_connection_too(talk: Callable[..., Client]) -> None:
    client = talk()
    app = client.connects()
    for words in (4, 15):
        head = struct.pack("!HHIIHHHH", client.port, 80, client.isn + 1, client.net.iss + 1, words << 12 | ACK, 9, 0, 0)
        packet = packets.ip_packet(client.address, client.server, _TCP, head + b"data")
        client.net.receives(packet, packets.NEEDS_CSUM)
    assert app.received == b""
    assert client.dropped("tcp-length") == 2


@pytest.mark.parametrize("source", ["0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1"])
def test_nobody_has_these_addresses(source: str) -> None:
    address = bytes(map(int, source.split(".")))
    ports = (1000, 80)
    assert drops_of(packets.tcp_packet(address, SERVER[4], ports, 1, 0, SYN, 1000)) == {"ip-source": 1}
    assert drops_of(packets.tcp_packet(CLIENT[4], address, ports, 1, 0, SYN, 1000)) == {"ip-source": 1}
    assert drops_of(packets.udp_packet(address, SERVER[4], ports, b"x")) == {"ip-source": 1}


@pytest.mark.parametrize("source", [bytes(16), bytes([0xFF, 2] + [0] * 13 + [1])])
def test_nobody_has_these_ipv6_addresses(source: bytes) -> None:
    assert drops_of(packets.tcp_packet(source, SERVER[6], (1000, 80), 1, 0, SYN, 1000)) == {"ip-source": 1}
    assert drops_of(packets.udp_packet(source, SERVER[6], (1000, 80), b"x")) == {"ip-source": 1}


def test_a_syn_behind_ip_options_opens_a_connection() -> None:
    """The slow path: an IPv4 header with options."""
    plain = syn(options=packets.pack_options(mss=1460))
    head = with_byte(with_byte(plain[:20] + bytes(4), 0, 0x46), 3, len(plain) + 4)
    head = head[:10] + bytes(2) + head[12:]
    head = head[:10] + struct.pack("!H", packets.naive_checksum(head)) + head[12:]
    net = Net()
    net.receives(head + plain[20:])
    assert len(net.incoming) == 1
    assert net.incoming[0].client_mss == 1460


def test_a_syn_behind_extension_headers_opens_a_connection() -> None:
    plain = syn(6)
    extensions = bytes((43, 0, 1, 4, 0, 0, 0, 0)) + bytes((6, 0, 0, 0, 0, 0, 0, 0))  # hop-by-hop padding, routing
    net = Net()
    net.receives(packets.ip_packet(CLIENT[6], SERVER[6], 0, extensions + plain[40:]))
    assert len(net.incoming) == 1


def test_an_atomic_fragment_is_a_whole_packet() -> None:
    """RFC 6946."""
    net = Net()
    net.receives(packets.ip_packet(CLIENT[6], SERVER[6], 44, bytes((6, 0, 0, 0, 1, 2, 3, 4)) + syn(6)[40:]))
    assert len(net.incoming) == 1


def test_padding_behind_a_packet_is_no_data(talk: Callable[..., Client]) -> None:
    client = talk()
    app = client.connects()
    packet = packets.tcp_packet(
        client.address, client.server, (client.port, 80), client.isn + 1, client.net.iss + 1, ACK, 9, b"", b"data"
    )
    client.net.receives(packet + bytes(14))
    assert app.received == b"data"
    client.waits(0.04)
    client.hears(ACK, ack=5)


# Segments that belong to no connection (RFC 9293 section 3.10.7.1).


def test_an_ack_of_nothing_is_reset_with_its_number(client: Client) -> None:
    client.says(ACK, seq=50, ack=70)
    client.hears(RST, seq=70)
    client.says(SYN | ACK, seq=50, ack=71)
    client.hears(RST, seq=71)


@pytest.mark.parametrize(("flags", "payload", "ack"), [(0, b"", 50), (0, b"abc", 53), (1, b"abc", 54)])
def test_a_segment_without_ack_is_reset_with_an_ack(client: Client, flags: int, payload: bytes, ack: int) -> None:
    client.says(flags, payload, seq=50)
    client.hears(RST | ACK, seq=0, ack=ack)


def test_a_reset_of_nothing_is_not_answered(client: Client) -> None:
    client.says(RST, seq=50)
    client.says(RST | ACK, seq=50, ack=50)
    client.hears_nothing()
    assert client.dropped("tcp-reset-closed") == 2
