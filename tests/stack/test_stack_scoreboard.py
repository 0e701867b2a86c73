"""The scoreboard against one that knows of every byte by itself."""

from __future__ import annotations

import random

import pytest

from ztun.stack.scoreboard import Scoreboard

_MSS = 5
_QUICKEST = 2.0  # the shortest round trip, in steps of the clock


class Naive:
    """Sets of numbers, and a list of retransmissions: start, end, what was next then, and when."""

    def __init__(self) -> None:
        self.una = self.nxt = self.marked = 0
        self.sacked: set[int] = set()
        self.lost: set[int] = set()
        self.resent: list[tuple[int, int, int, float]] = []

    def take(self, start: int, end: int) -> bool:
        """True when a byte arrives that was sent once only, below one that had arrived already."""
        highest = max(self.sacked, default=-1)
        new = set(range(start, end)) - self.sacked
        late = any(number < highest and (number >= self.marked or number in self.lost) for number in new)
        self.sacked |= new
        self.lost -= new
        return late

    def advance(self, una: int) -> None:
        self.una = una
        self.sacked = {number for number in self.sacked if number >= una}
        self.lost = {number for number in self.lost if number >= una}

    def mark_until(self, limit: int) -> None:
        self.lost |= {n for n in range(max(self.marked, self.una), limit) if n not in self.sacked}
        self.marked = max(self.marked, limit)

    def overtaken(self, now: float) -> int:
        arrived = max(self.sacked, default=self.una - 1) + 1
        for index, (start, end, nxt, at) in reversed(list(enumerate(self.resent))):
            if arrived > nxt:
                return index + 1
            if now - at >= _QUICKEST and (self.una > start or any(n in self.sacked for n in range(start, end))):
                return index
        return 0

    def mark_again(self, count: int, wait: float, now: float) -> None:
        for _ in range(count):
            start, end, _, at = self.resent[0]
            missing = {n for n in range(max(start, self.una), end) if n not in self.sacked}
            if missing and at + wait > now:
                return
            self.lost |= missing
            self.resent.pop(0)

    def resend(self, most: int, now: float) -> tuple[int, int]:
        start = min(self.lost)
        run = start
        while run in self.lost:
            run += 1
        count = min(run - start, most)
        if _MSS < count < run - start:
            count -= count % _MSS
        self.lost -= set(range(start, start + count))
        self.resent.append((start, start + count, self.nxt, now))
        return start, count


@pytest.mark.parametrize("seed", range(150))
def test_it_knows_what_a_naive_one_knows(seed: int) -> None:
    choose = random.Random(seed)
    board, naive = Scoreboard(0), Naive()
    for step in range(120):
        now = float(step)
        naive.nxt += choose.choice((0, 0, _MSS, 3 * _MSS))
        if naive.nxt == naive.una:
            continue
        start = choose.randrange(naive.una, naive.nxt)
        if choose.random() < 0.6 and start > naive.una:
            end = min(naive.nxt, start + choose.choice((1, _MSS, 4 * _MSS)))
            highest = board.sacked.highest if board.sacked.total else 0
            assert board.take(start, end, highest) == naive.take(start, end)
        elif choose.random() < 0.3:
            naive.advance(start)
            board.advance(start)
        count, edge, _ = board.overtaken(naive.una, now, _QUICKEST)
        assert count == naive.overtaken(now)
        wait = choose.choice((0.0, 0.0, 3.0))
        board.mark_until(edge, naive.una)
        naive.mark_until(edge)
        due = board.mark_again(count, naive.una, wait, now)
        naive.mark_again(count, wait, now)
        assert due is None or due > now
        board.settle(naive.una)
        while naive.resent and naive.resent[0][1] <= naive.una:
            naive.resent.pop(0)
        assert board.pipe(naive.una, naive.nxt) == naive.nxt - naive.una - len(naive.sacked) - len(naive.lost)
        assert {n for start, end in board.lost for n in range(start, end)} == naive.lost
        assert board.is_clean() == (not naive.sacked and not naive.lost and not naive.resent)
        while naive.lost and choose.random() < 0.6:
            most = choose.choice((_MSS, 2 * _MSS, 7))
            assert board.resend(most, _MSS, naive.nxt, now) == naive.resend(most, now)
