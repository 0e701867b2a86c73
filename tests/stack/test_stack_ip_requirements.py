"""One transcript for each requirement of docs/conformance.md on IP and ICMP that has no better home."""

from __future__ import annotations

import struct

import packets
import pytest
from conversation import CLIENT, SERVER, Client, Net
from packets import ACK, SYN

_SYN = packets.tcp_packet(CLIENT[6], SERVER[6], (1000, 80), 1, 0, SYN, 1000)
_DATAGRAM = packets.udp_packet(CLIENT[6], SERVER[6], (1000, 53), b"question")
_PAD = bytes((1, 4)) + bytes(4)  # PadN, to fill eight bytes

_HOP_BY_HOP, _ROUTING, _DESTINATION, _NONE = 0, 43, 60, 59


def behind(packet: bytes, *extensions: tuple[int, bytes]) -> bytes:
    """An IPv6 packet with extension headers in front of what it carries. extensions: (kind, all after the Next Header
    byte)."""
    body, following = packet[40:], packet[6]
    for kind, rest in reversed(extensions):
        body = bytes((following,)) + rest + body
        following = kind
    return packet[:4] + struct.pack("!HB", len(body), following) + packet[7:40] + body


_HARMLESS = ((_HOP_BY_HOP, b"\0" + _PAD), (_DESTINATION, b"\0" + _PAD), (_ROUTING, bytes((0, 4, 0)) + bytes(4)))


def test_tcp_behind_extension_headers() -> None:
    client = Client(Net(), 6, port=1000, isn=1)
    client.net.receives(behind(_SYN, *_HARMLESS))
    client.app = client.net.accepts()
    client.nxt = 1
    client.hears(SYN | ACK, seq=0, ack=1)
    client.says(ACK)
    segment = packets.tcp_packet(CLIENT[6], SERVER[6], (1000, 80), 2, client.net.iss + 1, ACK, 1000, b"", b"hello")
    client.net.receives(behind(segment, *_HARMLESS))
    assert client.app.received == b"hello"
    client.waits(0.05)
    client.hears(ACK, ack=6)


def test_udp_behind_extension_headers() -> None:
    net = Net()
    net.receives(behind(_DATAGRAM, *_HARMLESS))
    assert [datagram[4] for datagram in net.datagrams] == [b"question"]


@pytest.mark.parametrize("kind", [_HOP_BY_HOP, _DESTINATION])
def test_an_option_that_may_be_skipped_is(kind: int) -> None:
    net = Net()
    net.receives(behind(_DATAGRAM, (kind, b"\0" + bytes((0x1E, 4)) + b"what")))
    assert len(net.datagrams) == 1


def test_a_packet_with_one_hop_left_has_arrived(client: Client) -> None:
    """What the TUN brings is for us: hops are counted by those who forward (RFC 1122 section 3.2.1.7)."""
    body = packets.tcp_packet(client.address, client.server, (client.port, 80), client.isn, 0, SYN, 1000)
    size = 20 if client.family == 4 else 40
    client.net.receives(packets.ip_packet(client.address, client.server, 6, body[size:], ttl=1))
    assert len(client.net.incoming) == 1


@pytest.mark.parametrize("address", [bytes([127, 0, 0, 1]), bytes(15) + b"\1"], ids=["ipv4", "ipv6"])
def test_loopback_is_nobodys_address_on_a_wire(address: bytes) -> None:
    """RFC 1122 section 3.2.1.3 (g), RFC 4291 section 2.5.3."""
    family = 4 if len(address) == 4 else 6
    net = Net()
    net.receives(packets.tcp_packet(address, SERVER[family], (1000, 80), 1, 0, SYN, 1000))
    net.receives(packets.tcp_packet(CLIENT[family], address, (1000, 80), 1, 0, SYN, 1000))
    net.receives(packets.udp_packet(address, SERVER[family], (1000, 53), b"question"))
    net.is_silent()
    assert net.stack.drops == {"ip-source": 3}


def test_source_quench_slows_nothing_down() -> None:
    """RFC 6633."""
    client = Client(Net())
    app = client.connects(mss=1000)
    app.sends(bytes(10_000))
    client.hears_all()
    quoted = packets.tcp_packet(
        client.server, client.address, (80, client.port), client.net.iss + 1, 0, ACK, 0, b"", bytes(1000)
    )
    window = app.conn.tx.cc.cwnd
    client.net.receives(packets.icmp_packet(client.address, client.server, 4, 0, bytes(4) + quoted[:28]))
    client.hears_nothing()
    assert app.conn.tx.cc.cwnd == window
    assert app.how is None
