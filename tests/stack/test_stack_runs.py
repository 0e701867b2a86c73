"""Runs of datagrams: several with one packet or one call, and nothing else about them changes."""

from __future__ import annotations

import struct

import packets
import pytest
from conversation import CLIENT, SERVER
from hypothesis import given
from hypothesis import strategies as st

from ztun.stack import Connection, Datagram, DatagramHeader, Stack, StackSettings
from ztun.stack.runs import RUN, UdpFlow

GSO_UDP_L4 = 5
PORTS = (4000, 53)
SIZES = st.sampled_from([0, 1, 2, 100, 100, 100, 1200, 1200, 1200, 1201, 1472, 32000, 65507])


class Owner:
    """Takes every flow that it is told of, and notes what is delivered."""

    def __init__(self, *, takes: bool = True) -> None:
        self.takes = takes
        self.first: list[bytes] = []
        self.runs: list[list[bytes]] = []
        self.stack = Stack(self, StackSettings(), lambda key, now: 1)

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        raise AssertionError

    def udp_received(self, datagram: Datagram, now: float) -> None:
        self.first.append(bytes(datagram.payload))
        if self.takes:
            self.stack.add_udp_flow(datagram.key, lambda payloads, now: self.runs.append(payloads))

    def udp_refused(self, key: bytes, now: float) -> None:
        raise AssertionError

    def echo_requested(self, destination: bytes, now: float) -> bool:
        raise AssertionError

    def reads(self, packet: bytes, gso_size: int = 0) -> None:
        """One packet from the device, its checksum left to the kernel."""
        front = packets.VNET.pack(packets.NEEDS_CSUM, GSO_UDP_L4 if gso_size else 0, 0, gso_size, 0, 0)
        self.stack.receive(memoryview(bytearray(front + packet)), 1.0)

    @property
    def heard(self) -> list[bytes]:
        return self.first + [payload for run in self.runs for payload in run]


def datagram(family: int, payload: bytes) -> bytes:
    return packets.udp_packet(CLIENT[family], SERVER[family], PORTS, payload)


def numbered(sizes: list[int]) -> list[bytes]:
    """Payloads of these sizes, no two alike where there is room for a number."""
    return [(struct.pack("!I", number) * (size // 4 + 1))[:size] for number, size in enumerate(sizes)]


both = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


# In.


@both
def test_a_super_datagram_is_cut_where_the_kernel_would(family: int) -> None:
    owner = Owner(takes=False)
    payloads = numbered([100] * 5 + [30])
    owner.reads(datagram(family, b"".join(payloads)), 100)
    assert owner.first == payloads
    assert owner.stack.received["udp"] == 6


@both
def test_a_super_datagram_is_looked_up_once_and_stays_together(family: int) -> None:
    owner = Owner()
    payloads = numbered([100] * 5 + [30])
    owner.reads(datagram(family, b"".join(payloads)), 100)
    owner.stack.flush(1.0)
    assert (owner.first, owner.runs) == (payloads[:1], [payloads[1:]])


def test_a_size_that_the_payload_does_not_reach_cuts_nothing() -> None:
    owner = Owner(takes=False)
    owner.reads(datagram(4, b"short"), 100)
    owner.reads(datagram(4, b""), 100)
    assert owner.first == [b"short", b""]


@both
def test_datagrams_of_one_batch_are_delivered_together_at_its_end(family: int) -> None:
    owner = Owner()
    payloads = numbered([100] * 4)
    for payload in payloads:
        owner.reads(datagram(family, payload))
    assert owner.heard == payloads[:1]
    owner.stack.flush(1.0)
    assert (owner.first, owner.runs) == (payloads[:1], [payloads[1:]])


def test_a_flow_that_is_gone_is_news_again() -> None:
    owner = Owner()
    owner.reads(datagram(4, b"one"))
    owner.stack.udp_flows.clear()
    owner.reads(datagram(4, b"two"))
    assert owner.first == [b"one", b"two"]


@both
def test_a_known_flow_is_held_to_the_same_format(family: int) -> None:
    owner = Owner()
    owner.reads(datagram(family, b"one"))
    for length in (7, 12, 60000):
        owner.reads(packets.udp_packet(CLIENT[family], SERVER[family], PORTS, b"two", length=length))
    owner.stack.flush(1.0)
    assert owner.runs == []
    assert owner.stack.drops == {"udp-length": 3}


def delivered(sizes: list[int]) -> list[list[int]]:
    runs: list[list[bytes]] = []
    waiting: list[UdpFlow] = []
    flow = UdpFlow(lambda payloads, now: runs.append(payloads), waiting)
    for payload in numbered(sizes):
        flow.add(payload, 1.0)
    assert len(waiting) == bool(sizes)
    flow.flush(1.0)
    return [[len(payload) for payload in run] for run in runs]


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        ([100] * 64, [[100] * 64]),
        ([100] * 65, [[100] * 64, [100]]),
        ([1200] * 54, [[1200] * 53, [1200]]),
        ([32000] * 3, [[32000] * 2, [32000]]),
        ([65507] * 2, [[65507]] * 2),
        ([100, 100, 60, 60, 100], [[100, 100, 60], [60], [100]]),
        ([60, 100], [[60], [100]]),
        ([0, 0, 100, 0], [[0], [0], [100], [0]]),
    ],
)
def test_where_a_run_ends(sizes: list[int], runs: list[list[int]]) -> None:
    """64 datagrams or 64,000 bytes, behind a shorter one, before a longer one, and around an empty one."""
    assert delivered(sizes) == runs


class Flows(Owner):
    """Keeps what every flow brings apart, by the client's port, and looks at each run."""

    def __init__(self) -> None:
        super().__init__()
        self.got: dict[int, list[bytes]] = {}

    def udp_received(self, datagram: Datagram, now: float) -> None:
        got = self.got[datagram.source_port] = [bytes(datagram.payload)]

        def take(payloads: list[bytes], now: float) -> None:
            size = len(payloads[0])
            assert len(payloads) <= RUN
            assert all(len(payload) == size for payload in payloads[:-1])
            assert len(payloads) == 1 or 0 < len(payloads[-1]) <= size
            got.extend(payloads)

        self.stack.add_udp_flow(datagram.key, take)


def bursts(parts: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(flow, size) of each datagram, from (flow, size, how many in a row)."""
    return [(flow, size) for flow, size, count in parts for _ in range(count if size < 2000 else 1 + count % 3)]


BURSTS = st.lists(st.tuples(st.integers(0, 2), SIZES, st.integers(1, 70)), min_size=1, max_size=12).map(bursts)


@given(st.sampled_from([4, 6]), BURSTS, st.sets(st.integers(0, 300), max_size=8))
def test_runs_hold_what_was_read_in_order(family: int, read: list[tuple[int, int]], ends: set[int]) -> None:
    """Three flows in turns, batches that end anywhere: without merging, each flow's list would be the same."""
    owner = Flows()
    sent: dict[int, list[bytes]] = {}
    payloads = numbered([size for _, size in read])
    for number, (port, _) in enumerate(read):
        packet = packets.udp_packet(CLIENT[family], SERVER[family], (port, 53), payloads[number])
        owner.reads(packet)
        sent.setdefault(port, []).append(payloads[number])
        if number in ends:
            owner.stack.flush(1.0)
            assert owner.got == sent
    owner.stack.flush(1.0)
    assert owner.got == sent


# Out.


def cut(raw: bytes) -> list[bytes]:
    """What the kernel makes of a packet on a TUN, by the rules of virtio_net_hdr and net/ipv4/udp_offload.c."""
    flags, gso_type, _, gso_size, start, offset = packets.VNET.unpack_from(raw)
    if not gso_type:
        return [packets.complete(raw)]
    assert (flags, gso_type, offset) == (packets.NEEDS_CSUM, GSO_UDP_L4, 6)
    front, payload = raw[packets.VNET.size : packets.VNET.size + start + 8], raw[packets.VNET.size + start + 8 :]
    assert 0 < len(payload) <= gso_size * 64
    assert struct.unpack_from("!H", front, start + 4)[0] == 8 + len(payload)
    assert len(front) + len(payload) <= 65535 + (0 if start == 20 else 40)
    family = 4 if start == 20 else 6
    half = 4 if family == 4 else 16
    addresses = front[start - 2 * half : start]
    pseudo = packets.naive_sum(addresses + struct.pack("!II", 8 + len(payload), 17))
    assert struct.unpack_from("!H", front, start + 6)[0] == pseudo, "the sum of the pseudo-header, whole length"
    if family == 4:
        assert packets.naive_checksum(front[:20]) == 0
    ports = struct.unpack_from("!HH", front, start)
    return [
        packets.udp_packet(addresses[:half], addresses[half:], ports, payload[at : at + gso_size])
        for at in range(0, len(payload), gso_size)
    ]


def answer(family: int, payload: bytes, size: int) -> tuple[Stack, list[bytes]]:
    stack = Owner().stack
    header = DatagramHeader(SERVER[family] + CLIENT[family] + struct.pack("!HH", *PORTS))
    stack.send_udp_run(header, memoryview(payload), size)
    return stack, [b"".join(packet) for packet in stack.outbox]


def payload_of(packet: bytes) -> bytes:
    return packet[28:] if packet[0] >> 4 == 4 else packet[48:]


@both
@pytest.mark.parametrize(
    ("count", "size", "last", "packets_sent"),
    [
        (1, 100, 0, 1),
        (2, 100, 0, 1),
        (2, 100, 7, 1),
        (64, 100, 0, 1),
        (64, 100, 1, 2),
        (54, 1200, 0, 1),
        (55, 1200, 0, 2),
        (45, 1452, 0, 1),
        (46, 1452, 0, 2),
    ],
)
def test_a_run_leaves_as_few_packets(family: int, count: int, size: int, last: int, packets_sent: int) -> None:
    payloads = numbered([size] * count + ([last] if last else []))
    _, sent = answer(family, b"".join(payloads), size)
    assert [payload_of(packet) for raw in sent for packet in cut(raw)] == payloads
    assert len(sent) == packets_sent


@both
def test_a_run_of_what_exceeds_the_mtu_leaves_in_fragments(family: int) -> None:
    stack, sent = answer(family, bytes(3 * 3000), 3000)
    assert len(sent) == 9
    assert not any(packets.VNET.unpack_from(raw)[1] for raw in sent)
    assert not stack.drops


@both
@pytest.mark.parametrize("size", [0, 5])
def test_a_run_of_one(family: int, size: int) -> None:
    _, sent = answer(family, b"hello"[:size], size)
    assert [packets.read_udp(raw) for raw in sent] == [(*PORTS, b"hello"[:size])]


@given(st.sampled_from([4, 6]), st.integers(1, 1452), st.integers(1, 200), st.integers(0, 1452))
def test_a_run_is_what_its_datagrams_would_be(family: int, size: int, count: int, last: int) -> None:
    """The oracle sends each by itself."""
    payloads = numbered([size] * count + ([min(last, size)] if last else []))
    _, sent = answer(family, b"".join(payloads), size)
    single = [packet for payload in payloads for raw in answer(family, payload, size)[1] for packet in cut(raw)]
    assert [payload_of(packet) for raw in sent for packet in cut(raw)] == [payload_of(packet) for packet in single]
