"""IPv4 and IPv6 headers and fragments, with scapy as the other opinion."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting
from scapy.packet import Raw

from ztun.wire import ip

V4 = (bytes([10, 0, 0, 1]), bytes([192, 0, 2, 9]))
V6 = (bytes.fromhex("fd000000000000000000000000000001"), bytes.fromhex("20010db8000000000000000000000009"))


def parse(packet: bytes, before: int = 0) -> ip.IpHeader:
    return ip.parse(memoryview(bytes(before) + packet), before)


def refusal(packet: bytes) -> str:
    with pytest.raises(ip.MalformedError) as refused:
        parse(packet)
    return str(refused.value)


@pytest.mark.parametrize("addresses", [V4, V6], ids=["ipv4", "ipv6"])
@given(protocol=st.integers(0, 255), length=st.integers(0, 60000), ttl=st.integers(1, 255))
def test_headers_are_what_scapy_writes(addresses: tuple[bytes, bytes], protocol: int, length: int, ttl: int) -> None:
    ours = ip.header(*addresses, protocol, length, ttl)
    theirs = IP(ours) if len(ours) == 20 else IPv6(ours)
    if len(ours) == 20:
        assert theirs.flags.DF
        assert theirs.len == 20 + length
        del theirs.chksum
    else:
        assert theirs.plen == length
    assert bytes(theirs) == ours


@pytest.mark.parametrize("before", [0, 10])
def test_what_was_written_is_read(before: int) -> None:
    for version, addresses, size in ((4, V4, 20), (6, V6, 40)):
        packet = ip.header(*addresses, ip.UDP, 30, 7) + bytes(30)
        expected = (version, *addresses, ip.UDP, before + size, before + size + 30, 7, None, 9 if version == 4 else 6)
        assert parse(packet, before) == expected


def test_options_come_before_the_payload() -> None:
    packet = bytes(IP(src="10.0.0.1", dst="192.0.2.9", proto=17, options=[b"\x01\x01\x01\x00"]) / Raw(b"payload"))
    head = parse(packet)
    assert packet[head.payload : head.end] == b"payload"


def test_extension_headers_are_skipped() -> None:
    packet = bytes(
        IPv6(src="fd00::1", dst="2001:db8::9")
        / IPv6ExtHdrHopByHop()
        / IPv6ExtHdrDestOpt()
        / IPv6ExtHdrRouting()
        / IPv6ExtHdrDestOpt(nh=17)
        / Raw(b"payload")
    )
    head = parse(packet)
    assert head.protocol == ip.UDP
    assert packet[head.payload : head.end] == b"payload"


def test_a_fragment_says_where_it_belongs() -> None:
    packet = bytes(IP(src="10.0.0.1", dst="192.0.2.9", proto=17, id=77, frag=185, flags="MF") / Raw(bytes(16)))
    assert parse(packet).fragment == (77, 1480, True)
    layer = IPv6(src="fd00::1", dst="2001:db8::9") / IPv6ExtHdrFragment(id=78, offset=181, m=0, nh=17) / Raw(bytes(16))
    head = parse(bytes(layer))
    assert head.fragment == (78, 1448, False)
    assert head.protocol == ip.UDP


def test_an_atomic_fragment_is_whole() -> None:
    layer = IPv6(src="fd00::1", dst="2001:db8::9") / IPv6ExtHdrFragment(id=78, nh=17) / Raw(b"payload")
    head = parse(bytes(layer))
    assert head.fragment is None
    assert head.end - head.payload == 7


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", "ip-truncated"),
        (b"\x45" + bytes(18), "ip-truncated"),
        (b"\x60" + bytes(38), "ip-truncated"),
        (b"\x75" + bytes(60), "ip-version"),
        (b"\x44" + bytes(60), "ip-length"),
        (ip.header(*V4, 17, 10), "ip-length"),
        (ip.header(*V6, 17, 10), "ip-length"),
        (ip.header(*V4, 17, 0)[:-1] + b"\0", "ip-checksum"),
        (ip.header(*V6, 0, 7) + bytes(7), "ip-extension"),
        (ip.header(*V6, 60, 8) + bytes((17, 1)) + bytes(6), "ip-extension"),
        (ip.header(*V6, 60, 72) + bytes((60,) + (0,) * 7) * 9, "ip-extension"),
    ],
)
def test_what_breaks_the_format_is_named(packet: bytes, reason: str) -> None:
    assert refusal(packet) == reason


@given(st.binary(max_size=100))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        head = parse(data)
    except ip.MalformedError:
        return
    assert 20 <= head.payload <= head.end <= len(data)


@pytest.mark.parametrize("addresses", [V4, V6], ids=["ipv4", "ipv6"])
@given(size=st.integers(1, 20000), mtu=st.integers(1280, 9000))
def test_fragments_add_up(addresses: tuple[bytes, bytes], size: int, mtu: int) -> None:
    payload = bytes(i % 251 for i in range(size))
    whole = bytearray(size)
    pieces = list(ip.fragments(*addresses, 17, memoryview(payload), mtu, 0x12345678))
    for number, (head, piece) in enumerate(pieces):
        packet = head + bytes(piece)
        assert len(packet) <= mtu
        got = parse(packet)
        assert got.protocol == 17
        if got.fragment is None:
            assert len(addresses[0]) == 16 or len(pieces) == 1
            continue
        identification, offset, more = got.fragment
        assert identification == (0x12345678 if len(addresses[0]) == 16 else 0x5678)
        assert more is (number < len(pieces) - 1)
        assert not more or len(piece) % 8 == 0
        whole[offset : offset + len(piece)] = packet[got.payload : got.end]
    if len(pieces) > 1:
        assert whole == payload


@pytest.mark.parametrize(
    ("address", "answer"),
    [
        ("00000000", False),
        ("0a000001", True),
        ("dfffffff", True),
        ("e0000001", False),
        ("ffffffff", False),
        ("00" * 16, False),
        ("ff02" + "00" * 13 + "01", False),
        ("fd00" + "00" * 13 + "01", True),
    ],
)
def test_who_can_be_answered(address: str, answer: bool) -> None:
    assert ip.is_unicast(bytes.fromhex(address)) is answer
