"""The sending half of a connection: windows, retransmission, loss recovery.

Loss recovery follows RFC 6675 with SACK and RFC 6582 without. Sequence numbers are full integers.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from ztun.stack.congestion import NewReno
from ztun.stack.ranges import RangeSet
from ztun.stack.rto import RttEstimator
from ztun.stack.sendqueue import SendQueue
from ztun.wire import tcp

if TYPE_CHECKING:
    from ztun.stack.connection import Connection

_DUPLICATE_THRESHOLD = 3
_MAX_ACK_DELAY = 0.2  # of a client, in seconds (RFC 8985 section 7.2)
_TICK = 0.005  # for what a busy machine takes to answer
_MAX_RANGES = 2048  # of the SACK scoreboard; only an attacker needs more (compare CVE-2019-11477)


class Recovery(Enum):
    NONE = 0
    FAST = 1  # duplicate ACKs or SACK said so
    LOSS = 2  # the retransmission timer did


class _Resent(NamedTuple):
    """A retransmission of [start, end): nxt is what came next for new data when it was sent, `at` the time."""

    start: int
    end: int
    nxt: int
    at: float


class Sender:
    """una: oldest unacknowledged; nxt: next to send; wnd: the peer's window; mss: payload of a full segment."""

    __slots__ = (
        "_conn", "_duplicates", "_entered_at", "_give_up_at", "_last_step", "_limited", "_lost", "_marked_until",
        "_max_wnd", "_probing", "_recover", "_resent", "_tail_probe", "_tail_probed", "_timed_at", "_timed_from",
        "_timed_seq", "_wl1", "_wl2", "cc", "fin_queued", "largest", "last_send", "limit", "mss", "nxt", "queue",
        "recovery", "retransmits", "retries", "rto_at", "rtt", "sacked", "una", "wnd",
    )  # fmt: skip

    def __init__(self, conn: Connection, first: int, mss: int) -> None:
        settings = conn.stack.settings
        self._conn = conn
        self.queue = SendQueue(first, conn.stack.pool, conn.stack.memory)
        self.una = self.nxt = first
        self.mss = mss
        self.largest = mss
        self.limit = settings.send_buffer
        self.wnd = 0
        self._max_wnd = 0
        self._probing = False  # the one octet in flight was sent into a shut window
        self.cc = NewReno(mss)
        self.rtt = RttEstimator(settings.initial_rto, settings.min_rto, settings.max_rto)
        self.sacked = RangeSet()
        self.recovery = Recovery.NONE
        self.fin_queued = False
        self.rto_at: float | None = None
        self.retries = 0
        self.retransmits = 0
        self.last_send = 0.0
        self._wl1 = self._wl2 = 0
        self._duplicates = 0
        self._recover = first - 1
        self._entered_at = 0.0
        self._give_up_at = 0.0  # when the user time-out is over; counts from the first retransmission's segment on
        self._last_step = 0  # how far the latest new ACK went
        self._lost = RangeSet()  # what is believed lost and was not sent again since
        self._marked_until = first  # below, it was decided once already what is lost
        self._resent: deque[_Resent] = deque()  # retransmissions under way, in the order they were sent
        self._tail_probe = False  # rto_at is the time of a tail loss probe
        self._tail_probed = False  # one was sent since the last progress
        self._timed_from = first
        self._timed_seq: int | None = None
        self._timed_at = 0.0
        self._limited = False  # the congestion window, not the application, held data back

    # What the application may do.

    def room(self) -> int:
        """How many bytes can be sent at once. Small gaps are not worth a super-segment while ACKs are on their way.

        With a shut window it is one segment: what is queued makes the sender probe, so that a lost window update is
        no deadlock.
        """
        if self.fin_queued:
            return 0
        queued = self.queue.end - self.una
        if self.has_holes():
            return self._room_beside_holes(queued)
        window = min(self.cc.cwnd, self.wnd, self.limit)
        room = window - queued
        if room >= self.largest:
            return self.largest
        self._limited = self.cc.cwnd <= self.wnd
        if room < self.mss:
            return 0 if queued else self.mss
        return 0 if queued and room < window // 4 else room - room % self.mss

    def has_holes(self) -> bool:
        """The peer misses something, as far as its ACKs can tell: each of them may make room, also one that repeats."""
        return bool(self.sacked.total or self._duplicates or self.recovery is not Recovery.NONE)

    def _room_beside_holes(self, queued: int) -> int:
        """New data keeps the ACKs coming before loss is certain (RFC 3042) and when there is nothing left to
        retransmit (RFC 6675 section 4, NextSeg 2)."""
        unsent = self.queue.end - self.nxt
        room = min(self.cc.cwnd - self._pipe() - unsent, self.wnd - queued, self.limit - queued, self.largest)
        return max(room - room % self.mss, 0)

    def push(self, data: memoryview, owner: memoryview | None, now: float) -> None:
        """Queue bytes and send what the windows allow."""
        if self.nxt == self.una and now - self.last_send > self.rtt.rto:
            self.cc.restart()
        self.queue.append(data, owner)
        self.transmit(now)

    # Sending.

    def flight(self) -> int:
        return self.nxt - self.una

    def transmit(self, now: float) -> None:
        """Send everything that may be sent now."""
        if self.recovery is not Recovery.NONE:
            self._transmit_in_recovery(now)
        else:
            while self._send_new(min(self.cc.cwnd - self._pipe(), self.wnd - self.flight()), now):
                pass
        if self.rto_at is None and self.unsent() > 0:
            self._arm(now)  # a closed window: the timer becomes the persist timer (RFC 9293 section 3.8.6.1)

    def unsent(self) -> int:
        """Bytes, and the FIN, that were never sent."""
        return self.queue.end + self.fin_queued - self.nxt

    def _send_new(self, room: int, now: float) -> bool:
        """Send one segment of new data within `room` bytes. False when there is none, or it is not worth a segment."""
        unsent = self.queue.end - self.nxt
        if unsent <= 0:
            if room > 0 and self.unsent() == 1:
                self._send(self.nxt, 1, now)
            return False
        count = min(unsent, room, self.largest)
        # Silly window avoidance (RFC 9293 section 3.8.6.2.1): what is less than a segment waits, unless it is all there
        # is or half of the largest window the peer ever had.
        if count <= 0 or (count < unsent and count < self.mss and 2 * count < self._max_wnd):
            self._limited = self.cc.cwnd <= self.wnd
            return False
        if self.mss < count < unsent:
            count -= count % self.mss
        if count == unsent and self.fin_queued and count < room:
            count += 1
        self._send(self.nxt, count, now)
        return True

    def _send(self, seq: int, count: int, now: float) -> None:
        """Send `count` sequence numbers from `seq` on; the FIN is the one after the last byte."""
        end = seq + count
        last = self.queue.end
        flags = tcp.ACK
        payload = count
        if end > last:
            flags |= tcp.FIN
            payload -= 1
        if end >= last:
            flags |= tcp.PSH
        if end > self.nxt:
            if self._timed_seq is None and seq == self.nxt:
                self._timed_from, self._timed_seq, self._timed_at = seq, end, now
            self.nxt = end
        else:
            self.retransmits += 1
            # Karn: an ACK could answer either transmission. Without SACK it also waits for what is missing before it.
            if end > self._timed_from or not self._conn.sack_permitted:
                self._timed_seq = None
        views = self.queue.views(seq, payload) if payload else []
        self._conn.emit(seq, flags, payload, views, now)
        self.last_send = now
        if self.rto_at is None:
            self._arm(now)

    def _arm(self, now: float) -> None:
        """Set the timer: for a tail loss probe where that is possible and sooner, else for retransmission."""
        rtt = self.rtt
        wait = rtt.rto
        flight = self.nxt - self.una
        self._tail_probe = False
        if (
            rtt.srtt is not None
            and not rtt.backed_off
            and not self._tail_probed
            and self.recovery is Recovery.NONE
            and self._conn.sack_permitted
            and self.wnd
            and flight
            and not self.sacked.total
        ):
            # RFC 8985 section 7.2; a single segment's ACK may be delayed.
            probe = 2 * rtt.srtt + (_MAX_ACK_DELAY if flight <= self.mss else _TICK)
            if probe < wait:
                wait = probe
                self._tail_probe = True
        self.rto_at = now + wait
        self._conn.arm(self.rto_at)

    # What the peer says.

    def set_window(self, window: int, seq: int, ack: int) -> None:
        """Take the peer's window unless the segment is older than the one that set it (RFC 9293 section 3.10.7.4)."""
        if seq > self._wl1 or (seq == self._wl1 and ack >= self._wl2):
            self.wnd = window
            if window > self._max_wnd:
                self._max_wnd = window
            self._wl1, self._wl2 = seq, ack

    def acknowledge(
        self, ack: int, empty: bool, same_window: bool, sack: tuple[tuple[int, int], ...], now: float
    ) -> None:
        """Process an acceptable ACK. empty: the segment had neither data nor FIN."""
        if ack > self.una or self.wnd == 0:
            self.retries = 0
        if self._probing and (ack > self.una or self.wnd):
            self._end_probing(ack)
        news = self._take_sack(sack, now) if sack else False
        if ack > self.una:
            self._advance(ack, now)
        elif (
            self.wnd
            and self.flight()
            and (news if self._conn.sack_permitted else empty and same_window and ack == self.una)
        ):
            self._duplicates += 1  # RFC 6675 section 2: with SACK an ACK that brings news; else RFC 5681 section 2
        if self.recovery is not Recovery.NONE:
            self._mark_lost(now)
        elif (self.sacked.total or self._duplicates or self._lost.total) and self._is_loss():
            self._enter_fast_recovery(now)
        if self.unsent() > 0 or self.recovery is not Recovery.NONE:
            self.transmit(now)

    def _take_sack(self, sack: tuple[tuple[int, int], ...], now: float) -> bool:
        before = self.sacked.total
        for start, end in sack:
            if self.una < start < end <= self.nxt and len(self.sacked) < _MAX_RANGES:
                self.sacked.add(start, end)
                self._lost.remove(start, end)
                if self._timed_seq is not None and start < self._timed_seq <= end:
                    self.rtt.sample(now - self._timed_at)
                    self._timed_seq = None
        return self.sacked.total > before

    def _advance(self, ack: int, now: float) -> None:
        count = self._last_step = ack - self.una
        flight = self.nxt - self.una
        if self._timed_seq is not None and ack >= self._timed_seq:
            self.rtt.sample(now - self._timed_at)
            self._timed_seq = None
        self.una = ack
        self.queue.acknowledge(min(ack, self.queue.end))
        if self.sacked.total:
            self.sacked.discard_below(ack)
        if self._lost.total:
            self._lost.discard_below(ack)
        if self.recovery is Recovery.NONE:
            self._duplicates = 0
            if self._limited or flight >= self.cc.cwnd:
                self.cc.acknowledged(count)
                self._limited = False
        else:
            self._advance_in_recovery(ack, count, now)
        self._tail_probed = False
        if self.nxt > ack or self.unsent() > 0:
            self._arm(now)
        else:
            self.rto_at = None

    def _advance_in_recovery(self, ack: int, count: int, now: float) -> None:
        if ack >= self._recover:
            if self.recovery is Recovery.FAST:
                self.cc.cwnd = self.cc.ssthresh
            else:
                self.cc.acknowledged(min(count, self.cc.cwnd))
            self.recovery = Recovery.NONE
            self._duplicates = 0
            while self._resent and self._resent[0].end <= ack:
                self._resent.popleft()
            return
        if self.recovery is Recovery.LOSS:
            self.cc.acknowledged(min(count, self.cc.cwnd))
        elif not self._conn.sack_permitted:
            # The partial ACK names the next hole; what it covers had brought duplicates (RFC 6582 section 3.2 step 3).
            self._duplicates = max(self._duplicates + 1 - count // self.mss, 0)
            self._lost.add(ack, min(ack + self.mss, self.nxt))
            self._retransmit_first(now)
        elif ack >= self._marked_until and now - self._entered_at >= (self.rtt.srtt or 0.0):
            # The retransmission arrived, and what was sent long before it did not: it is lost (as RFC 8985 argues).
            self._mark_until(self._recover)
            self._retransmit_first(now)

    # Loss recovery.

    def _is_loss(self) -> bool:
        """IsLost of the first unacknowledged byte: RFC 6675 section 4 with SACK, RFC 6582 section 3.2 without."""
        if not self._conn.sack_permitted:
            # Duplicates up to here may answer retransmissions that were not needed; then the ACK jumped (section 4.1).
            sure = self.una > self._recover or self._last_step <= 4 * self.mss
            there = self._duplicates * self.mss if sure else 0
        elif self._duplicates >= _DUPLICATE_THRESHOLD or self._lost:
            return True
        else:
            there = self.sacked.total
        if there > (_DUPLICATE_THRESHOLD - 1) * self.mss:
            return True
        if self._tail_probed and self.sacked and self.sacked.highest == self.nxt:
            return True  # the end has arrived, by a probe or at last, and what is before it has not
        # With less than four segments in flight and nothing to follow there cannot be more duplicates (RFC 5827).
        flight = self.flight()
        return self.mss < flight < 4 * self.mss and not self.unsent() and there > 0 and there >= flight - self.mss

    def _enter_fast_recovery(self, now: float) -> None:
        known = self.sacked.highest if self._tail_probed and self.sacked else self.una + self.mss
        self.cc.loss(self.flight())
        self._begin_recovery(Recovery.FAST, now)
        if self._conn.sack_permitted:
            self._mark_until(min(known, self.nxt))
            self._mark_lost(now)
        else:
            self._lost.add(self.una, min(self.una + self.mss, self.nxt))
        self._retransmit_first(now)

    def _begin_recovery(self, recovery: Recovery, now: float) -> None:
        self.recovery = recovery
        self._recover = self.nxt
        self._entered_at = now
        self._tail_probed = False

    def _mark_lost(self, now: float) -> None:
        """Everything below the last two segments' worth of SACKed bytes is lost (RFC 6675, IsLost)."""
        above = 0
        for start, end in reversed(self.sacked):
            above += end - start
            if above > (_DUPLICATE_THRESHOLD - 1) * self.mss:
                self._mark_until(start)
                break
        if self._resent:
            self._mark_lost_again(now)

    def _mark_until(self, limit: int) -> None:
        """What is not SACKed below `limit` is lost. Each byte is marked once; then it is for `_mark_lost_again`."""
        position = max(self._marked_until, self.una)
        while (gap := self.sacked.next_gap(position, limit)) is not None:
            self._lost.add(*gap)
            position = gap[1]
        self._marked_until = max(self._marked_until, limit)

    def _mark_lost_again(self, now: float) -> None:
        """A retransmission is lost when something that was sent after it has arrived (as RFC 8985 argues).

        Sent later are the retransmissions behind it in the list, and new data above what was `nxt` then.
        """
        arrived = self.sacked.highest if self.sacked else self.una
        overtaken = 0
        for index in range(len(self._resent) - 1, -1, -1):
            sent = self._resent[index]
            if arrived > sent.nxt:
                overtaken = index + 1
                break
            # An ACK sooner than any round trip answers the first transmission, which was only late.
            if now - sent.at >= self.rtt.lowest and self._has_arrived(sent):
                overtaken = index
                break
        for _ in range(overtaken):
            sent = self._resent.popleft()
            position = max(sent.start, self.una)
            while (gap := self.sacked.next_gap(position, sent.end)) is not None:
                self._lost.add(*gap)
                position = gap[1]

    def _has_arrived(self, sent: _Resent) -> bool:
        start = max(sent.start, self.una)
        return self.una > sent.start or self.sacked.count_between(start, sent.end) > 0

    def _pipe(self) -> int:
        """An estimate of the bytes still in the network (RFC 6675, SetPipe)."""
        pipe = self.nxt - self.una - self.sacked.total - self._lost.total
        if self._duplicates and self.recovery is not Recovery.LOSS and not self._conn.sack_permitted:
            pipe -= self._duplicates * self.mss  # each says that one segment has left the network
        return pipe if pipe > 0 else 0

    def _retransmit_first(self, now: float) -> None:
        """Send the first hole at once, whatever the congestion window says (RFC 6675 section 5 step 4.3)."""
        if self._lost:
            self._retransmit(self.mss, now)

    def _retransmit(self, most: int, now: float) -> None:
        """Send the first of what is lost again, at most `most` bytes."""
        start, end = self._lost.first
        count = min(end - start, self.largest, most)
        if self.mss < count < end - start:
            count -= count % self.mss
        self._lost.discard_below(start + count)
        if self._conn.sack_permitted:
            self._resent.append(_Resent(start, start + count, self.nxt, now))
        if start == self.una:
            self.rto_at = None  # it starts again: the first hole has its chance
        self._send(start, count, now)

    def _transmit_in_recovery(self, now: float) -> None:
        while (room := self.cc.cwnd - self._pipe()) >= self.mss:
            if self._lost:
                self._retransmit(room, now)
            elif not self._send_new(min(room, self.wnd - self.flight()), now):
                return

    def timed_out(self, now: float) -> bool:
        """The retransmission (or persist) timer expired. False when the peer is given up."""
        self.rto_at = None
        if self._tail_probe:
            self._probe_tail(now)
            return True
        self.retries += 1
        if self.retries == 1:  # into a shut window nothing was sent that should have been acknowledged
            self._give_up_at = self._conn.user_timeout + (now - self.rtt.rto if self.wnd else now)
        elif self.retries > self._conn.stack.settings.data_retries or now >= self._give_up_at:
            return False
        self.rtt.back_off()
        if self.flight() and self.wnd:
            self._restart_from_una(now)
        else:
            self._probe(now)
        if self.rto_at is not None and self.rto_at > self._give_up_at:
            self.rto_at = self._give_up_at
            self._conn.arm(self.rto_at)
        return True

    def _probe_tail(self, now: float) -> None:
        """Send the next segment, or the last one again, so that the ACK tells what is missing (RFC 8985 section 7)."""
        self._tail_probed = True
        if not self._send_new(min(self.mss, self.wnd - self.flight()), now):
            start = max(self.una, self.nxt - self.mss)
            self._send(start, self.nxt - start, now)

    def _probe(self, now: float) -> None:
        """One octet into a shut window, what fits into a silly one (RFC 9293 sections 3.8.6.1 and 3.8.6.2.1)."""
        if self.flight():
            self._send(self.una, 1, now)
        elif self.unsent() > 0:
            self._probing = self.wnd == 0
            self._send(self.nxt, min(max(self.wnd, 1), self.mss, self.unsent()), now)

    def _end_probing(self, ack: int) -> None:
        """The window is open again. An octet that the peer did not take was never sent, else it would be a hole."""
        self._probing = False
        self.rtt.restore()
        if ack == self.una and self.flight() == 1:
            self.nxt = self.una
            self._timed_seq = None
            self.rto_at = None

    def _restart_from_una(self, now: float) -> None:
        self.cc.time_out(self.flight(), self.retries > 1)
        self._begin_recovery(Recovery.LOSS, now)
        self._duplicates = 0
        self.sacked.clear()  # the receiver may have dropped what it SACKed (RFC 2018 section 8)
        self._forget_marks()
        self._mark_until(self.nxt)
        self._transmit_in_recovery(now)

    def _forget_marks(self) -> None:
        self._lost.clear()
        self._resent.clear()
        self._marked_until = self.una

    def resize(self, mss: int, largest: int, now: float) -> None:
        """The path takes only `mss` bytes of payload now (RFC 1191): send the flight again in smaller segments."""
        self.mss = self.cc.mss = mss
        self.largest = largest
        if not self.flight():
            return
        if self.recovery is Recovery.NONE:
            self._begin_recovery(Recovery.FAST, now)  # no sign of congestion: the window stays
            self.cc.ssthresh = min(self.cc.ssthresh, self.cc.cwnd)
        self._forget_marks()
        self._mark_until(self.nxt)
        self._transmit_in_recovery(now)
