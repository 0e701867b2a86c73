"""ICMP and ICMPv6: pings answered for those who are up, errors where due, never too many (RFC 792, 4443, 1122)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import Client

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
