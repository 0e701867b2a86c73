"""What stands in the headers of our segments, and what a client may put into the headers of its own."""

from __future__ import annotations

import struct
from collections.abc import Callable

import packets
import pytest
from conversation import Client, Net
from packets import ACK, FIN, PSH, RST, SYN, URG

from ztun.stack import Closed, State

_ECE_CWR = 0xC0


def ip_fields(client: Client) -> tuple[int, int]:
    """(TTL or hop limit, TOS or traffic class) of the next packet, which is taken."""
    packet = packets.complete(client.net.sent.popleft())
    if client.family == 4:
        return packet[8], packet[1]
    return packet[7], struct.unpack_from("!I", packet)[0] >> 20 & 0xFF


def test_the_hop_limit_can_be_configured(talk: Callable[..., Client]) -> None:
    client = talk(hop_limit=7)
    client.opens()
    assert ip_fields(client) == (7, 0)


def test_also_that_of_segments_without_a_connection(talk: Callable[..., Client]) -> None:
    client = talk(hop_limit=7)
    client.says(ACK)
    assert ip_fields(client) == (7, 0)  # the RST
    client.connects().shuts_down()
    client.hears(ACK | FIN)
    client.says(ACK | FIN)
    client.hears(ACK)
    client.says(ACK | FIN, seq=1)
    assert ip_fields(client) == (7, 0)  # from TIME-WAIT


def test_the_dscp_can_be_set_and_changed(talk: Callable[..., Client]) -> None:
    client = talk(traffic_class=0xB8)
    client.opens()
    assert ip_fields(client) == (64, 0xB8)
    client.expected = 1
    client.says(ACK)
    client.conn.header.set_ip(64, 0x28)
    client.app.sends(b"less urgent")
    assert ip_fields(client) == (64, 0x28)


def test_packets_are_atomic_and_may_not_be_fragmented() -> None:
    client = Client(Net())
    client.opens()
    packet = packets.complete(client.net.sent.popleft())
    assert packet[4:8] == b"\0\0\x40\0"  # ID 0 and DF: RFC 6864


def test_ecn_is_not_agreed_to(client: Client) -> None:
    client.says(SYN | _ECE_CWR, mss=client.mss)
    client.app = client.net.accepts()
    client.hears(SYN | ACK)
    client.says(ACK | _ECE_CWR, b"data")
    assert client.app.received == b"data"
    client.waits(0.05)
    client.hears(ACK, ack=5)


def test_the_mss_is_said_in_the_syn_ack_and_nowhere_else(talk: Callable[..., Client]) -> None:
    client = talk(mtu=1400)
    client.opens()
    client.hears(SYN | ACK, mss=1400 - (1500 - client.mss))  # without any options: RFC 6691
    client.says(ACK)
    client.app.sends(b"data")
    client.hears(ACK, mss=None)
    client.says(ACK | FIN)
    client.hears(ACK, mss=None)


def test_push_marks_the_end_of_what_there_is(client: Client) -> None:
    app = client.connects(mss=1000)
    app.conn.tx.cc.cwnd = 1 << 20
    app.conn.tx.last_send = client.net.now
    client.acknowledges(window=65535)
    app.conn.send(memoryview(bytes(65000 + 300)), client.net.now)
    client.net.collect()
    flags = []
    while client.net.sent:
        flags.append(client.hears(ACK).flags & PSH)
    assert flags == [0, PSH]
    client.acknowledges()


def test_options_need_no_word_boundary(client: Client) -> None:
    stamps = struct.pack("!BBII", 8, 10, 77, 0)
    client.says(SYN, raw_options=b"\1" + stamps + b"\2\4\4\0" + b"\1")
    client.net.accepts()
    assert client.hears(SYN | ACK).options["ts"][1] == 77
    assert client.conn.client_mss == 1024


def test_options_may_come_in_any_segment(client: Client) -> None:
    """One that is unknown, and the MSS of a SYN where it means nothing."""
    app = client.connects()
    client.says(ACK, b"data", raw_options=bytes((253, 4, 1, 2, 2, 4, 0, 88)))
    assert app.received == b"data"
    assert client.conn.client_mss == client.mss
    client.says(ACK | FIN, raw_options=bytes((253, 4, 1, 2)))
    client.hears(ACK, ack=6)


def test_a_reset_may_carry_data(client: Client) -> None:
    app = client.connects()
    client.says(RST, b"why", seq=1)
    assert app.how is Closed.RESET_BY_CLIENT
    assert app.received == b""


@pytest.mark.parametrize("how", ["reset", "urgent"])
def test_a_shut_window_hides_neither_reset_nor_urgent_data(talk: Callable[..., Client], how: str) -> None:
    client = talk(receive_buffer=20000)
    app = client.connects()
    app.holds = True
    client.says(ACK, bytes(20000))
    client.hears(ACK, window=0)
    if how == "reset":
        client.says(RST, seq=20001)
        assert app.how is Closed.RESET_BY_CLIENT
        return
    client.says(ACK | URG, b"!", seq=20001, urgent=1)
    client.hears(ACK, ack=20001, window=0)
    app.takes(20000)
    client.hears(ACK, window=20000)
    client.says(ACK | URG, b"!", seq=20001, urgent=1)
    assert app.received[20000:] == b"!"
    client.waits(0.05)
    client.hears(ACK, ack=20002)


def test_an_urgent_pointer_beyond_its_segment_changes_nothing(client: Client) -> None:
    app = client.connects()
    client.says(ACK | URG, b"one", urgent=60000)
    client.says(ACK | URG, b"two", urgent=0)
    client.says(ACK, b"three", urgent=2)  # the pointer without the bit means nothing
    assert app.received == b"onetwothree"
    client.waits(0.05)
    client.hears(ACK, ack=12)


def test_another_syn_in_syn_received_is_challenged(client: Client) -> None:
    """The client's end was opened anew while our SYN,ACK was on its way (RFC 5961 section 4.2)."""
    client.opens()
    client.hears(SYN | ACK, seq=0, ack=1)
    client.says(SYN, seq=9000, mss=client.mss)
    client.hears(ACK, ack=1)
    assert client.conn.state is State.SYN_RECEIVED
    client.says(RST, seq=1)
    assert client.app.how is Closed.RESET_BY_CLIENT


def test_a_syn_that_crosses_another_is_answered_by_a_reset(client: Client) -> None:
    """We never open, so a SYN,ACK answers nothing of ours: simultaneous open cannot come about."""
    client.says(SYN | ACK, ack=77, mss=client.mss)
    client.hears(RST, seq=77)
    assert not client.net.stack.connections
