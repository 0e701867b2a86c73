"""The clever structures against naive ones: ranges, reassembly, the send queue, timers, sequence numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ztun.stack.buffers import BufferPool
from ztun.stack.memory import Memory
from ztun.stack.ranges import RangeSet
from ztun.stack.reassembly import Reassembly
from ztun.stack.sendqueue import SendQueue
from ztun.stack.timers import NEVER, TimerQueue
from ztun.stack.tokenbucket import TokenBucket

_NUMBERS = st.integers(0, 60)


class RangesAgainstASet(RuleBasedStateMachine):
    """RangeSet beside a plain set of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges = RangeSet()
        self.naive: set[int] = set()

    @rule(start=_NUMBERS, size=st.integers(1, 20))
    def add(self, start: int, size: int) -> None:
        self.ranges.add(start, start + size)
        self.naive |= set(range(start, start + size))

    @rule(start=_NUMBERS, size=st.integers(0, 20))
    def remove(self, start: int, size: int) -> None:
        self.ranges.remove(start, start + size)
        self.naive -= set(range(start, start + size))

    @rule(bound=_NUMBERS)
    def discard_below(self, bound: int) -> None:
        self.ranges.discard_below(bound)
        self.naive = {n for n in self.naive if n >= bound}

    @rule(bound=_NUMBERS)
    def discard_from(self, bound: int) -> None:
        self.ranges.discard_from(bound)
        self.naive = {n for n in self.naive if n < bound}

    @rule()
    def clear(self) -> None:
        self.ranges.clear()
        self.naive.clear()

    @rule(position=_NUMBERS, limit=_NUMBERS)
    def next_gap(self, position: int, limit: int) -> None:
        missing = [n for n in range(position, limit) if n not in self.naive]
        gap = self.ranges.next_gap(position, limit)
        if not missing:
            assert gap is None
        else:
            assert gap is not None
            assert gap[0] == missing[0]
            assert all(n not in self.naive for n in range(*gap))
            assert gap[1] == limit or gap[1] in self.naive

    @rule(start=_NUMBERS, end=_NUMBERS)
    def count_between(self, start: int, end: int) -> None:
        assert self.ranges.count_between(start, end) == sum(start <= n < end for n in self.naive)

    @rule(number=_NUMBERS)
    def containing(self, number: int) -> None:
        found = self.ranges.containing(number)
        assert (found is not None) == (number in self.naive)
        if found is not None:
            assert found[0] <= number < found[1]
            assert set(range(*found)) <= self.naive
            assert found[0] - 1 not in self.naive
            assert found[1] not in self.naive

    @precondition(lambda self: self.naive)
    @rule()
    def ends(self) -> None:
        assert self.ranges.first[0] == min(self.naive)
        assert self.ranges.highest == max(self.naive) + 1

    @invariant()
    def is_the_same_set(self) -> None:
        listed = list(self.ranges)
        assert [n for start, end in listed for n in range(start, end)] == sorted(self.naive)
        assert listed == list(reversed(list(reversed(self.ranges))))
        assert all(left[1] < right[0] for left, right in pairwise(listed)), "touching ranges merge"
        assert self.ranges.total == len(self.naive)
        assert len(self.ranges) == len(listed)
        assert bool(self.ranges) is bool(self.naive)


TestRanges = RangesAgainstASet.TestCase
TestRanges.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def stream(start: int, size: int) -> bytes:
    """What the sender has at these places of its stream."""
    return bytes((start + i) * 7 % 251 for i in range(size))


class ReassemblyAgainstAnArray(RuleBasedStateMachine):
    """Reassembly beside a dictionary from place to byte."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = Reassembly(most=1000)
        self.naive: dict[int, int] = {}
        self.next = 0

    @rule(ahead=st.integers(0, 50), size=st.integers(1, 20))
    def insert(self, ahead: int, size: int) -> None:
        start = self.next + ahead
        kept = self.pieces.insert(start, memoryview(stream(start, size)))
        assert not kept, "small pieces are copied"
        for i, byte in enumerate(stream(start, size)):
            self.naive.setdefault(start + i, byte)

    @rule(step=st.integers(0, 10))
    def advance(self, step: int) -> None:
        """In-order data moved the receiver on; take what joins it."""
        self.next += step
        while (piece := self.pieces.take(self.next)) is not None:
            assert bytes(piece) == bytes(self.naive[self.next + i] for i in range(len(piece)))
            self.next += len(piece)
        self.naive = {at: byte for at, byte in self.naive.items() if at >= self.next}
        assert self.next not in self.naive

    @rule(end=st.integers(0, 60))
    def cut(self, end: int) -> None:
        self.pieces.cut(self.next + end)
        self.naive = {at: byte for at, byte in self.naive.items() if at < self.next + end}

    @rule(limit=st.integers(1, 4))
    def sack_blocks(self, limit: int) -> None:
        blocks = self.pieces.sack_blocks(limit)
        assert len(blocks) <= limit
        assert len(set(blocks)) == len(blocks)
        for start, end in blocks:
            assert all(at in self.naive for at in range(start, end))
            assert start - 1 not in self.naive
            assert end not in self.naive

    @invariant()
    def holds_the_same(self) -> None:
        assert self.pieces.size == len(self.naive)
        assert bool(self.pieces) is bool(self.naive)


TestReassembly = ReassemblyAgainstAnArray.TestCase
TestReassembly.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), max_size=20), st.integers(1, 6))
def test_no_more_pieces_are_held_than_agreed(inserts: list[tuple[int, int]], most: int) -> None:
    pieces = Reassembly(most)
    for start, size in inserts:
        pieces.insert(start, memoryview(stream(start, size)))
    taken, position = 0, -1
    for position in range(60):
        while pieces.take(position) is not None:
            taken += 1
    assert taken <= most


def test_a_large_piece_is_kept_where_it_lies() -> None:
    pieces = Reassembly(10)
    data = memoryview(bytes(40000))
    assert pieces.insert(5, data)
    taken = pieces.take(5)
    assert taken is not None
    assert taken.obj is data.obj


class SendQueueAgainstBytes(RuleBasedStateMachine):
    """SendQueue beside the plain bytes of the stream; buffers are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool(size=64)
        self.memory = Memory(1 << 20)
        self.queue = SendQueue(1000, self.pool, self.memory)
        self.naive = b""
        self.start = 1000

    @rule(size=st.integers(1, 50), owned=st.booleans())
    def append(self, size: int, owned: bool) -> None:
        data = stream(self.queue.end, size)
        if owned:
            buffer = self.pool.get()
            buffer[:size] = data
            self.queue.append(buffer[:size], buffer)
        else:
            self.queue.append(memoryview(data), None)
        self.naive += data

    @rule(portion=st.floats(0, 1))
    def acknowledge(self, portion: float) -> None:
        count = int(portion * len(self.naive))
        self.queue.acknowledge(self.start + count)
        self.start += count
        self.naive = self.naive[count:]

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def views(self, data: st.DataObject) -> None:
        offset = data.draw(st.integers(0, len(self.naive) - 1))
        count = data.draw(st.integers(1, len(self.naive) - offset))
        got = self.queue.views(self.start + offset, count)
        assert b"".join(got) == self.naive[offset : offset + count]
        assert all(len(view) for view in got)

    @rule()
    def clear(self) -> None:
        self.queue.clear()
        self.start, self.naive = self.queue.end, b""
        assert len(self.pool) == self.pool.allocated - self.pool.freed, "every buffer is back"
        assert self.memory.used == 0

    @invariant()
    def spans_the_same(self) -> None:
        assert (self.queue.start, self.queue.end) == (self.start, self.start + len(self.naive))
        assert self.memory.used >= len(self.naive)


TestSendQueue = SendQueueAgainstBytes.TestCase
TestSendQueue.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class Alarm:
    """Something with a deadline."""

    def __init__(self) -> None:
        self.armed = NEVER
        self.timer = 0
        self.when = NEVER
        self.rang: list[float] = []

    def deadline(self) -> float:
        return self.when

    def expired(self, now: float) -> None:
        self.rang.append(now)
        self.when = NEVER


class TimersAgainstAList(RuleBasedStateMachine):
    """TimerQueue beside a look at every alarm."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = TimerQueue()
        self.alarms = [Alarm() for _ in range(5)]
        self.now = 0.0

    @rule(which=st.integers(0, 4), ahead=st.integers(0, 30))
    def move(self, which: int, ahead: int) -> None:
        """To earlier or to later; the queue hears of it as a connection would tell."""
        alarm = self.alarms[which]
        alarm.when = self.now + ahead
        self.queue.arm(alarm, alarm.when)

    @rule(which=st.integers(0, 4))
    def silence(self, which: int) -> None:
        """Without telling the queue: an entry that comes up for nothing."""
        self.alarms[which].when = NEVER

    @rule(which=st.integers(0, 4))
    def cancel(self, which: int) -> None:
        self.alarms[which].when = NEVER
        self.queue.cancel(self.alarms[which])

    @rule(step=st.integers(0, 20))
    def passes(self, step: int) -> None:
        self.now += step
        due = [alarm for alarm in self.alarms if alarm.when <= self.now]
        counts = [len(alarm.rang) for alarm in self.alarms]
        self.queue.run(self.now)
        for alarm, before in zip(self.alarms, counts, strict=True):
            assert len(alarm.rang) == before + (alarm in due)
        assert self.queue.earliest == (NEVER if (following := self.queue.next()) is None else following)

    @invariant()
    def nothing_is_overslept(self) -> None:
        earliest = min(alarm.when for alarm in self.alarms)
        following = self.queue.next()
        assert following is not None or earliest == NEVER
        assert following is None or self.queue.earliest <= following <= earliest
        assert len(self.queue) <= 2 * 5 + 64 + 1


TestTimers = TimersAgainstAList.TestCase
TestTimers.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.floats(0, 3), max_size=60))
def test_a_token_bucket_keeps_its_rate(pauses: list[float]) -> None:
    bucket = TokenBucket(rate=2.0, burst=5)
    now = 0.0
    taken: list[float] = []
    for pause in pauses:
        now += pause
        if bucket.take(now):
            taken.append(now)
    for i, start in enumerate(taken):
        for j in range(i, len(taken)):
            assert j - i + 1 <= 5 + 2.0 * (taken[j] - start) + 1e-6
