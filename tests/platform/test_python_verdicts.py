"""The classifier in Python (macOS's) and the one in BPF, side by side on the same packets: one verdict, one count."""

from __future__ import annotations

import random
import struct

import pytest
from lan_world import GO_ON, REDIRECT, SHOT, Bench, frame, packed, packet, udp
from test_verdicts import CLIENT, random_address, random_prefixes, show

from ztun.platform.darwin.classifier import COUNTERS, Decider
from ztun.platform.linux import layout
from ztun.ports import Prefix, Verdict

RETURNS = {Verdict.DIRECT: GO_ON, Verdict.TUNNEL: REDIRECT, Verdict.DROP: SHOT}
OWN = ["10.9.0.1", "fd00:9::1"]


class Both:
    """The two classifiers on the same tables."""

    def __init__(self, prefixes: list[Prefix]) -> None:
        self.bpf = Bench(hijack_dns=True, own=OWN)
        self.python = Decider(hijack_dns=True)
        self.python.own = frozenset(packed(address) for address in OWN)
        self.bpf.classifier.replace_rules(prefixes)
        for size, table in self.python.tables.items():
            table.replace(one for one in prefixes if len(one.network) == size)

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        self.bpf.classifier.learn(address, verdict, rule)
        self.python.learn(address, verdict, rule)

    def agree(self, data: bytes) -> Verdict:
        """Their verdict about a packet, which has to be one."""
        verdict = self.python.classify(memoryview(data))
        assert self.bpf.run(frame(data)) == RETURNS[verdict], data.hex()
        return verdict

    def agree_on_counts(self) -> None:
        counted = {name: tuple(values) for name, values in self.python.counted.items() if values[0]}
        in_bpf = self.bpf.classifier.counters()
        assert counted == {name: (one["packets"], one["bytes"]) for name, one in in_bpf.items() if one["packets"]}
        rules = {rule: tuple(values) for rule, values in self.python.rules.items() if values[0]}
        in_bpf_rules = self.bpf.classifier.rule_counters()
        assert rules == {rule: (one["packets"], one["bytes"]) for rule, one in in_bpf_rules.items() if one["packets"]}


def _hits(table: list[dict[str, object]]) -> dict[object, object]:
    return {entry["prefix"]: entry["hits"] for entry in table}


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_verdict_on_every_random_address(size: int, seed: int) -> None:
    random_ = random.Random(seed)
    prefixes = random_prefixes(random_, size, 200)
    both = Both(prefixes)
    try:
        for _ in range(10):
            both.learn(random_address(random_, size), random_.choice(list(Verdict)), random_.choice(prefixes).rule)
        seen = {
            both.agree(udp(CLIENT[size], show(random_address(random_, size)), random_.choice([9, 53])))
            for _ in range(700)
        }
        assert seen == set(Verdict)
        both.agree_on_counts()
        table = both.python.tables[size]
        maps = {one["name"]: one["entries"] for one in both.bpf.classifier.snapshot()["maps"]}
        assert _hits(maps["prefixes4" if size == 4 else "prefixes6"]) == {
            f"{show(network)}/{length}": entry.hits for (network, length), entry in table.entries.items()
        }
    finally:
        both.bpf.close()


@pytest.mark.parametrize("address", OWN)
def test_own_addresses_are_direct_on_every_port(address: str) -> None:
    everything = [Prefix(bytes(4), 0, Verdict.TUNNEL, 1), Prefix(bytes(16), 0, Verdict.TUNNEL, 1)]
    both = Both(everything)
    try:
        for port in (53, 80):
            assert both.agree(udp(CLIENT[len(packed(address))], address, port)) is Verdict.DIRECT
        assert both.agree(udp(CLIENT[16], "fe80::1", 53)) is Verdict.DIRECT
        both.agree_on_counts()
    finally:
        both.bpf.close()


@pytest.mark.parametrize("seed", range(4))
def test_the_same_opinion_of_broken_packets(seed: int) -> None:
    """Headers cut off, lengths that lie, extension headers without end, fragments, sources that nobody has."""
    random_ = random.Random(seed)
    both = Both([*random_prefixes(random_, 4, 40), *random_prefixes(random_, 16, 40)])
    try:
        for _ in range(1500):
            data = _broken(random_)
            if data and data[0] >> 4 in (4, 6):
                both.agree(data)
        both.agree_on_counts()
        reasons = {name for name, values in both.python.counted.items() if values[0]}
        assert {"drop_bad_header", "drop_bad_length", "drop_bad_extension"} <= reasons
        assert {"drop_short_transport", "drop_bad_source", "drop_rule"} <= reasons
    finally:
        both.bpf.close()


def _broken(random_: random.Random) -> bytes:
    size = random_.choice([4, 16])
    nobody = ["127.0.0.1", "224.0.0.1"] if size == 4 else ["::1", "ff02::1"]
    source = random_.choice([CLIENT[size], *nobody])
    destination = show(random_address(random_, size))
    protocol = random_.choice([6, 17, 1, 58, 132])
    # No flags of TCP: what BPF passes as an answer to somebody outside never comes by a route into the utun.
    payload = random_.randbytes(random_.choice([0, 2, 8, 12 if protocol == 6 else 30]))
    if size == 16:
        for _ in range(random_.choice([0, 0, 1, 2, 9]) if protocol != 6 else 0):
            kind = random_.choice([0, 43, 44, 51, 60, 135])
            extra = random_.choice([0, 0, 1, 3, 200])
            body = struct.pack("!BBH", protocol, extra, random_.choice([0, 1, 8, 0xFFF8, 0x100]))
            payload = body + random_.randbytes(4 + 8 * min(extra, 3)) + payload
            protocol = kind
    data = bytearray(packet(source, destination, protocol, payload))
    for _ in range(random_.choice([0, 0, 1, 2])):
        data[random_.randrange(1, min(len(data), 48))] = random_.choice([0, 1, 4, 5, 0x20, 0x3F, 0xFF])
    if random_.random() < 0.1:
        data[0] = data[0] & 0xF0 | random_.choice([0, 4, 6, 15])
    # BPF_PROG_TEST_RUN takes nothing shorter than the fixed header.
    least = 20 if size == 4 else 40
    return bytes(data[: max(least, random_.choice([len(data), len(data), len(data) - 5, least]))])


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_a_packet_without_its_fixed_header_is_truncated(address: str) -> None:
    data = udp(CLIENT[len(packed(address))], address, 9)
    python = Decider(hijack_dns=True)
    for length in (0, 1, 19, 19 if len(packed(address)) == 4 else 39):
        assert python.classify(memoryview(data[:length])) is Verdict.DROP
    assert python.counted["drop_truncated"][0] == 4


def test_the_counters_have_the_same_names() -> None:
    """A reason that BPF gets needs a place in ztun/platform/darwin/classifier.py, too, even if it is never counted."""
    assert list(COUNTERS) == list(layout.read_shared(layout.find_sources()).counter_names().values())
