"""Anything at all on the wire: nothing escapes from the stack, and its books stay right.

Sizes are for the suite; `make fuzz` is where hours go.
"""

from __future__ import annotations

import random
import struct

import packets
import pytest
from conversation import CLIENT, SERVER, App, Client, Net
from hypothesis import given, settings
from hypothesis import strategies as st

from ztun.stack import Connection, StackSettings, State

_ROUNDS = 1500


def answer_everything(net: Net) -> None:
    """Outbounds that are there at once, and echo what they hear."""

    def incoming(conn: Connection) -> None:
        app = App(net, conn)
        app.on_data = lambda: conn.send(memoryview(bytes(app.received[-100:])), net.now)
        net.apps.append(app)
        conn.accept(app, net.now)

    net.on_incoming = incoming


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 255))
def test_random_bytes(data: bytes, flags: int) -> None:
    net = Net()
    answer_everything(net)
    net.receives(data, flags)
    net.waits(1)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([4, 6]), st.sampled_from([1, 6, 17, 44, 58, 0, 43, 60, 51]), st.binary(max_size=120))
def test_random_bytes_behind_an_ip_header(family: int, protocol: int, data: bytes) -> None:
    net = Net()
    answer_everything(net)
    net.receives(packets.ip_packet(CLIENT[family], SERVER[family], protocol, data), packets.NEEDS_CSUM)
    net.waits(1)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 255), st.integers(0, 0xFFFF))
def test_random_options_in_a_connection(options: bytes, flags: int, window: int) -> None:
    options = options[: len(options) // 4 * 4]
    net = Net()
    client = Client(net)
    client.connects_like_linux()
    client.says(flags, b"data", raw_options=options, window=window)
    client.waits(2)


@pytest.mark.parametrize("seed", range(8))
def test_random_segments_near_what_a_connection_expects(seed: int) -> None:
    """Sequence numbers, ACKs, windows and SACK blocks that are nearly right, in every state a few flows get into."""
    rng = random.Random(seed)
    net = Net(StackSettings(receive_buffer=20000, tcp_idle=30, keepalive_idle=5, keepalive_interval=1, fin_wait_2=10))
    answer_everything(net)
    clients = [Client(net, rng.choice((4, 6)), port=i, isn=rng.choice((1000, 0xFFFFFFF0))) for i in range(4)]
    for _ in range(_ROUNDS):
        client = rng.choice(clients)
        _one_segment(rng, net, client)
        if rng.random() < 0.1:
            _one_act_of_the_outbound(rng, net)
        if rng.random() < 0.2:
            net.waits(rng.choice((0.0, 0.05, 0.3, 2.0)))
        _listen(net, clients)
    assert len(net.stack.connections) <= 4
    net.waits(4000)
    assert not net.stack.connections, "every flow ends when nobody speaks any more"
    assert net.stack.half_open == 0
    assert net.stack.get_timer() is None


def _one_segment(rng: random.Random, net: Net, client: Client) -> None:
    near = (0, 0, 0, 1, -1, 10, 1000, -1000, 30000, 1 << 31)
    flags = rng.choice((2, 16, 16, 16, 16, 24, 17, 4, 20, 18, 0, 1, 41, 255))
    sack = tuple(
        (client.expected + rng.choice(near), client.expected + rng.choice(near)) for _ in range(rng.randrange(3))
    )
    options = {"mss": rng.choice((0, 1, 536, 1460, 65535)), "sack_ok": True, "wscale": rng.choice((0, 7, 14, 255))}
    client.says(
        flags,
        rng.randbytes(rng.choice((0, 0, 1, 100, 1400, 15000))),
        seq=client.nxt + rng.choice(near),
        ack=client.expected + rng.choice(near),
        window=rng.choice((0, 1, 1000, 65535)),
        ts=rng.choice((False, (client.clock() + rng.choice(near), 0))),
        sack=sack if not flags & 2 else (),
        **(options if flags & 2 else {}),
    )


def _one_act_of_the_outbound(rng: random.Random, net: Net) -> None:
    app = rng.choice(net.apps) if net.apps else None
    if app is None:
        return
    act = rng.randrange(6)
    if act == 0:
        app.shuts_down()
    elif act == 1 and rng.random() < 0.2:
        app.resets()
    elif act == 2 and app.how is None:
        app.holds = not app.holds
    elif act == 3:
        app.takes(app.conn.rx.held)
    elif app.how is None:
        app.sends(bytes(rng.choice((1, 1000, 50000))))
    net.collect()


def _listen(net: Net, clients: list[Client]) -> None:
    """Each client learns what it would know: where the stack's stream is."""
    while net.sent:
        raw = net.sent.popleft()
        protocol = raw[packets.VNET.size + (6 if raw[packets.VNET.size] >> 4 == 6 else 9)]
        if protocol != 6:
            packets.complete(raw)
            continue
        heard = packets.read_tcp(raw)
        for client in clients:
            if client.port == heard.port and client.address == heard.destination and heard.flags & 16:
                client.expected = (heard.seq + len(heard.payload) - net.iss) & packets.MASK
                client.nxt = (heard.ack - client.isn) & packets.MASK
                client.last_stamp = heard.options.get("ts", (0, 0))[0]


@pytest.mark.parametrize("seed", range(3))
def test_random_changes_to_a_real_conversation(seed: int) -> None:
    """Every packet of a good conversation, with a few of its bytes changed, checksums left to the card."""
    rng = random.Random(seed)
    net = Net()
    answer_everything(net)
    good = [
        packets.tcp_packet(CLIENT[4], SERVER[4], (9, 80), 1, 0, 2, 1000, packets.pack_options(1460, 7, True, (1, 0))),
        packets.tcp_packet(CLIENT[4], SERVER[4], (9, 80), 2, net.iss + 1, 16, 9, packets.pack_options(ts=(2, 0)), b"x"),
        packets.tcp_packet(CLIENT[6], SERVER[6], (9, 80), 1, 0, 2, 1000, packets.pack_options(1460)),
        packets.udp_packet(CLIENT[4], SERVER[4], (9, 53), b"question"),
        packets.udp_packet(CLIENT[6], SERVER[6], (9, 53), b"question"),
        packets.icmp_packet(CLIENT[4], SERVER[4], 8, 0, bytes(20)),
        packets.icmp_packet(CLIENT[6], SERVER[6], 2, 0, struct.pack("!I", 1300) + bytes(60)),
        packets.ip_packet(CLIENT[4], SERVER[4], 17, bytes(64), flags=0x2001),
        packets.ip_packet(CLIENT[6], SERVER[6], 44, struct.pack("!BBHI", 17, 0, 9, 5) + bytes(64)),
    ]
    for _ in range(_ROUNDS):
        packet = bytearray(rng.choice(good))
        for _ in range(rng.randrange(4)):
            packet[rng.randrange(len(packet))] = rng.randrange(256)
        net.receives(bytes(packet[: rng.choice((len(packet), rng.randrange(len(packet) + 1)))]), packets.NEEDS_CSUM)
        net.sent.clear()
    assert all(conn.state is not State.CLOSED for conn in net.stack.connections.values())
