"""Honest connect: the client learns what the outbound found out (DESIGN 4; RFC 9293 section 3.10.7)."""

from __future__ import annotations

from collections.abc import Callable

import packets
import pytest
from conversation import Client, Net
from packets import ACK, FIN, RST, SYN

from ztun.stack import Closed, State
from ztun.wire.icmp import Reason


def test_the_syn_is_answered_when_the_outbound_has_connected(client: Client) -> None:
    client.says(SYN, mss=1460)
    client.waits(3.0)
    client.hears_nothing()
    app = client.net.accepts()
    client.hears(SYN | ACK, seq=0, ack=1, mss=client.mss)
    client.says(ACK)
    assert app.events == ["established"]
    assert client.conn.state is State.ESTABLISHED


def test_a_repeated_syn_waits_with_the_first(client: Client) -> None:
    client.says(SYN, mss=1460, ts=(100, 0))
    client.waits(1.0)
    client.says(SYN, seq=0, mss=1460, ts=(1100, 0))
    client.hears_nothing()
    assert len(client.net.incoming) == 1
    client.net.accepts()
    heard = client.hears(SYN | ACK, ack=1)
    assert heard.options["ts"][1] == 1100, "the client measures the round trip from its latest SYN"


def test_a_syn_with_another_number_does_not_disturb_the_dial(client: Client) -> None:
    client.says(SYN, seq=0, mss=1460)
    client.says(SYN, seq=5000, mss=1460)
    client.net.accepts()
    client.hears(SYN | ACK, ack=1)
    # A client that really started anew resets this, and its SYN comes again (RFC 9293 section 3.5.1).
    client.says(RST, seq=1)
    client.says(SYN, seq=5000, mss=1460)
    client.net.accepts()
    client.hears(SYN | ACK, ack=5001)


def test_refused_upstream_is_refused_to_the_client(client: Client) -> None:
    client.says(SYN, mss=1460)
    client.conn.refuse(client.net.now)
    client.net.collect()
    client.hears(RST | ACK, seq=0, ack=1, window=0)
    assert not client.net.stack.connections


def test_unreachable_upstream_is_told_by_icmp_that_quotes_the_syn(client: Client) -> None:
    client.says(SYN, mss=1460)
    client.conn.refuse(client.net.now, Reason.HOST)
    client.net.collect()
    kind, code, rest = packets.read_icmp(client.net.sent.popleft())
    assert (kind, code) == ((3, 1) if client.family == 4 else (1, 3))
    quoted = rest[4:]
    assert quoted[24:28] if client.family == 4 else quoted[44:48] == client.isn.to_bytes(4, "big")
    assert not client.net.stack.connections


def test_a_reset_while_dialing_ends_the_dial(client: Client) -> None:
    client.says(SYN, mss=1460)
    client.conn.handler = app = _Waiter()
    client.says(RST, seq=1)
    assert app.how is Closed.RESET_BY_CLIENT
    assert not client.net.stack.connections


def test_a_reset_with_a_foreign_number_does_not_end_the_dial(client: Client) -> None:
    client.says(SYN, mss=1460)
    client.says(RST, seq=5000)
    assert client.conn.state is State.DIALING
    client.net.accepts()
    client.hears(SYN | ACK)


def test_accepting_what_the_client_gave_up_is_without_effect(client: Client) -> None:
    client.says(SYN, mss=1460)
    client.says(RST, seq=1)
    client.net.accepts()
    client.hears_nothing()
    assert client.conn.is_closed
    assert client.net.stack.half_open == 0


def test_an_outbound_that_cannot_be_asked_costs_no_half_open_connection(client: Client) -> None:
    def fail(conn: object) -> None:
        raise RuntimeError("a defect above")

    client.net.on_incoming = fail
    with pytest.raises(RuntimeError, match="a defect above"):
        client.says(SYN, mss=1460)
    client.net.collect()
    client.hears(RST | ACK, seq=0, ack=1)
    assert not client.net.stack.connections


def test_the_syn_ack_is_repeated_ever_more_slowly_then_given_up(talk: Callable[..., Client]) -> None:
    client = talk(syn_retries=3)
    client.opens()
    client.hears(SYN | ACK, seq=0)
    for pause in (1, 2, 4):
        client.waits(pause - 0.01)
        client.hears_nothing()
        client.waits(0.01)
        client.hears(SYN | ACK, seq=0, ack=1, mss=client.mss)
    client.waits(8)
    client.hears(RST | ACK)
    assert client.app.how is Closed.TIMED_OUT
    assert client.net.stack.half_open == 0


def test_a_repeated_syn_is_answered_again_in_syn_received(client: Client) -> None:
    client.opens()
    client.hears(SYN | ACK)
    client.waits(0.5)
    client.says(SYN, seq=0, mss=1460)
    client.hears(SYN | ACK, seq=0, ack=1)


def test_data_may_come_with_the_handshake_ack(client: Client) -> None:
    client.opens()
    client.hears(SYN | ACK)
    client.says(ACK, b"GET /", ack=1)
    assert client.app.events == ["established"]
    assert client.app.received == b"GET /"
    client.waits(0.05)
    client.hears(ACK, ack=6)


@pytest.mark.parametrize("wrong", [0, 2, 7000, -7000, -1_000_000])
def test_an_ack_of_something_else_is_reset_in_syn_received(client: Client, wrong: int) -> None:
    client.opens()
    client.hears(SYN | ACK)
    client.says(ACK, ack=wrong)
    client.hears(RST, seq=wrong)
    assert client.conn.state is State.SYN_RECEIVED
    assert client.dropped("tcp-ack") == 1
    client.says(ACK, ack=1)
    assert client.app.events == ["established"]


def test_a_reset_ends_syn_received(client: Client) -> None:
    client.opens()
    client.hears(SYN | ACK)
    client.says(RST, seq=1)
    assert client.app.how is Closed.RESET_BY_CLIENT


def test_data_on_the_syn_is_not_taken(client: Client) -> None:
    client.says(SYN, b"early", mss=1460)
    app = client.net.accepts()
    client.hears(SYN | ACK, ack=1)
    client.says(ACK, seq=1, ack=1)
    client.says(ACK, b"early", seq=1)
    assert app.received == b"early"
    client.waits(0.05)
    client.hears(ACK, ack=6)


def test_a_large_packet_is_not_kept_for_its_syn(client: Client) -> None:
    client.says(SYN, bytes(20000), mss=1460)
    assert len(client.conn.syn) <= 1280


@pytest.mark.parametrize("flags", [SYN | FIN, SYN | RST, SYN | FIN | ACK])
def test_a_syn_with_other_flags_opens_nothing(client: Client, flags: int) -> None:
    client.says(flags, mss=1460, ack=77)
    assert not client.net.incoming
    if not flags & RST:
        client.hears(RST if flags & ACK else RST | ACK)


def test_a_segment_without_ack_is_ignored(client: Client) -> None:
    app = client.connects()
    client.says(0, b"data")
    assert app.received == b""
    client.hears_nothing()


def test_the_initial_sequence_number_is_asked_for_by_flow_and_time() -> None:
    asked: list[tuple[bytes, float]] = []
    net = Net()
    net.stack.isn = lambda key, now: asked.append((key, now)) or 99
    net.iss = 99
    client = Client(net)
    client.connects()
    ports = (40000).to_bytes(2, "big") + (80).to_bytes(2, "big")
    assert (client.address + client.server + ports, 1000.0) in asked


class _Waiter:
    """A handler for the time of dialing."""

    how: Closed | None = None

    def established(self, now: float) -> None:
        raise AssertionError

    def data(self, payload: memoryview, now: float) -> int:
        raise AssertionError

    eof = writable = established

    def closed(self, how: Closed, now: float) -> None:
        self.how = how
