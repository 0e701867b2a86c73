"""ICMP messages, with scapy as the other opinion."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6TimeExceeded,
    IPv6,
    in6_chksum,
)
from scapy.packet import Raw

from ztun.wire import icmp, ip

CLIENT4, SERVER4 = bytes([10, 0, 0, 1]), bytes([192, 0, 2, 9])
CLIENT6, SERVER6 = bytes.fromhex("fd" + "00" * 14 + "01"), bytes.fromhex("20010db8" + "00" * 11 + "09")


def is_what_scapy_builds(packet: bytes) -> bool:
    layer = IPv6(packet) if packet[0] >> 4 == 6 else IP(packet)
    message = layer.payload
    if packet[0] >> 4 == 6:
        del layer.plen, message.cksum
    else:
        del layer.len, layer.chksum, message.chksum
    return bytes(layer) == packet


@pytest.mark.parametrize("size", [0, 1, 56, 1401])
def test_an_echo_reply(size: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    four = bytes(IP(src="10.0.0.1", dst="192.0.2.9") / ICMP(type=8, id=7, seq=3) / Raw(payload))
    six = bytes(IPv6(src="fd00::1", dst="2001:db8::9") / ICMPv6EchoRequest(id=7, seq=3, data=payload))
    for packet in (four, six):
        head = ip.parse(memoryview(packet), 0)
        reply = icmp.echo_reply(head, memoryview(packet)[head.payload : head.end])
        assert is_what_scapy_builds(reply)
        assert reply[-size - 4 :] == packet[-size - 4 :]
        back = ip.parse(memoryview(reply), 0)
        assert (back.source, back.destination) == (head.destination, head.source)
    assert IPv6(reply)[ICMPv6EchoReply].id == 7


@pytest.mark.parametrize("reason", list(icmp.Reason))
def test_an_unreachable(reason: icmp.Reason) -> None:
    invoking = bytes(IP(src="10.0.0.1", dst="192.0.2.9") / Raw(bytes(1000)))
    packet = icmp.unreachable(SERVER4, CLIENT4, reason, invoking)
    assert is_what_scapy_builds(packet)
    assert (IP(packet)[ICMP].type, IP(packet)[ICMP].code) == (3, reason.value[0])
    assert packet[28:] == invoking[:548]
    packet = icmp.unreachable(SERVER6, CLIENT6, reason, bytes(3000))
    assert IPv6(packet)[ICMPv6DestUnreach].code == reason.value[1]
    assert len(packet) == 1280
    assert in6_chksum(58, IPv6(packet), packet[40:]) == 0, "summed with its checksum"


@pytest.mark.parametrize("version", [4, 6])
def test_a_time_exceeded(version: int) -> None:
    source, destination, quoted = (SERVER4, CLIENT4, 548) if version == 4 else (SERVER6, CLIENT6, 1232)
    invoking = bytes(i % 251 for i in range(3000))
    packet = icmp.reassembly_time_exceeded(source, destination, invoking)
    assert is_what_scapy_builds(packet)
    message = IP(packet)[ICMP] if version == 4 else IPv6(packet)[ICMPv6TimeExceeded]
    assert (message.type, message.code) == ((11, 1) if version == 4 else (3, 1))
    assert packet[-quoted:] == invoking[:quoted]
    assert len(packet) == (576 if version == 4 else 1280)


@pytest.mark.parametrize(("version", "errors"), [(4, {3, 4, 5, 11, 12}), (6, set(range(128)))], ids=["ipv4", "ipv6"])
def test_what_is_an_error(version: int, errors: set[int]) -> None:
    assert {kind for kind in range(256) if icmp.is_error(version, kind)} == errors
