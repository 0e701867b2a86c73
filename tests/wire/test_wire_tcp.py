"""TCP options, UDP headers, sequence numbers and the virtio_net_hdr."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP

from ztun.wire import sequence, tcp, udp, vnet
from ztun.wire.ip import MalformedError

_U32 = st.integers(0, 0xFFFFFFFF)
_OPTIONS = st.builds(
    tcp.Options,
    mss=st.none() | st.integers(0, 0xFFFF),
    window_scale=st.none() | st.integers(0, 14),
    sack_permitted=st.booleans(),
    timestamps=st.none() | st.tuples(_U32, _U32),
    sack=st.just(()),
)
_SACK = st.lists(st.tuples(_U32, _U32), max_size=4).map(tuple)


@given(_OPTIONS)
def test_options_of_a_syn_survive_the_way(options: tcp.Options) -> None:
    packed = tcp.pack_options(options)
    assert len(packed) % 4 == 0
    assert len(packed) <= 40
    assert tcp.parse_options(memoryview(packed)) == options


@given(st.booleans(), _SACK)
def test_options_of_an_ack_survive_the_way(stamps: bool, sack: tuple[tuple[int, int], ...]) -> None:
    options = tcp.Options(timestamps=(1, 2) if stamps else None, sack=sack[:3] if stamps else sack)
    packed = tcp.pack_options(options)
    assert len(packed) % 4 == 0
    assert len(packed) <= 40
    assert tcp.parse_options(memoryview(packed)) == options


@given(_OPTIONS)
def test_scapy_reads_them_alike(options: tcp.Options) -> None:
    packed = tcp.pack_options(options)
    raw = struct.pack("!HHIIHHHH", 1, 2, 0, 0, (20 + len(packed)) // 4 << 12 | 2, 0, 0, 0) + packed
    read = dict(TCP(raw).options)
    assert read.get("MSS") == options.mss
    assert read.get("WScale") == options.window_scale
    assert read.get("Timestamp") == options.timestamps
    assert ("SAckOK" in read) is options.sack_permitted


@given(st.lists(st.sampled_from(["MSS", "WScale", "SAckOK", "Timestamp", "NOP", "Unknown"]), max_size=6), st.data())
def test_any_order_is_read(names: list[str], data: st.DataObject) -> None:
    packed = b""
    expected: dict[str, object] = {}
    for name in names:
        if name == "MSS":
            expected["mss"] = value = data.draw(st.integers(0, 0xFFFF))
            packed += struct.pack("!BBH", 2, 4, value)
        elif name == "WScale":
            value = data.draw(st.integers(0, 255))
            expected["window_scale"] = min(value, 14)
            packed += bytes((3, 3, value))
        elif name == "SAckOK":
            expected["sack_permitted"] = True
            packed += bytes((4, 2))
        elif name == "Timestamp":
            expected["timestamps"] = stamps = (data.draw(_U32), data.draw(_U32))
            packed += struct.pack("!BBII", 8, 10, *stamps)
        elif name == "NOP":
            packed += b"\1"
        else:
            packed += bytes((253, 5)) + b"\xf9\x89\x01"
    assert tcp.parse_options(memoryview(packed)) == tcp.Options(**expected)  # type: ignore[arg-type]


@given(st.binary(max_size=40))
def test_any_bytes_are_options_of_some_kind(data: bytes) -> None:
    options = tcp.parse_options(memoryview(data))
    assert options.window_scale is None or options.window_scale <= 14
    assert len(options.sack) <= 4


@pytest.mark.parametrize(
    "data",
    [b"\x02\x04\x05", b"\x08\x0a\x00", b"\x02\x00\x01\x01", b"\x02\x01\x01\x01", b"\x00\x02\x04\x05\xb4", b"\x05"],
)
def test_what_is_broken_ends_the_list(data: bytes) -> None:
    assert tcp.parse_options(memoryview(data)) == tcp.NO_OPTIONS


@pytest.mark.parametrize(
    "data", [b"\x02\x03\x05", b"\x03\x04\x01\x01", b"\x04\x03\x01", b"\x08\x03\x01", b"\x05\x07" + bytes(5)]
)
def test_an_option_of_a_wrong_length_is_skipped(data: bytes) -> None:
    assert tcp.parse_options(memoryview(data + b"\x02\x04\x05\xb4")) == tcp.Options(mss=1460)


def test_the_layout_that_is_read_fast_is_the_one_that_is_packed() -> None:
    assert tcp.pack_options(tcp.Options(timestamps=(1, 2))) == tcp.TIMESTAMPS.pack(tcp.TIMESTAMP_LEAD, 1, 2)


@given(st.integers(-(1 << 40), 1 << 40), st.integers(-(1 << 31), (1 << 31) - 1))
def test_unwrap_finds_the_nearest(near: int, distance: int) -> None:
    assert sequence.unwrap((near + distance) & sequence.MASK, near) == near + distance


@given(_U32, st.integers(-(1 << 34), 1 << 34))
def test_unwrap_keeps_the_low_bits(wire: int, near: int) -> None:
    full = sequence.unwrap(wire, near)
    assert full & sequence.MASK == wire
    assert -(1 << 31) <= full - near < 1 << 31


def test_a_udp_header_there_and_back() -> None:
    packet = udp.header(1000, 53, 5, 0xABCD) + b"hello" + b"padding"
    assert udp.parse(memoryview(packet), 0, len(packet)) == (1000, 53, 13, 0xABCD)


@pytest.mark.parametrize(
    ("length", "size", "reason"), [(8, 7, "udp-truncated"), (7, 20, "udp-length"), (21, 20, "udp-length")]
)
def test_udp_lengths_are_checked(length: int, size: int, reason: str) -> None:
    packet = struct.pack("!HHHH", 1, 2, length, 0) + bytes(12)
    with pytest.raises(MalformedError, match=reason):
        udp.parse(memoryview(packet), 0, size)


@given(st.tuples(st.integers(0, 255), st.integers(0, 255), *[st.integers(0, 0xFFFF)] * 4))
def test_a_vnet_header_there_and_back(fields: tuple[int, int, int, int, int, int]) -> None:
    packed = vnet.pack(*fields)
    assert len(packed) == vnet.LENGTH
    assert vnet.unpack(packed + b"packet") == fields
    assert packed[2:4] == struct.pack("=H", fields[2]), "in host order"


@given(st.integers(0, 65535), st.tuples(*[st.integers(0, 2**32 - 1)] * 2), st.integers(0, 255), st.integers(0, 19))
def test_the_layout_of_linux_reads_as_any_other_does(
    mss: int, stamps: tuple[int, int], scale: int, broken: int
) -> None:
    data = tcp.pack_options(tcp.Options(mss, scale, True, stamps))
    assert len(data) == 20
    for case in (data, data[:broken] + bytes((data[broken] ^ 1,)) + data[broken + 1 :]):
        assert tcp.parse_options(memoryview(case)) == tcp._parse_options(memoryview(case))
