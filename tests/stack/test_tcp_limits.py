"""State is bounded: at the bound the newest is refused and the rest lives on."""

from __future__ import annotations

from collections.abc import Callable

from conversation import Client
from packets import ACK, FIN, RST, SYN

from ztun.stack import State


def others(client: Client, count: int) -> list[Client]:
    return [Client(client.net, client.family, port=50000 + i) for i in range(count)]


def test_too_many_half_open_connections(talk: Callable[..., Client]) -> None:
    client = talk(max_half_open=2)
    first, second, third = others(client, 3)
    first.says(SYN)
    second.says(SYN)
    third.says(SYN)
    third.hears(RST | ACK, seq=0, ack=1)
    assert third.dropped("tcp-limit-half-open") == 1
    first.says(RST, seq=1)  # one gives up
    third.says(SYN, seq=0)
    third.net.accepts()
    third.hears(SYN | ACK)


def test_established_connections_are_not_half_open(talk: Callable[..., Client]) -> None:
    client = talk(max_half_open=1)
    for one in others(client, 5):
        one.connects()
    assert client.net.stack.half_open == 0


def test_too_many_connections(talk: Callable[..., Client]) -> None:
    client = talk(max_connections=2)
    first, second, third = others(client, 3)
    app = first.connects()
    second.connects()
    third.says(SYN)
    third.hears(RST | ACK)
    first.says(ACK, b"lives on")
    assert app.received == b"lives on"
    first.waits(0.04)
    first.hears(ACK)


def test_half_open_is_counted_right_through_every_ending(talk: Callable[..., Client]) -> None:
    """`Net.check` compares it with reality after every step."""
    client = talk(syn_retries=0)
    stack = client.net.stack
    endings = others(client, 8)
    for one in endings:
        one.says(SYN)
    endings[0].says(RST, seq=1)
    for i, one in enumerate(endings[1:4], start=1):
        client.net.incoming[i].refuse(client.net.now)
        client.net.collect()
        one.hears(RST | ACK)
    client.net.incoming[4].abort(client.net.now)
    client.net.collect()
    endings[4].hears(RST | ACK)
    client.net.incoming[4].abort(client.net.now)
    client.net.incoming[4].refuse(client.net.now)
    assert stack.half_open == 3
    for i in (5, 6, 7):
        client.net.incoming.append(client.net.incoming[i])
        client.net.accepts()
        endings[i].hears(SYN | ACK)
    endings[5].says(RST, seq=1)
    endings[6].says(ACK, ack=1)
    client.waits(1)
    endings[7].hears(RST | ACK)
    assert stack.half_open == 0
    assert len(stack.connections) == 1


def test_a_port_used_again_and_again(client: Client) -> None:
    for round_number in range(5):
        again = Client(client.net, client.family, port=client.port, isn=1000 + round_number)
        app = again.connects()
        again.says(ACK | FIN, b"x")
        again.hears(ACK, ack=3)
        app.shuts_down()
        again.hears(ACK | FIN)
        again.acknowledges()
        assert app.conn.state is State.CLOSED
    assert not client.net.stack.connections


def test_two_flows_do_not_mix(client: Client) -> None:
    other = Client(client.net, client.family, port=client.port)
    other.server_port = 443
    app, other_app = client.connects(), other.connects()
    client.says(ACK, b"to 80")
    other.says(ACK, b"to 443")
    assert (app.received, other_app.received) == (b"to 80", b"to 443")
    client.waits(0.04)
    client.hears(ACK, ack=6)
    other.hears(ACK, ack=7)


# Per source.


def elsewhere(client: Client, host: int, port: int = 40000) -> Client:
    """A client at another address: of IPv6, another /64."""
    other = Client(client.net, client.family, port=port)
    other.address = bytes([10, 0, 7, host]) if client.family == 4 else bytes([0xFD, 0, 0, 0, 0, 0, 7, host] + [0] * 8)
    return other


def test_one_source_has_its_share_of_the_connections(talk: Callable[..., Client]) -> None:
    client = talk(max_connections_per_source=2)
    first, second, third = others(client, 3)
    app = first.connects()
    second.connects()
    third.says(SYN)
    third.hears(RST | ACK, seq=0, ack=1)
    assert third.dropped("tcp-limit-source") == 1
    elsewhere(client, 1).connects()  # others are not concerned
    first.says(ACK, b"lives on")
    assert app.received == b"lives on"
    app.sends(b"both ways")
    first.hears(ACK, b"both ways")
    second.says(RST)
    third.says(SYN, seq=0)
    third.net.accepts()
    third.hears(SYN | ACK)


def test_one_source_has_its_share_of_the_dials(talk: Callable[..., Client]) -> None:
    client = talk(max_half_open_per_source=2)
    first, second, third = others(client, 3)
    first.says(SYN)
    second.says(SYN)
    third.says(SYN)
    third.hears(RST | ACK, seq=0, ack=1)
    assert third.dropped("tcp-limit-half-open-source") == 1
    elsewhere(client, 1).connects()
    client.net.incoming[0].refuse(client.net.now)
    client.net.collect()
    first.hears(RST | ACK)
    third.says(SYN, seq=0)
    third.net.accepts()
    third.hears(SYN | ACK)


def test_a_source_is_a_whole_ipv6_prefix(talk: Callable[..., Client]) -> None:
    """A host makes itself as many addresses in its /64 as it likes."""
    client = talk(max_connections_per_source=1)
    client.connects()
    neighbour = Client(client.net, client.family)
    neighbour.address = client.address[:-1] + b"\x99"
    if client.family == 4:
        neighbour.connects()
    else:
        neighbour.says(SYN)
        neighbour.hears(RST | ACK)


def test_nothing_is_left_of_sources_that_are_gone(talk: Callable[..., Client]) -> None:
    client = talk()
    admission = client.net.stack.admission
    ends = [elsewhere(client, host) for host in range(20)]
    for number, one in enumerate(ends):
        if number % 2:
            one.connects()
            one.says(RST)
        else:
            one.says(SYN)
            one.says(RST, seq=1)
    assert not client.net.stack.connections
    assert admission.sources == 0


# Memory.

_KIB = 1024


def test_what_an_outbound_does_not_take_is_bounded_for_all_together(talk: Callable[..., Client]) -> None:
    client = talk(max_memory=64 * _KIB)
    hog, other, late = others(client, 3)
    slow = hog.connects(wscale=7)
    app = other.connects()
    slow.holds = True
    for offset in range(0, 128 * _KIB, 8 * _KIB):
        hog.says(ACK, bytes(8 * _KIB), seq=1 + offset)
    assert len(slow.received) == 64 * _KIB
    assert hog.dropped("memory-limit") == 8
    hog.net.sent.clear()
    late.says(SYN)
    late.hears(RST | ACK)
    assert late.dropped("memory-limit") == 9
    for offset in range(0, 256 * _KIB, 8 * _KIB):  # the rest lives on, at full speed
        other.says(ACK, bytes(8 * _KIB), seq=1 + offset)
    assert len(app.received) == 256 * _KIB
    other.net.sent.clear()
    app.sends(b"and the other way")
    other.hears(ACK, b"and the other way")
    slow.takes(64 * _KIB)
    hog.net.sent.clear()
    hog.says(ACK, b"again", seq=1 + 64 * _KIB)
    assert slow.received.endswith(b"again")
    late.says(SYN, seq=0)
    late.net.accepts()
    late.hears(SYN | ACK)
    hog.waits(0.04)
    hog.net.sent.clear()


def test_who_holds_nothing_may_still_hold_a_little(talk: Callable[..., Client]) -> None:
    """A quarter more is for those; beyond it, two segments each."""
    client = talk(max_memory=64 * _KIB)
    flows = others(client, 4)
    apps = [one.connects(mss=1000, wscale=7) for one in flows]
    for app in apps:
        app.holds = True
    for one in flows:
        for offset in range(0, 64 * _KIB, 16 * _KIB):
            one.says(ACK, bytes(16 * _KIB), seq=1 + offset)
    assert [len(app.received) for app in apps] == [64 * _KIB, 16 * _KIB, 2000, 2000]
    assert client.net.stack.memory.used == 80 * _KIB + 4000
    client.net.sent.clear()
    for app in apps:
        app.resets()
    assert client.net.stack.memory.used == 0
    client.net.sent.clear()


def test_out_of_order_data_is_not_kept_at_the_bound(talk: Callable[..., Client]) -> None:
    """It was never acknowledged, so the client sends it again (RFC 9293 section 3.10.7.4)."""
    client = talk(max_memory=16 * _KIB)
    hog, other = others(client, 2)
    hog.connects(sack_ok=True)
    app = other.connects(sack_ok=True)
    hog.says(ACK, bytes(16 * _KIB), seq=100)
    hog.hears(ACK, ack=1, sack=[(100, 100 + 16 * _KIB)])
    other.says(ACK, b"second", seq=6)
    other.hears(ACK, ack=1, sack=None)
    assert other.dropped("memory-limit") == 1
    other.says(ACK, b"first", seq=1)
    other.waits(0.04)
    other.hears(ACK, ack=6)
    other.says(ACK, b"second", seq=6)
    assert app.received == b"firstsecond"
    hog.says(ACK, bytes(99), seq=1)  # the gap is filled: all is passed on
    assert client.net.stack.memory.used == 0
    client.net.sent.clear()
    client.waits(0.04)
    client.net.sent.clear()


def test_many_small_pieces_count_as_what_they_take(talk: Callable[..., Client]) -> None:
    client = talk(max_memory=16 * _KIB)
    client.connects()
    for number in range(200):
        client.says(ACK, b"x", seq=10 + 2 * number)
    assert client.conn.rx.reassembly.size < 70
    assert client.dropped("memory-limit") > 130
    client.net.sent.clear()


def test_what_clients_do_not_acknowledge_is_bounded_for_all_together(talk: Callable[..., Client]) -> None:
    client = talk(max_memory=256 * _KIB)
    stalled = others(client, 8)
    apps = [one.connects(window=65535) for one in stalled]
    for app in apps:
        app.conn.tx.cc.cwnd = 1 << 20
        app.sends(bytes(60 * _KIB))
    stack = client.net.stack
    assert stack.memory.used <= 256 * _KIB * 5 // 4 + stack.pool.size + 8 * 2 * 1460
    assert all(app.conn.queued for app in apps), "each has sent something"
    client.net.sent.clear()
    late = Client(client.net, client.family, port=60000)
    late.says(SYN)
    late.hears(RST | ACK)
    for one, app in zip(stalled, apps, strict=True):
        while app.conn.queued:  # who goes on reading gets everything
            one.acknowledges(app.conn.tx.nxt - client.net.iss)
            client.net.collect()
            client.net.sent.clear()
        assert not app.unsent
    assert stack.memory.used == 0
    late.says(SYN, seq=0)
    late.net.accepts()
    late.hears(SYN | ACK)
