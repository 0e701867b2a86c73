"""FragmentTable beside a naive reassembly that keeps everything and looks at each byte."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ztun.stack.fragments import FragmentTable
from ztun.stack.sources import SourceCounts, source_of
from ztun.wire.extensions import Fragment
from ztun.wire.ip import IpHeader
from ztun.wire.malformed import MalformedError

_LIFE = 60.0
_Key = tuple[bytes, bytes, int]


def addresses(version: int, host: int) -> tuple[bytes, bytes]:
    if version == 4:
        return bytes([10, 0, 0, host]), bytes([192, 0, 2, 1])
    return bytes([0xFD, 0, 0, 0, 0, 0, 0, host] + [0] * 7 + [1]), bytes([0x20, 1] + [0] * 14)


class Naive:
    """One datagram: who wrote which byte, and the end."""

    def __init__(self, until: float) -> None:
        self.bytes: dict[int, int] = {}
        self.pieces: set[tuple[int, bytes]] = set()
        self.end: int | None = None
        self.refused = False
        self.until = until

    def add(self, offset: int, piece: bytes, more: bool) -> bytes | None:
        """Raises ValueError for what must not be."""
        if (offset, piece) in self.pieces:
            return None
        end = offset + len(piece)
        beyond = self.end is not None and (end > self.end or not more)
        behind = not more and any(at >= end for at in self.bytes)
        if self.refused or beyond or behind or any(at in self.bytes for at in range(offset, end)):
            self.refused = True
            self.pieces.clear()
            raise ValueError
        self.pieces.add((offset, piece))
        self.bytes |= dict(enumerate(piece, offset))
        if not more:
            self.end = end
        if self.end is None or len(self.bytes) < self.end:
            return None
        return bytes(self.bytes[at] for at in range(self.end))


class Reassembling(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.table = FragmentTable(1 << 30, 1 << 30)
        self.naive: dict[_Key, Naive] = {}
        self.now = 0.0

    @rule(
        version=st.sampled_from([4, 6]), host=st.integers(1, 2), ident=st.integers(1, 2),
        offset=st.integers(0, 5), units=st.integers(1, 3), rest=st.integers(0, 7), more=st.booleans(),
        content=st.integers(1, 3),
    )  # fmt: skip
    def fragment(
        self, version: int, host: int, ident: int, offset: int, units: int, rest: int, more: bool, content: int
    ) -> None:
        source, destination = addresses(version, host)
        piece = bytes([content]) * (8 * units + (0 if more else rest))
        naive = self.naive.setdefault((source, destination, ident), Naive(self.now + _LIFE))
        try:
            expected = naive.add(offset * 8, piece, more)
        except ValueError:
            expected = b"refused"
        head = IpHeader(
            version, source, destination, 132, 0, len(piece), 64, Fragment(ident, offset * 8, more), 9
        )  # fmt: skip
        try:
            got = self.table.add(head, memoryview(piece), 0, self.now)
        except MalformedError:
            assert expected == b"refused"
            return
        if expected is None:
            assert got is None
        else:
            assert got == (132, expected)
            del self.naive[source, destination, ident]

    @rule(seconds=st.floats(1, 70))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.table.expired(self.now)
        self.naive = {key: one for key, one in self.naive.items() if one.until > self.now}

    @invariant()
    def is_counted_right(self) -> None:
        assert len(self.table) == len(self.naive)
        held = sum(len(piece) for one in self.naive.values() for _, piece in one.pieces)
        assert self.table._used >= held
        assert bool(self.table._used) == bool(self.naive)
        assert len(self.table._of) == len({source_of(key[0]) for key in self.naive})


TestReassembling = Reassembling.TestCase
TestReassembling.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), st.integers(1, 5), st.booleans())), st.integers(1, 12))
def test_counts_are_those_of_a_counter(steps: list[tuple[bytes, int, bool]], limit: int) -> None:
    counts, naive = SourceCounts(limit), Counter[bytes]()
    for source, number, more in steps:
        if more:
            assert counts.is_full(source, number) == (naive[source] + number > limit)
            counts.add(source, number)
            naive[source] += number
        elif naive[source]:
            gone = min(number, naive[source])
            counts.remove(source, gone)
            naive[source] -= gone
    assert len(counts) == sum(1 for number in naive.values() if number)
