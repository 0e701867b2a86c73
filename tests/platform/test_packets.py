"""Single packets: what is malformed, what is nobody's business, and port 53."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest
from lan_world import ETHERTYPE, EVERYTHING, GO_ON, MARK, REDIRECT, SHOT, Bench, frame, packed, packet, prefix, udp

from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, RULE_DNS, RULE_FAKE_IP, Verdict

HOP_BY_HOP, ICMP, TCP, UDP, ROUTING, FRAGMENT, AUTHENTICATION, OPTIONS = 0, 1, 6, 17, 43, 44, 51, 60
CLIENT4, CLIENT6, FAR4, FAR6 = "10.9.0.2", "fd00:9::2", "203.0.113.5", "2001:db8::5"


@pytest.fixture
def tunnelling(bench: Bench) -> Bench:
    bench.classifier.replace_rules(EVERYTHING)
    return bench


@pytest.fixture
def hijacking() -> Iterator[Bench]:
    made = Bench(hijack_dns=True, own=["10.9.0.1", "fd00:9::1"])
    made.classifier.replace_rules([prefix("0.0.0.0/0", Verdict.DIRECT, 0), prefix("::/0", Verdict.DIRECT, 0)])
    yield made
    made.close()


def changed(data: bytes, at: int, layout: str, *values: int) -> bytes:
    """A copy of a packet with a field overwritten."""
    copy = bytearray(data)
    struct.pack_into(layout, copy, at, *values)
    return bytes(copy)


def extended(*headers: tuple[int, bytes], transport: bytes = b"\x10\xe1\x00\x35\x00\x08\x00\x00") -> bytes:
    """An IPv6 packet with extension headers, each given with its own type and without the next one's."""
    kinds = [kind for kind, _ in headers] + [UDP]
    body = b"".join(bytes([following]) + rest for (_, rest), following in zip(headers, kinds[1:], strict=True))
    return packet(CLIENT6, FAR6, kinds[0], body + transport)


IPV4, IPV6 = udp(CLIENT4, FAR4, 80, b"x" * 20), udp(CLIENT6, FAR6, 80, b"x" * 20)

MALFORMED: dict[str, list[tuple[int, bytes]]] = {
    "drop_bad_version": [
        (4, changed(IPV4, 0, "!B", 0x65)),
        (4, changed(IPV4, 0, "!B", 0x05)),
        (6, changed(IPV6, 0, "!B", 0x40)),
    ],
    "drop_bad_header": [(4, changed(IPV4, 0, "!B", first)) for first in (0x40, 0x44, 0x4F)],
    "drop_bad_length": [
        (4, changed(IPV4, 2, "!H", len(IPV4) + 1)),
        (4, changed(IPV4, 2, "!H", 19)),
        (4, changed(IPV4, 2, "!H", 0)),
        (6, changed(IPV6, 4, "!H", len(IPV6) - 39)),
        (6, changed(IPV6, 4, "!H", 0xFFFF)),
    ],
    "drop_bad_extension": [
        (6, extended((OPTIONS, b"\xff" + bytes(6)))),  # 2 KiB, it says
        (6, extended((ROUTING, b"\x02" + bytes(6)))),
        (6, extended((AUTHENTICATION, b"\x20" + bytes(6)))),
        (6, extended(*[(OPTIONS, bytes(7))] * 9)),  # one too many
        (6, packet(CLIENT6, FAR6, OPTIONS, b"\x11\x00")),
        (6, packet(CLIENT6, FAR6, FRAGMENT, bytes(7))),
    ],
    "drop_short_transport": [
        (4, packet(CLIENT4, FAR4, TCP, b"\x00\x50\x00")),
        (4, packet(CLIENT4, FAR4, UDP, b"")),
        (6, packet(CLIENT6, FAR6, UDP, b"\x00\x50")),
        (6, extended((OPTIONS, bytes(7)), transport=b"\x00")),
    ],
    "drop_bad_source": [
        *((4, udp(source, FAR4, 80)) for source in ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "0.1.2.3")),
        *((6, udp(source, FAR6, 80)) for source in ("::", "::1", "ff02::1")),
    ],
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_a_malformed_packet_is_dropped_and_counted_under_its_reason(tunnelling: Bench, reason: str) -> None:
    for version, data in MALFORMED[reason]:
        assert tunnelling.run(frame(data, ETHERTYPE[version])) == SHOT, data.hex()
    count = len(MALFORMED[reason])
    assert tunnelling.counted() == {"drop": count, reason: count}


def test_every_drop_reason_about_packets_has_a_case(bench: Bench) -> None:
    not_here = {
        "drop_truncated",
        "drop_rule",
        "drop_gateway_dead",
        "drop_no_room",
        "drop_loop",
        "drop_uncarried",
        "drop_early",
    }
    reasons = {name for name in bench.classifier.counters() if name.startswith("drop_")}
    assert reasons - not_here == set(MALFORMED)


def test_no_cut_of_a_packet_confuses_the_parser(tunnelling: Bench) -> None:
    """Each is tunnelled or dropped for a reason. (Cut headers are in test_capture: this way of running takes none.)"""
    whole = extended((HOP_BY_HOP, b"\x01" + bytes(14)), (FRAGMENT, bytes(7)), (AUTHENTICATION, b"\x01" + bytes(10)))
    for data in (IPV4, whole):
        for end in range(20 if data is IPV4 else 40, len(data)):
            assert tunnelling.run(frame(data[:end], ETHERTYPE[data[0] >> 4])) == SHOT
        assert tunnelling.run(frame(data)) == REDIRECT
    counted = tunnelling.counted()
    assert counted["drop"] == sum(count for name, count in counted.items() if name.startswith("drop_"))


def test_octets_behind_the_packet_are_padding_and_not_counted(tunnelling: Bench) -> None:
    assert tunnelling.run(frame(IPV4 + bytes(30))) == REDIRECT
    assert tunnelling.classifier.counters()["tunnel"] == {"packets": 1, "bytes": len(IPV4)}


def test_what_is_not_ip_goes_on(tunnelling: Bench) -> None:
    for ethertype in (b"\x08\x06", b"\x88\xcc", b"\x81\x00"):  # ARP, LLDP, a VLAN tag inside another
        assert tunnelling.run(frame(IPV4, ethertype)) == GO_ON
    assert tunnelling.counted() == {"pass_other": 3}


@pytest.mark.parametrize("mac", ["ffffffffffff", "01005e000001", "333300000001", "02000000beef"])
def test_frames_to_others_or_to_many_go_on(tunnelling: Bench, mac: str) -> None:
    assert tunnelling.run(bytes.fromhex(mac) + frame(IPV4)[6:]) == GO_ON
    assert tunnelling.counted() == {"pass_other": 1}


def test_our_own_mark_goes_on_and_another_does_not(tunnelling: Bench) -> None:
    assert tunnelling.run(frame(IPV4), mark=MARK) == GO_ON
    assert tunnelling.run(frame(IPV4), mark=MARK + 1) == REDIRECT
    assert tunnelling.counted() == {"pass_other": 1, "tunnel": 1}


def test_link_local_stays_on_its_link(tunnelling: Bench) -> None:
    assert tunnelling.run(frame(udp("fe80::2", "fe80::1", 80))) == GO_ON
    assert tunnelling.run(frame(udp("fe80::2", "febf::1", 80))) == GO_ON
    assert tunnelling.run(frame(udp("fe80::2", "fec0::1", 80))) == REDIRECT


def test_an_interface_without_mac_header(tunnelling: Bench) -> None:
    # BPF_PROG_TEST_RUN gives each program of this type an Ethernet header; its length is the whole difference.
    padding = bytes(14)
    assert tunnelling.run(frame(IPV4 + padding), program="capture_l3") == REDIRECT


# Port 53.


@pytest.mark.parametrize(("client", "other", "own"), [(CLIENT4, FAR4, "10.9.0.1"), (CLIENT6, FAR6, "fd00:9::1")])
def test_port_53_is_hijacked_except_at_our_own_addresses(hijacking: Bench, client: str, other: str, own: str) -> None:
    for protocol in (UDP, TCP):
        to_53 = struct.pack("!HH16x", 5555, 53)
        assert hijacking.run(frame(packet(client, other, protocol, to_53))) == REDIRECT
        assert hijacking.run(frame(packet(client, own, protocol, to_53))) == GO_ON
        assert hijacking.run(frame(packet(client, other, protocol, struct.pack("!HH16x", 53, 5555)))) == GO_ON
    assert hijacking.run(frame(packet(client, other, ICMP, to_53))) == GO_ON
    counted = {rule: value["packets"] for rule, value in hijacking.classifier.rule_counters().items()}
    assert counted == {RULE_DEFAULT: 0, RULE_BUILTIN: 2, RULE_FAKE_IP: 0, RULE_DNS: 2, 0: 3}


def test_port_53_is_hijacked_ahead_of_learned_addresses_and_blocked_prefixes(hijacking: Bench) -> None:
    hijacking.classifier.replace_rules([prefix("203.0.113.0/24", Verdict.DROP, 0)])
    hijacking.classifier.learn(packed("203.0.113.9"), Verdict.DIRECT, 1)
    assert hijacking.run(frame(udp(CLIENT4, "203.0.113.5", 53))) == REDIRECT
    assert hijacking.run(frame(udp(CLIENT4, "203.0.113.9", 53))) == REDIRECT
    assert hijacking.run(frame(udp(CLIENT4, "203.0.113.5", 54))) == SHOT


def test_without_hijack_port_53_is_a_port_like_others(bench: Bench) -> None:
    bench.classifier.replace_rules([prefix("0.0.0.0/0", Verdict.DIRECT, 0)])
    assert bench.run(frame(udp(CLIENT4, FAR4, 53))) == GO_ON


def test_port_53_is_found_behind_extension_headers(hijacking: Bench) -> None:
    headers = [
        (HOP_BY_HOP, bytes(7)),
        (OPTIONS, b"\x01" + bytes(14)),
        (ROUTING, bytes(7)),
        (AUTHENTICATION, b"\x01" + bytes(10)),
    ]
    for count in range(1, len(headers) + 1):
        assert hijacking.run(frame(extended(*headers[:count]))) == REDIRECT
    assert hijacking.run(frame(extended(*[(OPTIONS, bytes(7))] * 8))) == REDIRECT


def test_all_fragments_of_a_datagram_go_one_way(hijacking: Bench) -> None:
    first, middle, last = 0x2000, 0x2000 | 185, 370
    for fragment in (first, middle, last):
        assert hijacking.run(frame(changed(udp(CLIENT4, FAR4, 53), 6, "!H", fragment))) == GO_ON
    for fragment in (0x0001, 185 << 3 | 1, 370 << 3):
        assert hijacking.run(frame(extended((FRAGMENT, struct.pack("!BHI", 0, fragment, 7))))) == GO_ON
    atomic = extended((FRAGMENT, struct.pack("!BHI", 0, 0, 7)))  # RFC 6946: whole, in spite of the header
    assert hijacking.run(frame(atomic)) == REDIRECT


def test_a_later_fragment_may_be_shorter_than_ports(hijacking: Bench) -> None:
    assert hijacking.run(frame(changed(packet(CLIENT4, FAR4, UDP, b"x"), 6, "!H", 370))) == GO_ON
    assert hijacking.run(frame(extended((FRAGMENT, struct.pack("!BHI", 0, 370 << 3, 7)), transport=b"x"))) == GO_ON


def test_own_addresses_can_change(hijacking: Bench) -> None:
    hijacking.classifier.replace_own_addresses([packed("10.9.0.77")])
    assert hijacking.run(frame(udp(CLIENT4, "10.9.0.1", 53))) == REDIRECT
    assert hijacking.run(frame(udp(CLIENT4, "10.9.0.77", 53))) == GO_ON
    own = next(one["entries"] for one in hijacking.classifier.snapshot()["maps"] if one["name"] == "own")
    assert own == [{"address": "10.9.0.77"}]


# The heartbeat.


def silence(bench: Bench) -> None:
    bench.classifier.heartbeat()
    bench.is_alive = False
    time.sleep(1.05)


DROPPING = [*EVERYTHING, prefix("198.51.100.0/24", Verdict.DROP, 1)]
BLOCKED = udp(CLIENT4, "198.51.100.1", 80)


def test_a_gateway_without_heartbeat_lets_everything_pass(bench: Bench) -> None:
    bench.classifier.replace_rules(DROPPING)
    silence(bench)
    assert [bench.run(frame(data)) for data in (IPV4, IPV6, BLOCKED, IPV4[:20])] == [GO_ON] * 4
    assert bench.counted() == {"pass_fail_open": 4}
    bench.is_alive = True
    assert [bench.run(frame(data)) for data in (IPV4, BLOCKED)] == [REDIRECT, SHOT]


def test_with_fail_closed_it_drops_what_it_would_have_tunnelled() -> None:
    bench = Bench(fail_closed=True)
    try:
        bench.classifier.replace_rules([*DROPPING, prefix("10.0.0.0/8", Verdict.DIRECT, 2)])
        silence(bench)
        assert [bench.run(frame(data)) for data in (IPV4, IPV6, BLOCKED)] == [SHOT] * 3
        assert bench.run(frame(udp(CLIENT4, "10.8.0.2", 80))) == GO_ON
        assert bench.counted() == {"drop": 3, "drop_gateway_dead": 2, "drop_rule": 1, "direct": 1}
    finally:
        bench.close()
