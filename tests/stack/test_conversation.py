"""The transcripts' own eyes: a packet that is wrong in any field they vouch for does not pass."""

from __future__ import annotations

import packets
import pytest
from conversation import Client, Net
from packets import ACK


def a_packet(size: int) -> bytes:
    """What the stack sends for so many bytes."""
    net = Net()
    app = Client(net).connects(mss=1000)
    app.sends(bytes(size))
    return net.sent.popleft()


@pytest.mark.parametrize("at", [0, 6, 8, 10 + 3, 10 + 8 + 2, 10 + 12, 10 + 20 + 16])
def test_a_wrong_field_is_noticed(at: int) -> None:
    """Flags, csum_start and csum_offset; IP length, checksum and source; the pseudo-header's sum."""
    packet = bytearray(a_packet(100))
    packets.read_tcp(bytes(packet))
    packet[at] ^= 4
    with pytest.raises((AssertionError, IndexError)):
        packets.read_tcp(bytes(packet))


@pytest.mark.parametrize("at", [1, 2])
def test_a_wrong_gso_field_is_noticed(at: int) -> None:
    packet = bytearray(a_packet(5000))
    packets.read_tcp(bytes(packet))
    packet[at] ^= 4
    with pytest.raises(AssertionError):
        packets.read_tcp(bytes(packet))


def test_unheard_packets_are_noticed() -> None:
    net = Net()
    client = Client(net)
    client.says(ACK, ack=1)
    with pytest.raises(AssertionError, match="not heard yet"):
        client.hears_nothing()
