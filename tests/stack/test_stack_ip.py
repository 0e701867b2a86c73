"""IP as an end host has it: options, extension headers, fragments, and what is told about those that are wrong
(RFC 791, RFC 1122 section 3, RFC 8200, RFC 7112, RFC 5722)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import permutations

import packets
import pytest
from conversation import CLIENT, SERVER, Client, Net
from packets import SYN

from ztun.stack import StackSettings

_TCP, _UDP, _HOP, _ROUTING, _FRAGMENT, _ESP, _AH, _NO_NEXT, _OPTIONS = 6, 17, 0, 43, 44, 50, 51, 59, 60
_PADDING = bytes((1, 4, 0, 0, 0, 0))
_SYN6 = packets.tcp_packet(CLIENT[6], SERVER[6], (1000, 80), 1, 0, SYN, 1000)[40:]
_GROUP6 = bytes([0xFF, 2] + [0] * 13 + [5])

# Bodies of extension headers after Next Header and length, 8 bytes in all each.
_BODIES = {
    _HOP: _PADDING,
    _OPTIONS: _PADDING,
    _ROUTING: bytes((4, 0, 0, 0, 0, 0)),
    _FRAGMENT: bytes((0, 0, 0, 0, 0, 9)),
}


def chain(kinds: tuple[int, ...], last: int, payload: bytes, destination: bytes = SERVER[6]) -> bytes:
    """An IPv6 packet with these extension headers in front of `payload`, which is of protocol `last`."""
    following = (*kinds, last)[1:]
    headers = b"".join(bytes((after, 0)) + _BODIES[kind] for kind, after in zip(kinds, following, strict=True))
    return packets.ip_packet(CLIENT[6], destination, kinds[0] if kinds else last, headers + payload)


def with_options(options: bytes, kind: int = _OPTIONS, destination: bytes = SERVER[6]) -> bytes:
    """A SYN behind one header of options, which must fill it."""
    assert (2 + len(options)) % 8 == 0
    front = bytes((_TCP, len(options) // 8)) + options
    return packets.ip_packet(CLIENT[6], destination, kind, front + _SYN6)


def after(packet: bytes, settings: StackSettings | None = None) -> Net:
    """A stack that got this packet."""
    net = Net(settings)
    net.receives(packet)
    return net


def only_answer(net: Net) -> tuple[int, int, bytes]:
    """The one ICMP message that was sent: (type, code, everything after the checksum)."""
    assert len(net.sent) == 1
    return packets.read_icmp(net.sent.popleft())


# Extension headers.

_ORDERS = [
    order
    for count in range(4)
    for order in permutations((_OPTIONS, _ROUTING, _FRAGMENT, _OPTIONS), count)
]  # fmt: skip


@pytest.mark.parametrize("order", sorted(set(_ORDERS)))
@pytest.mark.parametrize("first", [(), (_HOP,)])
def test_extension_headers_may_come_in_any_order(order: tuple[int, ...], first: tuple[int, ...]) -> None:
    """RFC 8200 section 4.1; the fragment header among them is that of an atomic fragment (RFC 6946)."""
    net = after(chain(first + order, _TCP, _SYN6))
    assert len(net.incoming) == 1
    assert net.stack.drops == {}


@pytest.mark.parametrize(
    ("packet", "reason", "code", "pointer"),
    [
        (chain((_OPTIONS, _HOP), _TCP, _SYN6), "ip-extension", 1, 40),
        (chain((_HOP, _HOP), _TCP, _SYN6), "ip-extension", 1, 40),
        (chain((_HOP, _OPTIONS), 132, bytes(20)), "ip-protocol", 1, 48),
        (chain((), 132, bytes(20)), "ip-protocol", 1, 6),
        (chain((), _ESP, bytes(20)), "ip-protocol", 1, 6),
        (chain((_OPTIONS,), _AH, bytes(24)), "ip-protocol", 1, 40),
        (chain((), 1, bytes(20)), "ip-protocol", 1, 6),
        (with_options(bytes((0x85, 4, 0, 0, 0, 0))), "ip-option", 2, 42),
        (with_options(bytes((0xC2, 4, 0, 1, 0, 0)), _HOP), "ip-option", 2, 42),  # a jumbogram (RFC 2675)
        (with_options(bytes((1, 0, 0xBE, 2, 0, 0))), "ip-option", 2, 44),
    ],
)
def test_what_the_sender_is_told(packet: bytes, reason: str, code: int, pointer: int) -> None:
    net = after(packet)
    assert net.stack.drops == {reason: 1}
    assert only_answer(net) == (4, code, struct.pack("!I", pointer) + packet)


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 253])
def test_a_route_that_goes_on_is_refused(kind: int) -> None:
    """RFC 5095 section 3 for type 0, RFC 8200 section 4.4 for those that are not known."""
    route = bytes((_TCP, 2, kind, 1)) + bytes(4) + SERVER[6]
    packet = packets.ip_packet(CLIENT[6], SERVER[6], _ROUTING, route + _SYN6)
    net = after(packet)
    assert net.stack.drops == {"ip-source-route": 1}
    assert only_answer(net) == (4, 0, struct.pack("!I", 42) + packet)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (with_options(bytes((0x45, 4, 0, 0, 0, 0))), "ip-option"),
        (with_options(bytes((1, 5, 0, 0, 0, 0))), "ip-extension"),
        (with_options(bytes((1, 3, 0, 0, 0, 5))), "ip-extension"),
        (with_options(bytes(254)), "ip-extension"),
        (chain((), _NO_NEXT, b""), "ip-no-next-header"),
        (chain((_OPTIONS,), _NO_NEXT, bytes(20)), "ip-no-next-header"),
        (chain((_OPTIONS,) * 9, _TCP, _SYN6), "ip-extension"),
        (with_options(bytes((0x85, 4, 0, 0, 0, 0)), destination=_GROUP6), "ip-option"),
        (chain((), 132, bytes(20), _GROUP6), "ip-protocol"),
    ],
)
def test_what_the_sender_is_not_told(packet: bytes, reason: str) -> None:
    net = after(packet)
    net.is_silent()
    assert not net.incoming
    assert net.stack.drops.pop(reason) == 1
    assert set(net.stack.drops) <= {"icmp-destination"}


@pytest.mark.parametrize(
    "options", [bytes((1, 4, 0, 0, 0, 0)), bytes(6), bytes((5, 2, 0, 0, 0, 0)), bytes((30, 4) + (7,) * 4)]
)
@pytest.mark.parametrize("kind", [_HOP, _OPTIONS])
def test_options_that_may_be_unknown_are_passed_over(options: bytes, kind: int) -> None:
    assert len(after(with_options(options, kind)).incoming) == 1


def test_telling_is_limited() -> None:
    """Each source has a bucket, and all have one."""
    settings = StackSettings(icmp_rate=1, icmp_burst=5, icmp_rate_per_source=1, icmp_burst_per_source=3)
    net = Net(settings)
    for _ in range(4):
        net.receives(chain((), 132, bytes(20)))
    assert len(net.sent) == 3
    assert net.stack.drops["icmp-rate-source"] == 1
    for host in range(3):
        net.receives(packets.ip_packet(bytes([10, 0, 1, host]), SERVER[4], 132, bytes(20)))
    assert len(net.sent) == 5
    assert net.stack.drops["icmp-rate"] == 1
    net.now += 1
    net.receives(chain((), 132, bytes(20)))
    assert len(net.sent) == 6


# IPv4 options and protocols.


_SYN4 = packets.tcp_packet(CLIENT[4], SERVER[4], (1000, 80), 1, 0, SYN, 9)[20:]


def v4_with(options: bytes, payload: bytes = _SYN4) -> bytes:
    options += bytes(-len(options) % 4)
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, 4 * words + len(payload), 7, 0, 64, _TCP, 0)
    head += CLIENT[4] + SERVER[4] + options
    return head[:10] + struct.pack("!H", packets.naive_checksum(head)) + head[12:] + payload


@pytest.mark.parametrize(
    "options",
    [
        b"\0",
        b"\1\1\1\0",
        bytes((7, 7, 4, 0, 0, 0, 0)),
        bytes((68, 12, 5, 0) + (0,) * 8),
        bytes((148, 4, 0, 0)),
        b"\x1f\x02",
    ],
    ids=["end", "no-operation", "record-route", "timestamp", "router-alert", "unknown"],
)
def test_ipv4_options_are_passed_over(options: bytes) -> None:
    """RFC 1122 section 3.2.1.8."""
    net = after(v4_with(options))
    assert len(net.incoming) == 1
    assert net.stack.drops == {}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (bytes((131, 7, 4)) + SERVER[4], "ip-source-route"),
        (bytes((137, 7, 4)) + SERVER[4], "ip-source-route"),
        (bytes((1, 131, 7, 8)) + SERVER[4], "ip-source-route"),
        (bytes((7, 1, 0, 0)), "ip-option"),
        (bytes((7, 5, 0, 0)), "ip-option"),
        (bytes((1, 1, 1, 7)), "ip-option"),
    ],
)
def test_ipv4_options_that_are_refused(options: bytes, reason: str) -> None:
    """Source routes by the advice of RFC 7126 sections 4.3 and 4.4."""
    net = after(v4_with(options))
    net.is_silent()
    assert not net.incoming
    assert net.stack.drops == {reason: 1}


@pytest.mark.parametrize("protocol", [0, 2, 5, 41, 47, 50, 51, 58, 132, 255])
def test_a_protocol_that_nobody_speaks(protocol: int) -> None:
    """Destination Unreachable, code 2 (RFC 1122 section 3.2.2.1)."""
    packet = packets.ip_packet(CLIENT[4], SERVER[4], protocol, bytes(30))
    net = after(packet)
    assert net.stack.drops == {"ip-protocol": 1}
    assert only_answer(net) == (3, 2, bytes(4) + packet)


@pytest.mark.parametrize("source", ["0.0.0.0", "224.0.0.1", "255.255.255.255"])
def test_nobody_is_told_who_has_no_address(source: str) -> None:
    packet = packets.ip_packet(bytes(map(int, source.split("."))), SERVER[4], 132, bytes(30))
    net = after(packet)
    net.is_silent()
    assert net.stack.drops == {"ip-source": 1}


# Fragments.


def piece(
    family: int, offset: int, data: bytes, *, more: bool, ident: int = 9, protocol: int = _UDP, source: bytes = b""
) -> bytes:
    source = source or CLIENT[family]
    if family == 4:
        packet = packets.ip_packet(source, SERVER[4], protocol, data, flags=offset // 8 | more << 13)
        head = packet[:4] + struct.pack("!H", ident) + packet[6:10] + bytes(2) + packet[12:20]
        return head[:10] + struct.pack("!H", packets.naive_checksum(head)) + head[12:] + packet[20:]
    front = struct.pack("!BBHI", protocol, 0, offset | more, ident)
    return packets.ip_packet(source, SERVER[6], _FRAGMENT, front + data)


def datagram(family: int, size: int = 3000, source: bytes = b"") -> bytes:
    """A UDP header and payload, as they are cut into pieces."""
    packet = packets.udp_packet(
        source or CLIENT[family], SERVER[family], (1000, 53), bytes(i % 251 for i in range(size))
    )
    return packet[20 if family == 4 else 40 :]


def cut(family: int, whole: bytes, size: int, **more: int) -> list[bytes]:
    last = (len(whole) - 1) // size * size
    return [piece(family, at, whole[at : at + size], more=at < last, **more) for at in range(0, len(whole), size)]


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def test_the_next_header_of_the_first_fragment_counts() -> None:
    """RFC 8200 section 4.5: that of the others may differ."""
    whole = datagram(6)
    net = Net()
    net.receives(piece(6, 1400, whole[1400:2800], more=True, protocol=_TCP))
    net.receives(piece(6, 0, whole[:1400], more=True, protocol=_UDP))
    net.receives(piece(6, 2800, whole[2800:], more=False, protocol=_NO_NEXT))
    assert [one[-1] for one in net.datagrams] == [whole[8:]]


def test_options_behind_the_fragment_header_are_part_of_what_is_cut() -> None:
    whole = bytes((_UDP, 0)) + _PADDING + datagram(6)
    net = Net()
    for one in cut(6, whole, 1400, protocol=_OPTIONS):
        net.receives(one)
    assert [one[-1] for one in net.datagrams] == [whole[16:]]


def test_nothing_more_is_taken_of_a_datagram_whose_fragments_overlap(family: int) -> None:
    """RFC 5722 section 4: nor what comes later, even if it would fill the gap well."""
    whole = datagram(family)
    first, second, third = cut(family, whole, 1400)
    net = Net()
    net.receives(first)
    net.receives(piece(family, 1392, whole[1392:2000], more=True))
    for one in (first, second, third):
        net.receives(one)
    assert not net.datagrams
    assert net.stack.drops == {"ip-fragment-overlap": 4}
    net.waits(60)
    net.is_silent()  # nothing to quote was kept
    for one in (first, second, third):
        net.receives(one)
    assert len(net.datagrams) == 1


@pytest.mark.parametrize("offset", [0, 8, 1392])
def test_overlaps_of_any_kind(family: int, offset: int) -> None:
    whole = datagram(family)
    net = Net()
    net.receives(piece(family, 8, whole[8:1400], more=True))
    net.receives(piece(family, offset, bytes(32), more=True))
    assert net.stack.drops == {"ip-fragment-overlap": 1}


def test_two_ends(family: int) -> None:
    whole = datagram(family)
    net = Net()
    net.receives(piece(family, 1400, whole[1400:], more=False))
    net.receives(piece(family, 2800, whole[2800:], more=False))
    assert net.stack.drops == {"ip-fragment-overlap": 1}


def test_an_atomic_fragment_does_not_meet_the_others() -> None:
    """RFC 6946 section 4: the same identification, and still a packet of its own."""
    whole = datagram(6)
    first, second, third = cut(6, whole, 1400)
    net = Net()
    net.receives(first)
    net.receives(piece(6, 0, datagram(6, 10), more=False))
    net.receives(second)
    net.receives(third)
    assert [len(one[-1]) for one in net.datagrams] == [10, 3000]


@pytest.mark.parametrize(
    ("protocol", "data"),
    [(_TCP, bytes(16)), (_UDP, b""), (58, bytes((128, 0, 0, 0))), (_OPTIONS, bytes((_TCP, 1)) + bytes(6))],
)  # fmt: skip
def test_a_first_fragment_without_all_headers(protocol: int, data: bytes) -> None:
    """RFC 7112 section 5: Parameter Problem, code 3."""
    packet = piece(6, 0, data, more=True, protocol=protocol)
    net = after(packet)
    assert net.stack.drops == {"ip-fragment-tiny": 1}
    assert only_answer(net) == (4, 3, bytes(4) + packet)


def test_a_tiny_first_fragment_over_ipv4() -> None:
    """RFC 1858 section 3."""
    net = after(piece(4, 0, bytes(16), more=True, protocol=_TCP))
    net.is_silent()
    assert net.stack.drops == {"ip-fragment-tiny": 1}


def test_a_fragment_of_a_fragment_is_none() -> None:
    inner = struct.pack("!BBHI", _UDP, 0, 1, 5) + datagram(6, 2000)
    net = Net()
    for one in cut(6, inner, 1400, protocol=_FRAGMENT):
        net.receives(one)
    assert not net.datagrams
    assert "ip-fragment-tiny" in net.stack.drops
    net.sent.clear()


def test_fragments_within_fragments_cost_no_stack_of_ours() -> None:
    depth = 8000
    nested = struct.pack("!BBHI", _FRAGMENT, 0, 1, 5) * depth
    net = after(packets.ip_packet(CLIENT[6], SERVER[6], _FRAGMENT, nested))
    assert net.stack.drops == {"ip-fragment-tiny": 1}
    net.sent.clear()


@pytest.mark.parametrize(
    ("offset", "size", "more", "pointer"),
    [(16, 1399, True, 4), (8, 9, True, 4), (65528, 8, False, 42), (65520, 24, True, 42)],
)
def test_sizes_of_ipv6_fragments(offset: int, size: int, more: bool, pointer: int) -> None:
    """RFC 8200 section 4.5: Parameter Problem, code 0, at the length or at the offset."""
    packet = piece(6, offset, bytes(size), more=more)
    net = after(packet)
    assert net.stack.drops == {"ip-fragment-size": 1}
    assert only_answer(net)[:2] == (4, 0)
    net.receives(packet)
    assert only_answer(net)[2][:4] == struct.pack("!I", pointer)


@pytest.mark.parametrize(("offset", "size", "more"), [(0, 1399, True), (8, 9, True), (65528, 8, False), (8, 0, False)])
def test_sizes_of_ipv4_fragments(offset: int, size: int, more: bool) -> None:
    net = after(piece(4, offset, bytes(size), more=more))
    net.is_silent()
    assert net.stack.drops == {"ip-fragment-size": 1}


def test_time_exceeded_only_where_the_first_fragment_came(family: int) -> None:
    """RFC 1122 section 3.3.2, RFC 8200 section 4.5."""
    first, second, _ = cut(family, datagram(family), 1400)
    net = Net()
    net.receives(first)
    net.waits(59)
    net.is_silent()
    net.waits(2)
    kind, code, rest = only_answer(net)
    assert (kind, code) == ((11, 1) if family == 4 else (3, 1))
    assert first.startswith(rest[4:])
    net.receives(second)
    net.waits(61)
    net.is_silent()
    assert net.stack.drops == {"ip-fragment-time": 1}


# Bounds of reassembly.


def test_a_full_table_refuses_the_newest(family: int) -> None:
    """What is under way becomes whole; afterwards there is room again."""
    net = Net(StackSettings(max_fragments=8000, max_fragments_per_source=100_000))
    whole = datagram(family)
    first, second, third = cut(family, whole, 1400)
    net.receives(second)
    net.receives(third)
    net.receives(piece(family, 8, bytes(4000), more=True, ident=10))
    assert net.stack.drops == {"ip-fragment-limit": 1}
    net.receives(first)
    assert [one[-1] for one in net.datagrams] == [whole[8:]]
    for one in cut(family, datagram(family), 1400, ident=11):
        net.receives(one)
    assert len(net.datagrams) == 2


def test_one_source_does_not_fill_the_table(family: int) -> None:
    net = Net(StackSettings(max_fragments=100_000, max_fragments_per_source=12_000))
    for ident in range(20):
        net.receives(piece(family, 8, bytes(1000), more=True, ident=ident))
    assert net.stack.drops == {"ip-fragment-limit-source": 15}
    other = bytes([10, 0, 9, 9]) if family == 4 else bytes([0xFD, 0, 0, 0, 0, 0, 0, 9] + [0] * 7 + [2])
    whole = datagram(family, source=other)
    net.receives(piece(family, 0, whole[:1400], more=True, source=other))
    net.receives(piece(family, 1400, whole[1400:], more=False, source=other))
    assert len(net.datagrams) == 1
    net.waits(61)
    net.receives(piece(family, 8, bytes(1000), more=True, ident=77))
    assert net.stack.drops == {"ip-fragment-limit-source": 15}


def test_pieces_of_a_few_bytes_are_bounded(talk: Callable[..., Client]) -> None:
    client = talk()
    for offset in range(8, 8 * 600, 16):
        client.net.receives(piece(client.family, offset, bytes(8), more=True))
    for offset in range(16, 8 * 1200, 16):
        client.net.receives(piece(client.family, offset, bytes(8), more=True))
    assert client.dropped("ip-fragment-limit") == 1


def test_a_wrong_option_is_told_of_the_first_fragment() -> None:
    whole = bytes((_UDP, 0, 0x85, 4, 0, 0, 0, 0)) + datagram(6)
    first = cut(6, whole, 1400, protocol=_OPTIONS)[0]
    net = after(first)
    assert net.stack.drops == {"ip-option": 1}
    kind, code, rest = only_answer(net)
    assert (kind, code, rest[:4]) == (4, 2, struct.pack("!I", 50))
    assert first.startswith(rest[4:])


def test_what_is_wrong_with_a_reassembled_packet_is_told_of_that_packet(family: int) -> None:
    whole = bytes(i % 7 for i in range(3000))
    net = Net()
    for one in cut(family, whole, 1400, protocol=132):
        net.receives(one)
    assert net.stack.drops == {"ip-protocol": 1}
    kind, code, rest = only_answer(net)
    assert (kind, code, rest[:4]) == ((3, 2, bytes(4)) if family == 4 else (4, 1, struct.pack("!I", 6)))
    assert whole.startswith(rest[4 + (20 if family == 4 else 40) :])
