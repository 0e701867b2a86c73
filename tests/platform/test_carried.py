"""What the kernel makes of the segments of connections that it carries, against what they should become, made anew.

The programs run by BPF_PROG_TEST_RUN (bpf(2)), so a segment comes back instead of going on.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lan_world import EVERYTHING, GO_ON, REDIRECT, SHOT, Bench, frame, packed
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from ztun.platform.linux import offload, tables
from ztun.platform.linux.layout import FLOW, U32, U64, find_sources, read_shared
from ztun.platform.linux.mapped import Carried, News, flow_hash
from ztun.platform.linux.maps import Map

CLIENT = {4: "10.9.0.2", 6: "fd00:9::2"}
FAR = {4: "203.0.113.5", 6: "2001:db8::5"}
LOCAL = {4: "10.8.0.1", 6: "fd00:8::1"}
PROXY = {4: "10.8.0.2", 6: "fd00:8::2"}
CLIENT_PORT, FAR_PORT, LOCAL_PORT, PROXY_PORT = 40000, 443, 50000, 1080
PLACE, MASK = 5, 0xFFFFFFFF
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
WAYS = ("up", "down")


@dataclass(frozen=True)
class Spliced:
    """A connection as Python enters it. shifts: of the client, what the proxy was told; of the proxy, what the client
    was told."""

    version: int = 4
    offset: int = 1_000_000
    stamps: int = 7_000
    base: int = 500
    uplink: int = 1
    shifts: tuple[int, int, int, int] = (7, 7, 7, 7)
    heard: int = 1  # packets of the client so far

    @property
    def record(self) -> bytes:
        addresses = [wide(one[self.version]) for one in (CLIENT, FAR, LOCAL, PROXY)]
        ports = struct.pack("!HHHH", CLIENT_PORT, FAR_PORT, LOCAL_PORT, PROXY_PORT)
        numbers = struct.pack("=IIII4B", self.offset, self.stamps, self.base, self.uplink, *self.shifts)
        fixed = b"".join(addresses) + ports + numbers
        growing = bytes(20) + struct.pack("=Q", self.heard)
        return (fixed + growing).ljust(offload.SPLICE_SIZE, b"\0")


def wide(address: str) -> bytes:
    return tables.widen(packed(address))


class Carrying:
    """A bench with one connection. `back` is what was added to the proxy's first timestamp, as the client sees it."""

    def __init__(self, bench: Bench, spliced: Spliced, crowd: Sequence[tuple[bytes, bool]] = ()) -> None:
        """crowd: other flows that are carried, before this one: key, and whether it is about `down`."""
        self.bench = bench
        self.spliced = spliced
        self.back: int | None = None
        maps = bench.objects.maps
        self._splices = Map(maps["splices"], U32.size, offload.SPLICE_SIZE)
        self._splices.update(U32.pack(PLACE), spliced.record)
        version, constants = spliced.version, read_shared(find_sources()).constants
        carried = Carried(maps["carried"], constants["CARRIED_BUCKETS"], constants["CARRIED_SLOTS"])
        carried.forget_all()
        up = FLOW.pack(wide(CLIENT[version]), wide(FAR[version]), CLIENT_PORT, FAR_PORT)
        down = FLOW.pack(wide(PROXY[version]), wide(LOCAL[version]), PROXY_PORT, LOCAL_PORT)
        for place, (key, is_down) in enumerate(crowd, PLACE + 1):
            assert carried.enter(key, place, down=is_down) >= 0
        assert carried.enter(up, PLACE, down=False) >= 0
        assert carried.enter(down, PLACE, down=True) >= 0
        carried.close()
        self._news = News(maps["ended"], constants["MAX_SPLICES"])
        self._news.take()

    def send(self, way: str, segment: dict[str, Any], payload: bytes = b"") -> tuple[int, Any]:
        """(what the program returned, the packet it left), the latter without its Ethernet header."""
        result, data = self.bench.transform(frame(bytes(self.packet(way, segment, payload))), program=f"carry_{way}")
        return result, (IP if self.spliced.version == 4 else IPv6)(data[14:])

    def packet(self, way: str, segment: dict[str, Any], payload: bytes) -> Any:
        version = self.spliced.version
        ends = (CLIENT, FAR, CLIENT_PORT, FAR_PORT) if way == "up" else (PROXY, LOCAL, PROXY_PORT, LOCAL_PORT)
        return made(version, ends[0], ends[1], {"sport": ends[2], "dport": ends[3], **segment}, payload, 64)

    def expected(self, way: str, segment: dict[str, Any], payload: bytes) -> Any:
        """The naive way: every field by itself, and all checksums from nothing."""
        spliced, new = self.spliced, dict(segment)
        client, local, proxy, told = spliced.shifts
        if way == "up":
            ends = (LOCAL, PROXY, LOCAL_PORT, PROXY_PORT)
            new["seq"] = segment["seq"] + spliced.offset & MASK
            new["window"] = min((segment["window"] << client) >> local, 0xFFFF)
        else:
            ends = (FAR, CLIENT, FAR_PORT, CLIENT_PORT)
            new["ack"] = segment["ack"] - spliced.offset & MASK
            new["window"] = min((segment["window"] << proxy) >> told, 0xFFFF)
        new["options"] = [self._option(way, name, value) for name, value in segment["options"]]
        return made(spliced.version, ends[0], ends[1], {**new, "sport": ends[2], "dport": ends[3]}, payload, 63)

    def _option(self, way: str, name: str, value: Any) -> tuple[str, Any]:
        if name == "Timestamp" and way == "up":
            echo = value[1] - self.back & MASK if self.back is not None else 0
            return name, (value[0] + self.spliced.stamps & MASK, echo)
        if name == "Timestamp":
            if self.back is None:
                self.back = self.spliced.base - value[0] & MASK
            return name, (value[0] + self.back & MASK, value[1] - self.spliced.stamps & MASK)
        if name == "SAck" and way == "down":
            return name, tuple(edge - self.spliced.offset & MASK for edge in value)
        return name, value

    def ended(self) -> list[int]:
        return self._news.take()


def like(key: bytes, number: int, *, tag: bool) -> bytes:
    """Another key of the same bucket, and of the same tag if asked for."""
    words = list(struct.unpack("=9I", key))
    if tag:  # the last word weighs 256 times as much as the first: the sum stays
        words[0], words[8] = words[0] + 256 * number, words[8] - number
        found = struct.pack("=9I", *words)
        assert flow_hash(found) == flow_hash(key)
        return found
    others = (struct.pack("=9I", number << 24 | one, *words[1:]) for one in range(1 << 24))
    return next(other for other in others if (flow_hash(other) ^ flow_hash(key)) % 32768 == 0)


def made(
    version: int, source: dict[int, str], to: dict[int, str], fields: dict[str, Any], payload: bytes, hops: int
) -> Any:
    if version == 4:
        head: Any = IP(src=source[4], dst=to[4], ttl=hops, id=7, flags="DF", tos=0x28)
    else:
        head = IPv6(src=source[6], dst=to[6], hlim=hops, tc=0x28, fl=99)
    return head / TCP(**fields) / payload


@pytest.fixture
def bench() -> Iterator[Bench]:
    made_bench = Bench()
    made_bench.classifier.replace_rules(EVERYTHING)
    yield made_bench
    made_bench.close()


WORDS = st.integers(0, MASK)
NOPS = [("NOP", None), ("NOP", None)]
STAMPS = st.tuples(WORDS, WORDS).map(lambda pair: [*NOPS, ("Timestamp", pair)])
SACKS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3).map(
    lambda blocks: [*NOPS, ("SAck", tuple(edge for block in blocks for edge in block))]
)
OPTIONS = st.one_of(
    st.just([]), STAMPS, SACKS, st.tuples(STAMPS, SACKS).map(lambda both: [*both[0], *both[1]]),
    st.tuples(SACKS, STAMPS).map(lambda both: [*both[0], *both[1]]),
)  # fmt: skip
SEGMENTS = st.fixed_dictionaries(
    {
        "seq": WORDS,
        "ack": WORDS,
        "flags": st.sampled_from([ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, ACK | 0x20, ACK | 0x40, ACK | 0x80]),
        "window": st.integers(0, 0xFFFF),
        "urgptr": st.integers(0, 0xFFFF),
        "options": OPTIONS,
    }
)
SPLICED = st.builds(
    Spliced,
    version=st.sampled_from([4, 6]),
    offset=WORDS,
    stamps=WORDS,
    base=WORDS,
    shifts=st.tuples(*[st.integers(0, 14)] * 4),
)
TALK = st.lists(st.tuples(st.sampled_from(WAYS), SEGMENTS, st.binary(max_size=64)), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spliced=SPLICED, talk=TALK)
def test_each_segment_becomes_what_it_should(
    bench: Bench, spliced: Spliced, talk: list[tuple[str, Any, bytes]]
) -> None:
    carrying = Carrying(bench, spliced)
    for way, segment, payload in talk:
        result, found = carrying.send(way, segment, payload)
        assert result == REDIRECT
        assert bytes(found) == bytes(carrying.expected(way, segment, payload)), found.show(dump=True)
    carrying.ended()


PLAIN = {"seq": 100, "ack": 200, "flags": ACK, "window": 500, "options": []}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("version", [4, 6])
def test_a_syn_is_never_carried(bench: Bench, way: str, version: int) -> None:
    """Whoever has the numbers anew is another connection."""
    carrying = Carrying(bench, Spliced(version))
    sent = {**PLAIN, "flags": SYN}
    result, found = carrying.send(way, sent)
    assert bytes(found) == bytes(carrying.packet(way, sent, b""))
    assert result == (REDIRECT if way == "up" else GO_ON)  # to the TUN, that is, or to the kernel
    assert "pass_up" not in bench.counted()
    assert "pass_down" not in bench.counted()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        [("Mood", 1)],
        [("NOP", None), ("Timestamp", (1, 2)), ("NOP", None)],
        [("EOL", None)],
    ],
    ids=["unknown", "askew", "none but the end"],
)
def test_options_that_cannot_be_read_cost_the_segment(bench: Bench, way: str, options: list[Any]) -> None:
    """It would be a wrong one on the other side."""
    if options[0][0] == "Mood":
        options = [(253, b"\x01\x02")]
    carrying = Carrying(bench, Spliced())
    assert carrying.send(way, {**PLAIN, "options": options})[0] == SHOT
    assert bench.counted()["drop_uncarried"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_segment_without_hops_left_goes_no_further(bench: Bench, way: str) -> None:
    carrying = Carrying(bench, Spliced())
    packet = carrying.packet(way, PLAIN, b"")
    packet.ttl = 1
    assert bench.run(frame(bytes(packet)), program=f"carry_{way}") == SHOT
    assert bench.counted()["drop_uncarried"] == 1


def test_others_are_left_alone(bench: Bench) -> None:
    carrying = Carrying(bench, Spliced())
    other = carrying.packet("down", {**PLAIN, "dport": LOCAL_PORT + 1}, b"")
    result, data = bench.transform(frame(bytes(other)), program="carry_down")
    assert (result, data[14:]) == (GO_ON, bytes(other))


def test_each_direction_is_for_one_program(bench: Bench) -> None:
    """What a client sends in the name of a proxy is no proxy's, and the other way round."""
    carrying = Carrying(bench, Spliced())
    assert bench.run(frame(bytes(carrying.packet("up", PLAIN, b""))), program="carry_down") == GO_ON
    bench.run(frame(bytes(carrying.packet("down", PLAIN, b""))), program="carry_up")
    assert "pass_down" not in bench.counted()


def test_both_ends_have_closed_when_each_knows_it_of_the_other(bench: Bench) -> None:
    offset = 1_000_000
    carrying = Carrying(bench, Spliced(offset=offset))
    carrying.send("up", {**PLAIN, "seq": 100, "ack": 200}, b"hello")
    carrying.send("up", {**PLAIN, "flags": ACK | FIN, "seq": 105, "ack": 200})
    carrying.send("down", {**PLAIN, "flags": ACK | FIN, "seq": 200, "ack": 106 + offset}, b"bye")
    assert carrying.ended() == []
    carrying.send("up", {**PLAIN, "seq": 106, "ack": 203})  # all but the FIN
    assert carrying.ended() == []
    carrying.send("up", {**PLAIN, "seq": 106, "ack": 204})
    assert carrying.ended() == [PLACE]
    carrying.send("up", {**PLAIN, "seq": 106, "ack": 204})
    assert carrying.ended() == []  # told once


def test_before_the_client_has_answered_its_proxy_is_not_heard(bench: Bench) -> None:
    """A client that knows of no connection would reset it. A reset is no news for it, but an answer."""
    carrying = Carrying(bench, Spliced(heard=0))
    assert carrying.send("down", PLAIN, b"220 ready")[0] == SHOT
    assert bench.counted()["drop_early"] == 1
    assert carrying.send("down", {**PLAIN, "flags": RST})[0] == REDIRECT
    assert carrying.send("up", PLAIN)[0] == REDIRECT
    assert carrying.send("down", PLAIN, b"220 ready")[0] == REDIRECT


def test_what_is_just_being_taken_goes_nowhere(bench: Bench) -> None:
    """The kernel's TCP hears nothing more of it, and what the client sends is for ztun, which has not answered it."""
    carrying = Carrying(bench, Spliced(uplink=0))
    for flags in (ACK, RST, ACK | FIN):
        assert carrying.send("down", {**PLAIN, "flags": flags}, b"220 ready")[0] == SHOT
    assert bench.counted() == {"drop": 3, "drop_early": 3}
    result, found = carrying.send("up", PLAIN)
    assert (result, bytes(found)) == (REDIRECT, bytes(carrying.packet("up", PLAIN, b"")))  # into the TUN
    assert bench.counted()["tunnel"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_it_is_found_among_others_of_the_same_hash(bench: Bench, way: str) -> None:
    """Five others are in its bucket, two of them with the same tag; one is its own in the other direction."""
    ends = (CLIENT, FAR, CLIENT_PORT, FAR_PORT) if way == "up" else (PROXY, LOCAL, PROXY_PORT, LOCAL_PORT)
    key = FLOW.pack(wide(ends[0][4]), wide(ends[1][4]), *ends[2:])
    crowd = [(like(key, number, tag=True), way == "down") for number in (1, 2)] + [(key, way == "up")]
    crowd += [(like(key, number, tag=False), way == "down") for number in (3, 4)]
    carrying = Carrying(bench, Spliced(), crowd)
    result, found = carrying.send(way, PLAIN)
    assert (result, bytes(found)) == (REDIRECT, bytes(carrying.expected(way, PLAIN, b"")))


@pytest.mark.parametrize("way", WAYS)
def test_a_reset_is_told_of_at_once(bench: Bench, way: str) -> None:
    carrying = Carrying(bench, Spliced())
    carrying.send(way, {**PLAIN, "flags": RST})
    assert carrying.ended() == [PLACE]


def test_while_the_gateway_stands_still_what_is_carried_goes_on(bench: Bench) -> None:
    """Its heart does not beat: what would be tunnelled goes direct."""
    Map(bench.objects.maps["heartbeat"], U32.size, U64.size).update(U32.pack(0), U64.pack(1))
    bench.is_alive = False
    carrying = Carrying(bench, Spliced())
    assert carrying.send("up", PLAIN)[0] == REDIRECT
    assert carrying.send("down", PLAIN)[0] == REDIRECT
    other = carrying.packet("up", {**PLAIN, "sport": CLIENT_PORT + 1}, b"")
    for program in ("carry_up", "capture"):
        assert bench.run(frame(bytes(other)), program=program) == GO_ON
    assert bench.counted()["pass_fail_open"] == 2


def test_the_numbers_of_python_and_c_are_the_same(bench: Bench) -> None:
    """The record is written by field here and by struct there: one connection, read back as `read` does."""
    carrying = Carrying(bench, replace(Spliced(), heard=0))
    carrying.send("up", {**PLAIN, "seq": 100, "ack": 200}, b"12345")
    carrying.send("down", {**PLAIN, "seq": 200, "ack": 105 + 1_000_000}, b"123")
    raw = Map(bench.objects.maps["splices"], U32.size, offload.SPLICE_SIZE).lookup(U32.pack(PLACE))
    assert raw is not None
    fields = offload._GROWING.unpack_from(raw, offload._GROWING_AT)
    packets_up, bytes_up, last_up, ack_up, end_up, _, _ = fields[8:15]
    packets_down, bytes_down, last_down, ack_down, end_down, _, _ = fields[15:]
    assert (packets_up, bytes_up, ack_up, end_up) == (1, 5, 200, 105)
    assert (packets_down, bytes_down, ack_down, end_down) == (1, 3, 105, 203)
    assert 0 < last_up <= last_down
    assert socket.ntohs(struct.unpack_from("=H", raw, 64)[0]) == CLIENT_PORT
