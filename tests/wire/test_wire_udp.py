"""Cutting super-datagrams for a device that cannot."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from ztun.wire import checksum, ip, udp, vnet


def packet(family: int, payload: bytes) -> bytes:
    """By scapy, checksums complete."""
    network = (
        IP(src="192.0.2.7", dst="10.0.0.2", id=0, flags="DF") if family == 4 else IPv6(src="2001:db8::7", dst="fd00::2")
    )
    return bytes(network / UDP(sport=53, dport=4000) / Raw(payload))


def front_of(whole: bytes, size: int, gso_type: int = vnet.GSO_UDP_L4) -> bytes:
    """virtio_net_hdr and headers of a packet, its checksum reduced to the pseudo-header's sum."""
    start = 20 if whole[0] >> 4 == 4 else 40
    addresses = whole[12:20] if start == 20 else whole[8:40]
    pseudo = checksum.pseudo_sum(addresses, ip.UDP, len(whole) - start).to_bytes(2, "big")
    header = vnet.pack(vnet.NEEDS_CSUM, gso_type, start + 8, size, start, 6)
    return header + whole[: start + 6] + pseudo


@given(st.sampled_from([4, 6]), st.binary(min_size=2, max_size=400), st.integers(1, 100))
def test_what_comes_out_is_what_single_datagrams_would_be(family: int, payload: bytes, size: int) -> None:
    front = front_of(packet(family, payload), size)
    alone = [payload[at : at + size] for at in range(0, len(payload), size)]
    expected = [(front_of(packet(family, piece), 0, vnet.GSO_NONE), piece) for piece in alone]
    start = 20 if family == 4 else 40
    plain = vnet.pack(vnet.NEEDS_CSUM, csum_start=start, csum_offset=6)
    assert [(head, bytes(piece)) for head, piece in udp.segments(front, memoryview(payload))] == [
        (plain + head[vnet.LENGTH :], piece) for head, piece in expected
    ]


@pytest.mark.parametrize(("gso_type", "size"), [(vnet.GSO_UDP_L4, 9), (vnet.GSO_NONE, 0), (vnet.GSO_TCPV4, 0)])
def test_only_a_super_datagram_has_a_segment_size(gso_type: int, size: int) -> None:
    assert udp.segment_size(memoryview(vnet.pack(0, gso_type, 0, 9))) == size
