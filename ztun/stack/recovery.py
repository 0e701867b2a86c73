"""Loss recovery of a sender: RFC 6675 with SACK and RFC 6582 without, losses found in time as RFC 8985 does it.

A flow has one of these only while something is in doubt, so that the others neither pay for it nor carry it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from ztun.stack.scoreboard import Scoreboard
from ztun.wire.sequence import MASK

if TYPE_CHECKING:
    from ztun.stack.sender import Sender

_DUPLICATE_THRESHOLD: Final = 3
_TICK: Final = 0.001  # seconds; less cannot be told from a busy machine
# Recoveries without a sign of reordering after which patience is back to its least (RFC 8985, section 6.2).
_CALM: Final = 16
_Blocks = tuple[tuple[int, int], ...]


class Recovery(Enum):
    NONE = 0
    FAST = 1  # duplicate ACKs or SACK said so
    LOSS = 2  # the retransmission timer did


class LossRecovery:
    """due: when to be woken by `time_passed`, in seconds; timed_out_at: when the retransmission timer last expired;
    echo: TSecr of the latest ACK, where there are timestamps."""

    __slots__ = (
        "_before", "_grown", "_lowered_at", "_overtaken", "_overtaken_at", "_rescued", "_tx", "board", "due",
        "duplicates", "echo", "probe_end", "probe_resent", "state", "timed_out_at",
    )  # fmt: skip

    def __init__(self, tx: Sender) -> None:
        self._tx = tx
        self.board = Scoreboard(tx.una)
        self.state = Recovery.NONE
        self.duplicates = 0
        self.due: float | None = None
        self.timed_out_at = 0.0
        self.echo: int | None = None
        self.probe_end: int | None = None  # of a tail loss probe that is not accounted for yet (RFC 8985, TLP.end_seq)
        self.probe_resent = False  # it was no new data
        self._overtaken = tx.una  # first transmissions below this were overtaken: lost at the time below
        self._overtaken_at: float | None = None
        self._rescued = False
        self._grown = False  # patience did, in this recovery
        self._lowered_at = 0.0  # when the congestion window was, last
        self._before: tuple[int, int, int] | None = None  # cwnd, ssthresh, and TSval of the first retransmission

    def is_over(self) -> bool:
        """Nothing is in doubt any more."""
        if self.state is not Recovery.NONE or self.probe_end is not None:
            return False
        return not self.duplicates and self.board.is_clean()

    def pipe(self) -> int:
        """An estimate of the bytes still in the network (RFC 6675 section 4, SetPipe)."""
        tx = self._tx
        pipe = self.board.pipe(tx.una, tx.nxt)
        if self.duplicates and self.state is not Recovery.LOSS and not tx.has_sack:
            pipe -= self.duplicates * tx.mss  # each says that one segment has left the network
        return pipe if pipe > 0 else 0

    # What the ACKs say.

    def acknowledge(self, ack: int, duplicate: bool, sack: _Blocks, now: float) -> None:
        """Process an acceptable ACK; the sender has advanced already. duplicate: as RFC 5681 section 2 has it."""
        tx = self._tx
        if self.probe_end is not None:
            self._judge_probe(ack, duplicate, sack)
        if tx.has_sack:
            duplicate = bool(sack) and self._take_sack(ack, sack, now)
        if duplicate and tx.wnd and tx.nxt > tx.una:
            self.duplicates += 1  # RFC 6675 section 2: with SACK an ACK that brings news
        if tx.nxt > tx.una:
            self._judge(now)
        self.board.settle(tx.una)
        if self.state is not Recovery.NONE:
            self.transmit(now)

    def advance(self, ack: int, count: int, flight: int, now: float) -> None:
        """una has become `ack`, `count` bytes further; `flight`: what was unacknowledged before."""
        tx, board = self._tx, self.board
        if self.state is Recovery.LOSS and board.sacked.containing(ack) is not None:
            self._distrust()
        if tx.has_sack and self._shows_reordering(ack - count, ack):
            tx.patience = max(tx.patience, 1)
        board.advance(ack)
        if self._before is not None:
            self._undo_if_spurious()
        if self.state is Recovery.NONE:
            self.duplicates = 0
            tx.grow(count, flight)
        elif ack >= tx.recover:
            self._end(count)
        elif self.state is Recovery.LOSS:
            tx.cc.acknowledged(min(count, tx.cc.cwnd))
        elif not tx.has_sack:
            # The partial ACK names the next hole; what it covers had brought duplicates (RFC 6582 section 3.2 step 3).
            self.duplicates = max(self.duplicates + 1 - count // tx.mss, 0)
            board.lost.add(ack, min(ack + tx.mss, tx.nxt))
            self._retransmit(tx.mss, now)

    def _shows_reordering(self, una: int, ack: int) -> bool:
        """The ACK covers what was sent once only, and what was sent later had arrived before it."""
        board = self.board
        if not board.sacked.total:
            return False
        limit = min(ack, board.sacked.highest)
        start = max(board.marked_until, una)
        return board.sacked.next_gap(start, limit) is not None or board.lost.count_between(una, limit) > 0

    def _take_sack(self, ack: int, sack: _Blocks, now: float) -> bool:
        """Returns True when there is news in it."""
        tx, board = self._tx, self.board
        before = board.sacked.total
        highest = board.sacked.highest if before else 0
        for start, end in sack:
            if tx.una < start < end <= tx.nxt:
                if board.take(start, end, highest):
                    tx.patience = max(tx.patience, 1)
                tx.take_sample(start, end, now)
        if _is_duplicate(ack, sack) and tx.recover_from <= sack[0][0] and sack[0][1] <= tx.recover:
            self._grow_patience()  # RFC 8985 section 6.2 step 4
        return board.sacked.total > before

    def _judge_probe(self, ack: int, duplicate: bool, sack: _Blocks) -> None:
        """Was the tail lost, and is the probe all that tells of it (RFC 8985 section 7.4.2)?"""
        tx = self._tx
        assert self.probe_end is not None
        if ack < self.probe_end:
            return
        if not self.probe_resent or (duplicate and not sack):
            self.probe_end = None
        elif _is_duplicate(ack, sack) and sack[0][1] == self.probe_end:
            self.probe_end = None  # both have arrived
        elif ack > self.probe_end:
            self.probe_end = None
            if self.state is Recovery.NONE:
                tx.cc.loss(max(tx.flight(), tx.cc.cwnd // 2))

    # What is lost.

    def time_passed(self, now: float) -> None:
        """`due` has come: what was overtaken that long ago is lost."""
        self._judge(now)
        if self.state is not Recovery.NONE:
            self.transmit(now)

    def _judge(self, now: float) -> None:
        """Find what is lost by now, and begin a recovery if there is any."""
        self.due = None
        if self._tx.has_sack:
            self._judge_by_time(now)
        if self.state is Recovery.NONE and (self.board.lost.total or self._is_loss()):
            self._enter_fast(now)
            if self._tx.has_sack:
                self._judge_by_time(now)

    def _judge_by_time(self, now: float) -> None:
        """RFC 8985 section 6.2. What was sent before something that has arrived gets some time to arrive as well.

        When a first transmission was sent is not known. So its time counts from the ACK that tells that it was
        overtaken, which is later than the RFC has it by no more than the time that it took to send the flight.
        """
        tx, board = self._tx, self.board
        count, edge, needless = board.overtaken(tx.una, now, tx.rtt.lowest)
        if needless and not self._grown:
            self._grow_patience()
        wait = self._patience()
        if not wait:
            board.mark_until(edge, tx.una)
            self._overtaken_at = None
        else:
            self._wait_for_overtaken(edge, wait, now)
            wait += tx.rtt.srtt or 0.0
        before = board.lost.total
        again = board.mark_again(count, tx.una, wait, now)
        if board.lost.total > before:
            self._lower_again(now)
        if again is not None and (self.due is None or again < self.due):
            self.due = again

    def _wait_for_overtaken(self, edge: int, wait: float, now: float) -> None:
        """First transmissions below `edge` are lost in `wait` seconds. Those that follow wait until that is over."""
        tx, board = self._tx, self.board
        if self._overtaken_at is not None and now >= self._overtaken_at:
            board.mark_until(self._overtaken, tx.una)
            self._overtaken_at = None
        if self._overtaken_at is None and edge > max(board.marked_until, tx.una):
            self._overtaken, self._overtaken_at = edge, now + wait
        self.due = self._overtaken_at

    def _lower_again(self, now: float) -> None:
        """The loss of a retransmission is one more sign of congestion (RFC 5681 section 4.3): one a round trip."""
        tx = self._tx
        if self.state is Recovery.FAST and now - self._lowered_at >= (tx.rtt.srtt or 0.0):
            self._lowered_at = now
            tx.cc.loss(tx.cc.cwnd)

    def _patience(self) -> float:
        """How long what was overtaken may still arrive: the reordering window of RFC 8985 section 6.2 step 4."""
        tx = self._tx
        if not tx.patience and (self.state is not Recovery.NONE or self._is_loss()):
            return 0.0
        wait = max(tx.patience, 1) * tx.rtt.lowest / 4
        return max(min(wait, tx.rtt.srtt or 0.0), _TICK)

    def _grow_patience(self) -> None:
        """What was sent again had arrived, only late."""
        self._tx.patience += 1
        self._tx.calm = 0
        self._grown = True

    def _is_loss(self) -> bool:
        """IsLost of the first unacknowledged byte: RFC 6675 section 4 with SACK, RFC 6582 section 3.2 without."""
        tx, sacked = self._tx, self.board.sacked
        if not tx.has_sack:
            # Duplicates up to here may answer retransmissions that were not needed; then the ACK jumped (section 4.1).
            sure = tx.una > tx.recover or tx.last_step <= 4 * tx.mss
            there = self.duplicates * tx.mss if sure else 0
        elif tx.patience or not sacked.total:
            return False  # among packets that overtake each other only time tells
        elif self.duplicates >= _DUPLICATE_THRESHOLD or (self.probe_end is not None and sacked.highest == tx.nxt):
            return True  # the end has arrived, by a probe or at last, and what is before it has not
        else:
            there = sacked.total
        if there > (_DUPLICATE_THRESHOLD - 1) * tx.mss:
            return True
        # With less than four segments in flight and nothing to follow there cannot be more duplicates (RFC 5827).
        flight = tx.flight()
        return tx.mss < flight < 4 * tx.mss and not tx.unsent() and there > 0 and there >= flight - tx.mss

    # Recoveries.

    def _begin(self, state: Recovery) -> None:
        tx = self._tx
        self.state = state
        tx.recover_from, tx.recover = tx.una, tx.nxt
        tx.calm += 1
        if tx.calm >= _CALM and tx.patience:
            tx.patience = 1
        self.probe_end = None
        self._rescued = self._grown = False

    def _enter_fast(self, now: float) -> None:
        tx, board = self._tx, self.board
        self._remember(now)
        tx.cc.loss(tx.flight())
        self._lowered_at = now
        self._begin(Recovery.FAST)
        first = min(tx.una + tx.mss, tx.nxt)
        if tx.has_sack:
            board.mark_until(first, tx.una)
        else:
            board.lost.add(tx.una, first)
        self._retransmit(tx.mss, now)  # at once, whatever the congestion window says (RFC 6675 section 5 step 4.3)

    def enter_loss(self, repeated: bool, now: float) -> None:
        """The retransmission timer expired. repeated: not for the first time since anything was acknowledged."""
        tx, board = self._tx, self.board
        self.timed_out_at = now
        if self.state is Recovery.NONE:
            self._remember(now)
        elif self.state is Recovery.FAST:
            self._before = None
        tx.cc.time_out(tx.flight(), repeated)
        self._begin(Recovery.LOSS)
        self.duplicates = 0
        if board.has_reneged(tx.una):
            board.sacked.clear()
        self._mark_all()
        self.transmit(now)

    def enter_smaller(self, now: float) -> None:
        """The path takes smaller segments only: what is in flight was lost, and it is no sign of congestion."""
        tx = self._tx
        if self.state is Recovery.NONE:
            self._begin(Recovery.FAST)
            tx.cc.ssthresh = min(tx.cc.ssthresh, tx.cc.cwnd)
        self._mark_all()
        self.transmit(now)

    def _mark_all(self) -> None:
        tx, board = self._tx, self.board
        self._overtaken_at = self.due = None
        board.forget(tx.una)
        board.mark_until(tx.nxt, tx.una)

    def _distrust(self) -> None:
        """The peer has let go of what it had SACKed. It may, until it has acknowledged it (RFC 2018 section 8)."""
        self.board.sacked.clear()
        self._mark_all()

    def _end(self, count: int) -> None:
        tx = self._tx
        if self.state is Recovery.FAST:
            tx.cc.cwnd = tx.cc.ssthresh
        else:
            tx.cc.acknowledged(min(count, tx.cc.cwnd))
        self.state = Recovery.NONE
        self.duplicates = 0
        self._before = None

    def _remember(self, now: float) -> None:
        """Keep what the recovery takes away, for the case that nothing was lost. It shows by timestamps only."""
        stamp = self._tx.stamp(now)
        self._before = None if stamp is None else (self._tx.cc.cwnd, self._tx.cc.ssthresh, stamp)

    def _undo_if_spurious(self) -> None:
        """A new ACK that echoes a time before the retransmissions answers what was sent first: it was not lost but
        late, or its ACK was lost (RFC 3522). When that is so of all, the answer is that of RFC 4015, and patience."""
        assert self._before is not None
        cwnd, ssthresh, stamp = self._before
        if self.echo is None or not (self.echo - stamp) & (MASK // 2 + 1):
            self._before = None
            return
        tx = self._tx
        if self.state is Recovery.FAST:
            if not self._grown:
                self._grow_patience()
            if tx.una < tx.recover and self.board.is_resending(tx.una):
                return  # the others may be lost after all
        self._before = None
        tx.cc.cwnd, tx.cc.ssthresh = max(tx.cc.cwnd, cwnd), max(tx.cc.ssthresh, ssthresh)
        self.state = Recovery.NONE
        self.board.forget(tx.una)
        self._overtaken_at = None

    # Sending.

    def transmit(self, now: float) -> None:
        """What is lost goes first, then new data, then once the end of the flight (RFC 6675 section 4, NextSeg)."""
        tx, board = self._tx, self.board
        while (room := tx.cc.cwnd - self.pipe()) >= tx.mss:
            if board.lost.total:
                self._retransmit(room, now)
            elif not tx.send_new(min(room, tx.wnd - tx.flight()), now):
                if self._may_rescue():
                    self._rescue(now)
                return

    def _retransmit(self, most: int, now: float) -> None:
        tx = self._tx
        if not self.board.lost.total:
            return
        start, count = self.board.resend(min(most, tx.largest), tx.mss, tx.nxt, now)
        if start == tx.una:
            tx.rto_at = None  # it starts again: the first hole has its chance
        tx.send(start, count, now)

    def _may_rescue(self) -> bool:
        tx, board = self._tx, self.board
        return (
            tx.has_sack
            and self.state is Recovery.FAST
            and not self._rescued
            and board.sacked.total > 0
            and max(board.sacked.highest, board.marked_until) < tx.nxt
        )

    def _rescue(self, now: float) -> None:
        tx = self._tx
        self._rescued = True
        start = max(self.board.sacked.highest, tx.nxt - tx.mss)
        tx.send(start, tx.nxt - start, now)


def _is_duplicate(ack: int, sack: _Blocks) -> bool:
    """The first block is a D-SACK (RFC 2883 section 4): it lies below the ACK, or in the second block."""
    if not sack:
        return False
    start, end = sack[0]
    return end <= ack or (len(sack) > 1 and sack[1][0] <= start and end <= sack[1][1])
