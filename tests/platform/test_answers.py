"""Connections that came from outside to a host of the LAN: what it answers is not captured."""

from __future__ import annotations

import socket
import struct

import pytest
from lan_world import CLIENT4, CLIENT6, EVERYTHING, FAR4, FAR6, GO_ON, REDIRECT, SHOT, Bench, frame, packet, prefix

from ztun.ports import Verdict

SYN, ACK, SYN_ACK, FIN_ACK = 0x02, 0x10, 0x12, 0x11
by_family = pytest.mark.parametrize(("client", "far"), [(CLIENT4, FAR4), (CLIENT6, FAR6)], ids=["v4", "v6"])


def segment(source: str, destination: str, flags: int, *, sport: int = 80, dport: int = 40_000) -> bytes:
    header = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 65535, 0, 0)
    return frame(packet(source, destination, socket.IPPROTO_TCP, header))


@by_family
def test_who_answers_a_syn_is_left_alone_in_that_connection(bench: Bench, client: str, far: str) -> None:
    bench.classifier.replace_rules(EVERYTHING)
    assert bench.run(segment(client, far, ACK)) == REDIRECT  # nobody answered anything so far
    assert bench.run(segment(client, far, SYN_ACK)) == GO_ON
    assert bench.run(segment(client, far, ACK)) == GO_ON
    assert bench.run(segment(client, far, FIN_ACK)) == GO_ON
    assert bench.counted()["pass_answers"] == 3
    [entry] = next(one["entries"] for one in bench.classifier.snapshot()["maps"] if one["name"] == "answered")
    assert entry == {"local": client, "local_port": 80, "remote": far, "remote_port": 40_000}


@by_family
def test_its_other_connections_are_captured_as_ever(bench: Bench, client: str, far: str) -> None:
    bench.classifier.replace_rules(EVERYTHING)
    assert bench.run(segment(client, far, SYN_ACK)) == GO_ON
    assert bench.run(segment(client, far, SYN, sport=81)) == REDIRECT
    assert bench.run(segment(client, far, ACK, sport=81)) == REDIRECT
    assert bench.run(segment(client, far, ACK, dport=40_001)) == REDIRECT


def test_what_it_opens_itself_is_captured_even_by_the_same_ports(bench: Bench) -> None:
    bench.classifier.replace_rules(EVERYTHING)
    assert bench.run(segment(CLIENT4, FAR4, SYN_ACK)) == GO_ON
    assert bench.run(segment(CLIENT4, FAR4, SYN)) == REDIRECT


def test_what_is_blocked_stays_blocked(bench: Bench) -> None:
    bench.classifier.replace_rules([*EVERYTHING, prefix(f"{FAR4}/32", Verdict.DROP, 0)])
    assert bench.run(segment(CLIENT4, FAR4, SYN_ACK)) == SHOT
    assert bench.run(segment(CLIENT4, FAR4, ACK)) == SHOT


def test_a_header_that_is_cut_short_opens_nothing(bench: Bench) -> None:
    bench.classifier.replace_rules(EVERYTHING)
    cut = frame(packet(CLIENT4, FAR4, socket.IPPROTO_TCP, struct.pack("!HHII", 80, 40_000, 1, 1)))
    assert bench.run(cut) == REDIRECT
