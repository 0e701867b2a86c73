"""What `leave`, `arrive` and `guard` make of packets of this host, without any traffic."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lan_world import EVERYTHING, FAR4, FAR6, GO_ON, MARK, REDIRECT, SHOT, Bench, frame, packed, packet, prefix

from ztun.platform.linux.layout import U32
from ztun.platform.linux.maps import Map
from ztun.ports import Verdict

OWN4, OWN6 = "192.0.2.1", "2001:db8:2::1"
OTHER4, OTHER6 = "203.0.113.77", "2001:db8::77"
LOOPBACK = 1  # the index of the interface that BPF_PROG_TEST_RUN takes
IPV4, IPV6 = 1, 2
FIN, SYN, RST, ACK = 0x01, 0x02, 0x04, 0x10
by_family = pytest.mark.parametrize(("own", "far", "other"), [(OWN4, FAR4, OTHER4), (OWN6, FAR6, OTHER6)])


def make(**options: bool) -> Bench:
    made = Bench(own=[OWN4, OWN6], host=True, **options)
    made.classifier.replace_rules(EVERYTHING)
    be_exit(made, IPV4 | IPV6)
    return made


def be_exit(bench: Bench, versions: int) -> None:
    Map(bench.objects.maps["exits"], 4, 4).update(U32.pack(LOOPBACK), U32.pack(versions))


@pytest.fixture
def host() -> Iterator[Bench]:
    made = make()
    yield made
    made.close()


def tcp(source: str, destination: str, flags: int, *, sport: int = 40000, dport: int = 80) -> bytes:
    return packet(source, destination, socket.IPPROTO_TCP, tcp_header(sport, dport, flags))


def tcp_header(sport: int, dport: int, flags: int) -> bytes:
    return struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 5 << 4, flags, 65535, 0, 0)


def udp(source: str, destination: str, *, sport: int = 40000, dport: int = 443) -> bytes:
    return packet(source, destination, socket.IPPROTO_UDP, struct.pack("!HHHH", sport, dport, 12, 0) + b"data")


def icmp(source: str, destination: str, type4: int, type6: int, quoted: bytes = b"") -> bytes:
    is_ipv6 = ":" in source
    protocol = socket.IPPROTO_ICMPV6 if is_ipv6 else socket.IPPROTO_ICMP
    return packet(source, destination, protocol, bytes([type6 if is_ipv6 else type4, 0]) + bytes(6) + quoted)


def leave(bench: Bench, data: bytes, *, mark: int = 0) -> int:
    return bench.run(frame(data), program="leave", mark=mark)


def arrive(bench: Bench, data: bytes) -> None:
    assert bench.run(frame(data), program="arrive") == GO_ON


@by_family
def test_a_connection_is_captured_from_its_syn_on(host: Bench, own: str, far: str, other: str) -> None:
    assert leave(host, tcp(own, far, ACK)) == GO_ON  # one that was there before
    assert leave(host, tcp(own, far, SYN)) == REDIRECT
    for flags in (ACK, ACK | FIN, RST, SYN):
        assert leave(host, tcp(own, far, flags)) == REDIRECT
    for stranger in (tcp(own, far, ACK, sport=40001), tcp(own, far, ACK, dport=81), tcp(own, other, ACK)):
        assert leave(host, stranger) == GO_ON
    assert host.counted() == {"tunnel": 5, "host_tunnel": 5, "pass_uncaptured": 4}


@by_family
def test_what_answers_a_connection_passes(host: Bench, own: str, far: str, other: str) -> None:
    for flags in (SYN | ACK, ACK, ACK | FIN, RST, RST | ACK):
        assert leave(host, tcp(own, far, flags, sport=22, dport=50000)) == GO_ON
    assert host.counted() == {"pass_uncaptured": 5}


@by_family
def test_a_connection_stays_where_it_is_when_the_rules_change(host: Bench, own: str, far: str, other: str) -> None:
    assert leave(host, tcp(own, far, SYN)) == REDIRECT
    host.classifier.replace_rules([prefix("0.0.0.0/0", Verdict.DIRECT, 0), prefix("::/0", Verdict.DIRECT, 0)])
    assert leave(host, tcp(own, far, ACK)) == REDIRECT
    assert leave(host, tcp(own, far, SYN)) == GO_ON  # the next one from that port
    assert leave(host, tcp(own, far, ACK)) == GO_ON


@by_family
def test_datagrams_to_who_sent_one_first_pass(host: Bench, own: str, far: str, other: str) -> None:
    assert leave(host, udp(own, far)) == REDIRECT
    arrive(host, udp(far, own, sport=443, dport=40000))
    assert leave(host, udp(own, far)) == GO_ON
    for stranger in (udp(own, far, sport=40001), udp(own, far, dport=444), udp(own, other)):
        assert leave(host, stranger) == REDIRECT
    arrive(host, udp(far, other, sport=443, dport=40001))  # to somebody else
    assert leave(host, udp(own, far, sport=40001)) == REDIRECT


@by_family
def test_answers_of_name_servers_are_no_knocking(own: str, far: str, other: str) -> None:
    host = make(hijack_dns=True)
    arrive(host, udp(far, own, sport=53, dport=40000))
    assert leave(host, udp(own, far, dport=53)) == REDIRECT
    host.close()


@by_family
def test_pings_are_captured_and_their_answers_pass(host: Bench, own: str, far: str, other: str) -> None:
    assert leave(host, icmp(own, far, 8, 128)) == REDIRECT
    for type4, type6 in ((0, 129), (13, 133), (5, 135), (10, 136), (9, 143)):
        assert leave(host, icmp(own, far, type4, type6)) == GO_ON


@by_family
def test_an_error_goes_the_way_of_what_it_is_about(host: Bench, own: str, far: str, other: str) -> None:
    captured, strange = tcp(far, own, ACK, sport=80, dport=40000), tcp(far, own, ACK, sport=80, dport=22)
    assert leave(host, tcp(own, far, SYN)) == REDIRECT
    for type4, type6 in ((3, 1), (11, 3), (12, 4)):
        assert leave(host, icmp(own, far, type4, type6, captured)) == REDIRECT
        assert leave(host, icmp(own, far, type4, type6, strange)) == GO_ON
    datagram = udp(far, own, sport=443, dport=40000)
    assert leave(host, icmp(own, far, 3, 1, datagram)) == REDIRECT
    arrive(host, datagram)
    assert leave(host, icmp(own, far, 3, 1, datagram)) == GO_ON
    for cut in range(len(datagram)):
        assert leave(host, icmp(own, far, 3, 1, datagram[:cut])) in (GO_ON, REDIRECT)


def fragment(data: bytes, number: int, *, first: bool) -> bytes:
    """A packet as the first or second fragment of a datagram of that identification."""
    if data[0] >> 4 == 4:
        return data[:4] + struct.pack("!HH", number, 0x2000 if first else 0x0080) + data[8:]
    header = struct.pack("!BBHI", data[6], 0, 0x0001 if first else 0x0400, number)
    length = struct.pack("!H", len(data) - 40 + len(header))
    return data[:4] + length + bytes([44]) + data[7:40] + header + data[40:]


@by_family
def test_fragments_stay_together(host: Bench, own: str, far: str, other: str) -> None:
    whole = udp(own, far)
    assert leave(host, fragment(whole, 7, first=False)) == GO_ON
    assert leave(host, fragment(whole, 7, first=True)) == REDIRECT
    assert leave(host, fragment(whole, 7, first=False)) == REDIRECT
    assert leave(host, fragment(whole, 8, first=False)) == GO_ON
    arrive(host, udp(far, own, sport=443, dport=40000))
    assert leave(host, fragment(whole, 9, first=True)) == GO_ON
    assert leave(host, fragment(whole, 9, first=False)) == GO_ON


@by_family
@pytest.mark.parametrize("mark", [MARK, 1, 0xCA6C], ids=["ours", "another", "wireguard"])
def test_what_is_marked_passes(host: Bench, own: str, far: str, other: str, mark: int) -> None:
    assert leave(host, tcp(own, far, SYN), mark=mark) == GO_ON
    assert host.counted() == {"pass_marked": 1}


@by_family
def test_a_source_that_is_not_ours_passes(host: Bench, own: str, far: str, other: str) -> None:
    assert leave(host, tcp(other, far, SYN)) == GO_ON
    assert host.counted() == {}


@by_family
def test_what_could_not_be_carried_passes(host: Bench, own: str, far: str, other: str) -> None:
    for protocol in (47, 50, 132):  # GRE, ESP, SCTP
        assert leave(host, packet(own, far, protocol, bytes(20))) == GO_ON
    assert host.counted() == {"pass_uncarried": 3}


def test_only_the_versions_that_leave_there_count() -> None:
    host = make(hijack_dns=True)
    be_exit(host, IPV6)
    assert leave(host, tcp(OWN4, FAR4, SYN)) == GO_ON
    assert leave(host, tcp(OWN6, FAR6, SYN)) == REDIRECT
    assert leave(host, udp(OWN4, FAR4, dport=53)) == REDIRECT
    be_exit(host, 0)  # an interface of the LAN
    assert leave(host, tcp(OWN6, FAR6, SYN)) == GO_ON
    for query in (udp(OWN4, FAR4, dport=53), udp(OWN6, FAR6, dport=53), tcp(OWN4, FAR4, SYN, dport=53)):
        assert leave(host, query) == REDIRECT
    host.close()


@by_family
def test_what_is_blocked_ends_here_if_we_began_it(host: Bench, own: str, far: str, other: str) -> None:
    host.classifier.replace_rules([*EVERYTHING, prefix(f"{far}/{len(packed(far)) * 8}", Verdict.DROP, 3)])
    assert leave(host, tcp(own, far, SYN)) == SHOT
    assert leave(host, udp(own, far)) == SHOT
    assert leave(host, tcp(own, far, SYN | ACK)) == GO_ON
    assert host.counted() == {"drop": 2, "drop_rule": 2, "host_drop": 2, "pass_uncaptured": 1}
    assert host.classifier.rule_counters()[3]["packets"] == 2


@pytest.mark.parametrize("fail_closed", [False, True], ids=["open", "closed"])
def test_when_the_gateway_is_dead(fail_closed: bool) -> None:
    host = make(fail_closed=fail_closed)
    host.classifier.replace_rules([*EVERYTHING, prefix(f"{OTHER4}/32", Verdict.DIRECT, 0)])
    assert leave(host, tcp(OWN4, FAR4, SYN)) == REDIRECT
    host.is_alive = False
    host.classifier._maps["heartbeat"].update(U32.pack(0), struct.pack("=Q", 1))
    for flags in (SYN, ACK):
        assert leave(host, tcp(OWN4, FAR4, flags)) == (SHOT if fail_closed else GO_ON)
    assert leave(host, tcp(OWN4, OTHER4, SYN)) == GO_ON
    assert leave(host, tcp(OWN4, OTHER4, SYN | ACK)) == GO_ON
    assert host.counted()["drop_gateway_dead" if fail_closed else "pass_fail_open"] == 2
    host.close()


@by_family
def test_what_is_broken_is_not_ours_to_drop(host: Bench, own: str, far: str, other: str) -> None:
    whole = tcp(own, far, SYN)
    size = 20 if ":" not in own else 40
    for length in range(size, len(whole)):
        assert leave(host, whole[:length]) == GO_ON


def test_our_own_packets_do_not_come_back(host: Bench) -> None:
    data = frame(tcp(OWN4, FAR4, SYN))
    assert host.run(data, program="guard", mark=MARK) == SHOT
    assert host.run(data, program="guard") == GO_ON
    assert host.run(data, program="guard", mark=1) == GO_ON
    assert host.counted() == {"drop": 1, "drop_loop": 1}


@by_family
def test_nobody_becomes_a_client_with_an_address_of_ours(host: Bench, own: str, far: str, other: str) -> None:
    assert host.run(frame(udp(own, far))) == SHOT
    assert host.counted() == {"drop": 1, "drop_bad_source": 1}
    assert host.classifier.origin(packed(own)) is None


class Model:
    """What should happen, in the fewest words: sets of what was captured and of who knocked."""

    def __init__(self, tunnelled: set[str]) -> None:
        self.tunnelled = tunnelled
        self.captured: set[tuple[str, int, int]] = set()
        self.knocked: set[tuple[str, int, int]] = set()

    def leave(self, kind: str, peer: str, local: int, remote: int) -> int:
        flow = (peer, local, remote)
        if kind == "syn":
            (self.captured.add if peer in self.tunnelled else self.captured.discard)(flow)
        if kind in ("syn", "ack"):
            return REDIRECT if flow in self.captured else GO_ON
        if kind == "udp":
            return REDIRECT if peer in self.tunnelled and flow not in self.knocked else GO_ON
        return REDIRECT if kind == "echo" and peer in self.tunnelled else GO_ON


PEERS4, PEERS6 = [f"203.0.113.{n}" for n in (1, 2, 3)], [f"2001:db8::{n}" for n in (1, 2, 3)]
steps = st.lists(
    st.tuples(
        st.sampled_from(["syn", "ack", "udp", "echo", "answer", "knock", "rules"]),
        st.sampled_from([*PEERS4, *PEERS6]),
        st.sampled_from([40000, 40001]),
        st.sampled_from([80, 443]),
    ),
    max_size=40,
)


def outgoing(kind: str, peer: str, local: int, remote: int) -> bytes:
    own = OWN6 if ":" in peer else OWN4
    if kind in ("syn", "ack"):
        return tcp(own, peer, SYN if kind == "syn" else ACK, sport=local, dport=remote)
    if kind == "udp":
        return udp(own, peer, sport=local, dport=remote)
    return icmp(own, peer, *((8, 128) if kind == "echo" else (0, 129)))


@settings(max_examples=60, deadline=None)
@given(steps, st.sets(st.sampled_from([*PEERS4, *PEERS6])))
def test_any_conversation_goes_as_the_model_says(said: list[tuple[str, str, int, int]], tunnelled: set[str]) -> None:
    host = make()
    try:
        model = Model(tunnelled)
        write_rules(host, tunnelled)
        for kind, peer, local, remote in said:
            if kind == "rules":  # the other way round for this peer
                model.tunnelled = model.tunnelled ^ {peer}
                write_rules(host, model.tunnelled)
            elif kind == "knock":
                model.knocked.add((peer, local, remote))
                arrive(host, udp(peer, OWN6 if ":" in peer else OWN4, sport=remote, dport=local))
            else:
                found = leave(host, outgoing(kind, peer, local, remote))
                assert found == model.leave(kind, peer, local, remote)
    finally:
        host.close()


def write_rules(host: Bench, tunnelled: set[str]) -> None:
    host.classifier.replace_rules(
        [
            prefix("0.0.0.0/0", Verdict.DIRECT, 0),
            prefix("::/0", Verdict.DIRECT, 0),
            *(prefix(f"{one}/{len(packed(one)) * 8}", Verdict.TUNNEL, 1) for one in tunnelled),
        ]
    )
