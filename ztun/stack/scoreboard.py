"""What of the flight has arrived, what is lost, and what was sent again: the scoreboard of RFC 6675.

Sequence numbers are full integers, times are seconds. No packet is remembered: of what was sent once only, the numbers
themselves tell the order; only retransmissions are listed, with their times, as far as RFC 8985 needs them.
"""

from __future__ import annotations

from collections import deque
from typing import Final, NamedTuple

from ztun.stack.ranges import RangeSet

_MAX_RANGES: Final = 2048  # that are SACKed; only an attacker needs more (compare CVE-2019-11477)


class Resent(NamedTuple):
    """A retransmission of [start, end): nxt is what came next for new data when it was sent, `at` the time."""

    start: int
    end: int
    nxt: int
    at: float


class Scoreboard:
    """sacked: what has arrived out of order; lost: what is believed lost and was not sent again since."""

    __slots__ = ("_resent", "lost", "marked_until", "sacked")

    def __init__(self, una: int) -> None:
        self.sacked = RangeSet()
        self.lost = RangeSet()
        self.marked_until = una  # below, it was decided once already what is lost
        self._resent: deque[Resent] = deque()  # retransmissions under way, in the order they were sent

    def is_clean(self) -> bool:
        """Nothing is missing, and nothing that was sent again is under way."""
        return not (self.sacked.total or self.lost.total or self._resent)

    def pipe(self, una: int, nxt: int) -> int:
        """An estimate of the bytes still in the network (RFC 6675 section 4, SetPipe)."""
        return nxt - una - self.sacked.total - self.lost.total

    # What the ACKs say.

    def take(self, start: int, end: int, highest: int) -> bool:
        """The peer has [start, end). Returns True when that shows reordering: something that was sent only once
        arrived after what had been sent later (RFC 8985 section 6.2 step 3).

        highest: where what had arrived before this ACK ends; the order of the blocks in one ACK tells nothing.
        """
        sacked, lost = self.sacked, self.lost
        if len(sacked) >= _MAX_RANGES:
            return False
        late = False
        if start < highest:
            below = min(end, highest)
            gap = sacked.next_gap(max(start, self.marked_until), below)
            late = gap is not None or lost.count_between(start, below) > 0
        sacked.add(start, end)
        if lost.total:
            lost.remove(start, end)
        return late

    def advance(self, una: int) -> None:
        """Everything below `una` has arrived. The list of retransmissions is for `settle`, once it was judged by."""
        if self.sacked.total:
            self.sacked.discard_below(una)
        if self.lost.total:
            self.lost.discard_below(una)

    def settle(self, una: int) -> None:
        """Forget the retransmissions that have arrived and have none before them that has not."""
        while self._resent and self._resent[0].end <= una:
            self._resent.popleft()

    def is_resending(self, una: int) -> bool:
        """Something above `una` is lost, or was sent again."""
        return self.lost.total > 0 or any(sent.end > una for sent in self._resent)

    def has_reneged(self, una: int) -> bool:
        """The peer wants what it had SACKed (RFC 2018 section 8): no ACK should end where such a range lies."""
        return self.sacked.total > 0 and self.sacked.first[0] <= una

    # What is lost.

    def mark(self, start: int, end: int) -> None:
        """[start, end) is lost as far as it was not SACKed."""
        while (gap := self.sacked.next_gap(start, end)) is not None:
            self.lost.add(*gap)
            start = gap[1]

    def mark_until(self, limit: int, una: int) -> None:
        """What is not SACKed below `limit` is lost. Each byte is marked once; then it is for `mark_again`."""
        if limit > self.marked_until:
            self.mark(max(self.marked_until, una), limit)
            self.marked_until = limit

    def overtaken(self, una: int, now: float, quickest: float) -> tuple[int, int, bool]:
        """How many of the retransmissions were overtaken by something sent later that has arrived, and the number below
        which all first transmissions were (RFC 8985 section 6.2 step 2). Last, whether one was not needed.

        quickest: the shortest round trip ever seen. An ACK sooner than that answers the first transmission.
        """
        needless = False
        arrived = max(self.sacked.highest, una) if self.sacked.total else una
        resent = self._resent
        for index in range(len(resent) - 1, -1, -1):
            sent = resent[index]
            if arrived > sent.nxt:
                return index + 1, arrived, needless
            if self._has_arrived(sent, una):
                if now - sent.at >= quickest:
                    return index, max(arrived, sent.nxt), needless
                needless = True
        return 0, arrived, needless

    def _has_arrived(self, sent: Resent, una: int) -> bool:
        start = max(sent.start, una)
        return una > sent.start or self.sacked.count_between(start, sent.end) > 0

    def mark_again(self, count: int, una: int, wait: float, now: float) -> float | None:
        """Of the first `count` retransmissions, those that are `wait` seconds old are lost as well. Returns when the
        next of them will be, if there is one."""
        resent = self._resent
        for _ in range(count):
            sent = resent[0]
            if sent.at + wait > now and self._is_missing(sent, una):
                return sent.at + wait
            resent.popleft()
            self.mark(max(sent.start, una), sent.end)
        return None

    def _is_missing(self, sent: Resent, una: int) -> bool:
        return self.sacked.next_gap(max(sent.start, una), sent.end) is not None

    def resend(self, most: int, mss: int, nxt: int, now: float) -> tuple[int, int]:
        """Take the first of what is lost, at most `most` bytes, in whole segments where there is more than one.

        Returns its range, which is under way again from now on.
        """
        start, end = self.lost.first
        count = min(end - start, most)
        if mss < count < end - start:
            count -= count % mss
        self.lost.discard_below(start + count)
        self._resent.append(Resent(start, start + count, nxt, now))
        return start, count

    def forget(self, una: int) -> None:
        """Drop every mark, so that the flight can be judged anew. What was SACKed stays."""
        self.lost.clear()
        self._resent.clear()
        self.marked_until = una
