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
