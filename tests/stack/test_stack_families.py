"""Packets are counted by protocol and by IP version, on the short ways and on the long ones."""

from __future__ import annotations

import struct

import packets
import pytest
from conversation import Client

CHECKED = 2  # VIRTIO_NET_HDR_F_DATA_VALID


def of_ipv6(client: Client, protocol: str) -> int:
    """What was counted for IPv6, after a look at the sum."""
    stack = client.net.stack
    assert stack.received6[protocol] in (0, stack.received[protocol])
    return stack.received6[protocol]


def test_tcp(client: Client) -> None:
    client.connects()
    client.says(packets.ACK, b"data")

    assert client.net.stack.received["tcp"] == 3
    assert of_ipv6(client, "tcp") == (3 if client.family == 6 else 0)


@pytest.mark.parametrize("flags", [0, CHECKED])
def test_udp(client: Client, flags: int) -> None:
    for _ in range(2):
        packet = packets.udp_packet(client.address, client.server, (client.port, 53), b"question")
        client.net.receives(packet, flags)

    assert client.net.stack.received["udp"] == 2
    assert of_ipv6(client, "udp") == (2 if client.family == 6 else 0)


def test_icmp(client: Client) -> None:
    kind = 8 if client.family == 4 else 128
    client.net.pingable.add(client.server)
    client.net.receives(packets.icmp_packet(client.address, client.server, kind, 0, struct.pack("!HH", 77, 3)))
    client.net.sent.clear()

    assert client.net.stack.received["icmp"] == 1
    assert of_ipv6(client, "icmp") == (1 if client.family == 6 else 0)


def test_a_segment_that_was_cut_in_two(client: Client) -> None:
    """Reassembled packets take the long way."""
    if client.family == 6:
        header = struct.pack("!BBHI", 6, 0, 0, 7)  # a fragment header of a whole packet (RFC 6946)
        segment = packets.tcp_packet(client.address, client.server, (client.port, 80), 1, 0, 2, 1000)[40:]
        client.net.receives(packets.ip_packet(client.address, client.server, 44, header + segment))
    else:
        packet = packets.tcp_packet(client.address, client.server, (client.port, 80), 1, 0, 2, 1000)
        client.net.receives(_with_option(packet))

    assert client.net.stack.received["tcp"] == 1
    assert of_ipv6(client, "tcp") == (1 if client.family == 6 else 0)


def _with_option(packet: bytes) -> bytes:
    """The same packet with four bytes of IP options (End of Options List, RFC 791)."""
    head = bytearray(packet[:20] + bytes(4))
    head[0] = 0x46
    head[2:4] = struct.pack("!H", len(packet) + 4)
    head[10:12] = bytes(2)
    head[10:12] = struct.pack("!H", packets.naive_checksum(bytes(head)))
    return bytes(head) + packet[20:]
