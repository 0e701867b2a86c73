"""The Internet checksum against the loop of RFC 1071 and against scapy."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import checksum as scapy_checksum

from ztun.wire import checksum


def naive_sum(data: bytes, start: int = 0) -> int:
    """RFC 1071 section 4.1, in Python."""
    total = start
    for i in range(0, len(data) - 1, 2):
        total += data[i] << 8 | data[i + 1]
    if len(data) & 1:
        total += data[-1] << 8
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=2000), st.integers(0, 0xFFFFFF))
def test_the_sum_is_the_loops_sum(data: bytes, start: int) -> None:
    assert checksum.ones_sum(data, start) == naive_sum(data, start) % 0xFFFF
    assert checksum.ones_sum(memoryview(data), start) == checksum.ones_sum(bytearray(data), start)


@given(st.binary(min_size=1, max_size=2000).filter(any))
def test_the_field_is_what_scapy_writes(data: bytes) -> None:
    # Both zeros of one's complement arithmetic are right, and of data that are all ones scapy writes the other one.
    assert checksum.finish(checksum.ones_sum(data)) % 0xFFFF == scapy_checksum(data) % 0xFFFF


@given(st.binary(min_size=4, max_size=200), st.integers(0, 98))
def test_a_packet_with_its_checksum_is_valid_and_one_with_a_wrong_bit_is_not(data: bytes, at: int) -> None:
    whole = bytearray(b"\0\0" + data)
    whole[:2] = checksum.finish(checksum.ones_sum(whole)).to_bytes(2, "big")
    assert checksum.is_valid(whole)
    whole[at % len(whole)] ^= 0x10
    assert not checksum.is_valid(whole)


@given(st.sampled_from([4, 16]), st.integers(0, 255), st.integers(0, 1 << 20), st.data())
def test_the_pseudo_header(size: int, protocol: int, length: int, data: st.DataObject) -> None:
    addresses = data.draw(st.binary(min_size=2 * size, max_size=2 * size))
    pseudo = addresses + struct.pack("!II", length, protocol)
    assert checksum.pseudo_sum(addresses, protocol, length) == naive_sum(pseudo) % 0xFFFF


def test_the_example_of_rfc_1071() -> None:
    data = bytes.fromhex("0001f203f4f5f6f7")
    assert checksum.ones_sum(data) == 0xDDF2
    assert checksum.finish(0xDDF2) == 0x220D


def test_the_two_zeros() -> None:
    assert checksum.ones_sum(b"\xff\xff") == checksum.ones_sum(b"") == 0
    assert checksum.finish(0) == checksum.finish(0xFFFF) == 0xFFFF
