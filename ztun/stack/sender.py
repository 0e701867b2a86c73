"""The sending half of a connection: windows, retransmission, loss recovery.

Loss recovery follows RFC 6675 with SACK and RFC 6582 without. Sequence numbers are full integers.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from ztun.stack.congestion import NewReno
from ztun.stack.ranges import RangeSet
from ztun.stack.recovery import LossRecovery, Recovery
from ztun.stack.rto import RttEstimator
from ztun.stack.sendqueue import Bytes, SendQueue
from ztun.wire import tcp

if TYPE_CHECKING:
    from ztun.stack.connection import Connection

_MAX_ACK_DELAY: Final = 0.2  # of a client, in seconds (RFC 8985 section 7.2)
_TICK: Final = 0.005  # for what a busy machine takes to answer
_PUSHED: Final = tcp.ACK | tcp.PSH
_NOTHING: Final = RangeSet()


class _Timer(Enum):
    """What `rto_at` is the time of."""

    RTO = 0  # retransmission, or a probe of a shut window
    TAIL = 1  # a tail loss probe
    REORDERING = 2  # what was overtaken will be lost; the retransmission timer runs beside it


class Sender:
    """una: oldest unacknowledged; nxt: next to send; wnd: the peer's window; mss: payload of a full segment.

    loss: what is known of holes in the flight, and None while there is no sign of any. What has to outlive it stands
    here: recover_from and recover, the ends of the latest recovery (RFC 6582); patience, how many quarters of a round
    trip what was overtaken may still take, 0 while nothing was ever seen to be (RFC 8985); calm, the recoveries since
    it grew.
    """

    __slots__ = (
        "_conn", "_give_up_at", "_limited", "_probing", "_retransmit_at", "_timed_at", "_timed_from",
        "_timed_seq", "_timer", "calm", "cc", "fin_queued", "has_sack", "largest", "last_send",
        "last_step", "limit", "loss", "max_wnd", "mss", "nxt", "patience", "queue", "recover", "recover_from",
        "retransmits", "retries", "rto_at", "rtt", "una", "wl1", "wl2", "wnd",
    )  # fmt: skip

    def __init__(self, conn: Connection, first: int, mss: int) -> None:
        settings = conn.stack.settings
        self._conn = conn
        self.queue = SendQueue(first, conn.stack.pool, conn.stack.memory)
        self.una = self.nxt = first
        self.mss = mss
        self.largest = mss
        self.limit = settings.send_buffer
        self.has_sack = conn.sack_permitted
        self.wnd = 0
        self.max_wnd = 0  # the largest that the peer ever had: MAX.SND.WND
        self._probing = False  # the one octet in flight was sent into a shut window
        self.cc = NewReno(mss)
        self.rtt = RttEstimator(settings.initial_rto, settings.min_rto, settings.max_rto)
        self.loss: LossRecovery | None = None
        self.recover = self.recover_from = first - 1
        self.patience = self.calm = 0
        self.fin_queued = False
        self.rto_at: float | None = None  # when the timer below expires
        self._timer = _Timer.RTO
        self._retransmit_at = 0.0  # when it does for _Timer.RTO, while it is set to something sooner
        self.retries = 0
        self._give_up_at = 0.0  # when the user time-out is over; counts from the first retransmission's segment on
        self.retransmits = 0
        self.last_send = 0.0
        self.wl1 = self.wl2 = 0
        self.last_step = 0  # how far the latest new ACK went
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
        if self.loss is not None and queued:
            return self._room_beside_holes(self.loss, queued)
        window = self.cc.cwnd
        if self.wnd < window:
            window = self.wnd
        if self.limit < window:
            window = self.limit
        room = window - queued
        if room >= self.largest:
            return self.largest
        self._limited = self.cc.cwnd <= self.wnd
        if room < self.mss:
            return 0 if queued else self.mss
        return 0 if queued and room < window // 4 else room - room % self.mss

    def has_holes(self) -> bool:
        """The peer misses something, as far as its ACKs can tell: each of them may make room, also one that repeats."""
        return self.loss is not None

    @property
    def sacked(self) -> RangeSet:
        """What the peer has of the flight beyond the first hole."""
        return _NOTHING if self.loss is None else self.loss.board.sacked

    def _room_beside_holes(self, loss: LossRecovery, queued: int) -> int:
        """New data keeps the ACKs coming before loss is certain (RFC 3042) and when there is nothing left to
        retransmit (RFC 6675 section 4, NextSeg 2)."""
        unsent = self.queue.end - self.nxt
        room = min(self.cc.cwnd - loss.pipe() - unsent, self.wnd - queued, self.limit - queued, self.largest)
        return max(room - room % self.mss, 0)

    def push(self, data: Bytes, owner: memoryview | None, now: float) -> None:
        """Queue bytes and send what the windows allow."""
        nxt, flight = self.nxt, self.nxt - self.una
        if not flight and now - self.last_send > self.rtt.rto:
            self.cc.restart()
        queue = self.queue
        size = len(data)
        if (
            nxt == queue.end
            and not self.fin_queued
            and self.loss is None
            and size <= self.largest
            and flight + size <= self.cc.cwnd
            and flight + size <= self.wnd
        ):  # it leaves as it is, as nearly everything does
            queue.append(data, owner)
            if self._timed_seq is None:
                self._timed_from, self._timed_seq, self._timed_at = nxt, nxt + size, now
            self.nxt = nxt + size
            self._conn.emit(nxt, _PUSHED, size, [data], now)
            self.last_send = now
            if self.rto_at is None:
                self._arm(now)
            return
        queue.append(data, owner)
        self.transmit(now)

    # Sending.

    def flight(self) -> int:
        return self.nxt - self.una

    def transmit(self, now: float) -> None:
        """Send everything that may be sent now."""
        loss = self.loss
        if loss is not None and loss.state is not Recovery.NONE:
            loss.transmit(now)
        else:
            out = 0 if loss is None else self.nxt - self.una - loss.pipe()  # has left the network (RFC 3042)
            while self.nxt < self.queue.end or self.fin_queued:
                flight = self.nxt - self.una
                room = self.cc.cwnd - flight + out
                if self.wnd - flight < room:
                    room = self.wnd - flight
                if not self.send_new(room, now):
                    break
        if self.rto_at is None and self.unsent() > 0:
            self._arm(now)  # a closed window: the timer becomes the persist timer (RFC 9293 section 3.8.6.1)

    def unsent(self) -> int:
        """Bytes, and the FIN, that were never sent."""
        return self.queue.end + self.fin_queued - self.nxt

    def send_new(self, room: int, now: float) -> bool:
        """Send one segment of new data within `room` bytes. False when there is none, or it is not worth a segment."""
        unsent = self.queue.end - self.nxt
        if unsent <= 0:
            if room > 0 and self.unsent() == 1:
                self.send(self.nxt, 1, now)
            return False
        count = min(unsent, room, self.largest)
        # Silly window avoidance (RFC 9293 section 3.8.6.2.1): what is less than a segment waits, unless it is all there
        # is or half of the largest window the peer ever had.
        if count <= 0 or (count < unsent and count < self.mss and 2 * count < self.max_wnd):
            self._limited = self.cc.cwnd <= self.wnd
            return False
        if self.mss < count < unsent:
            count -= count % self.mss
        if count == unsent and self.fin_queued and count < room:
            count += 1
        self.send(self.nxt, count, now)
        return True

    def send(self, seq: int, count: int, now: float) -> None:
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
            if end > self._timed_from or not self.has_sack:
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
        self._timer = _Timer.RTO
        flight = self.nxt - self.una
        if self.loss is None and self.has_sack and rtt.srtt is not None and self.wnd and flight and not rtt.backed_off:
            # RFC 8985 section 7.2; a single segment's ACK may be delayed.
            probe = 2 * rtt.srtt + (_MAX_ACK_DELAY if flight <= self.mss else _TICK)
            if probe < wait:
                wait = probe
                self._timer = _Timer.TAIL
        self.rto_at = wait = now + wait
        if wait < self._conn.armed:
            self._conn.arm(wait)

    def _stop_timer(self) -> None:
        self.rto_at = None

    def _arm_for_reordering(self, due: float) -> None:
        """Let the timer expire at `due` if that is before the time of retransmission."""
        assert self.rto_at is not None
        if self._timer is not _Timer.REORDERING:
            self._retransmit_at = self.rto_at
            self._timer = _Timer.RTO
        if due < self._retransmit_at:
            self._timer = _Timer.REORDERING
            self.rto_at = due
            self._conn.arm(due)
        else:
            self._timer = _Timer.RTO
            self.rto_at = self._retransmit_at

    def stamp(self, now: float) -> int | None:
        """What a segment sent now says as its TSval; None without timestamps."""
        return self._conn.stamp(now) if self._conn.timestamps else None

    # What the peer says.

    def set_window(self, window: int, seq: int, ack: int) -> None:
        """Take the peer's window unless the segment is older than the one that set it (RFC 9293 section 3.10.7.4)."""
        if seq > self.wl1 or (seq == self.wl1 and ack >= self.wl2):
            self.wnd = window
            if window > self.max_wnd:
                self.max_wnd = window
            self.wl1, self.wl2 = seq, ack

    def acknowledge(
        self, ack: int, empty: bool, same_window: bool, sack: tuple[tuple[int, int], ...], now: float
    ) -> None:
        """Process an acceptable ACK. empty: the segment had neither data nor FIN."""
        if ack > self.una or self.wnd == 0:
            self.retries = 0
        if self._probing and (ack > self.una or self.wnd):
            self._end_probing(ack)
        loss = self.loss
        if loss is None and not sack and ack > self.una:
            self._advance(ack, now)
        else:
            self._acknowledge_in_doubt(ack, empty and same_window, sack, now)
        if self.queue.end + self.fin_queued > self.nxt:
            self.transmit(now)

    def advance(self, ack: int, now: float) -> None:
        """`acknowledge`, when it is known to be new, there is no sign of holes, and the window is open."""
        self.retries = 0
        if self._probing:
            self._end_probing(ack)
        self._advance(ack, now)
        if self.queue.end + self.fin_queued > self.nxt:
            self.transmit(now)

    def _acknowledge_in_doubt(self, ack: int, duplicate: bool, sack: tuple[tuple[int, int], ...], now: float) -> None:
        duplicate = duplicate and ack == self.una
        loss = self.loss
        if loss is None:
            if not sack and (self.has_sack or not duplicate):
                return  # it says nothing but its window
            loss = self.loss = LossRecovery(self)
        if ack > self.una:
            self._advance(ack, now)
        loss.acknowledge(ack, duplicate, sack, now)
        if loss.is_over():
            self.loss = None
        if loss.due is not None and self.rto_at is not None:
            self._arm_for_reordering(loss.due)
        elif self._timer is _Timer.REORDERING and self.rto_at is not None:
            self.rto_at, self._timer = self._retransmit_at, _Timer.RTO

    def take_sample(self, start: int, end: int, now: float) -> None:
        """[start, end) has arrived: with it maybe what is being timed."""
        if self._timed_seq is not None and start < self._timed_seq <= end:
            self.rtt.sample(now - self._timed_at)
            self._timed_seq = None

    def end_back_off(self, elapsed: float, now: float) -> None:
        """After a time-out an ACK has brought progress. elapsed: since what it echoes was sent, in seconds.

        When the answer to the first transmission was lost, the wait for the second one is part of that time, and the
        time-out would grow with each such case. So it counts from the second one, if that can have been answered; and
        it is never more than the time-out.
        """
        if self.loss is not None and 0.9 * self.rtt.lowest < now - self.loss.timed_out_at < elapsed:
            elapsed = now - self.loss.timed_out_at
        self.rtt.restore()
        self.rtt.sample(min(elapsed, self.rtt.rto))

    def _advance(self, ack: int, now: float) -> None:
        count = self.last_step = ack - self.una
        flight = self.nxt - self.una
        if self._timed_seq is not None and ack >= self._timed_seq:
            self.rtt.sample(now - self._timed_at)
            self._timed_seq = None
        self.una = ack
        end = self.queue.end
        self.queue.acknowledge(ack if ack < end else end)
        if self.nxt > ack or end + self.fin_queued > self.nxt:
            self._arm(now)
        else:
            self.rto_at = None
        if self.loss is not None:
            self.loss.advance(ack, count, flight, now)
        elif self._limited or flight >= self.cc.cwnd:
            self.cc.acknowledged(count)
            self._limited = False

    def grow(self, count: int, flight: int) -> None:
        """`count` bytes were acknowledged outside of a recovery, of `flight` that were under way."""
        if self._limited or flight >= self.cc.cwnd:
            self.cc.acknowledged(count)
            self._limited = False

    # Time.

    def timed_out(self, now: float) -> bool:
        """The retransmission (or persist) timer expired. False when the peer is given up."""
        self._stop_timer()
        if self._timer is _Timer.REORDERING:
            self._wait_no_longer(now)
            return True
        self._timed_seq = None  # an ACK that is lost must not count as a slow one
        if self._timer is _Timer.TAIL:
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

    def _wait_no_longer(self, now: float) -> None:
        """What was overtaken some time ago is lost (RFC 8985 section 6.3)."""
        self.rto_at, self._timer = max(self._retransmit_at, now), _Timer.RTO
        self._conn.arm(self.rto_at)
        if self.loss is not None:
            self.loss.time_passed(now)
            if self.loss.due is not None:
                self._arm_for_reordering(self.loss.due)

    def _probe_tail(self, now: float) -> None:
        """Send the next segment, or the last one again, so that the ACK tells what is missing (RFC 8985 section 7)."""
        loss = self.loss = LossRecovery(self)
        loss.probe_end = self.nxt
        if not self.send_new(min(self.mss, self.wnd - self.flight()), now):
            loss.probe_resent = True
            start = max(self.una, self.nxt - self.mss)
            self.send(start, self.nxt - start, now)
        else:
            loss.probe_end = self.nxt

    def _probe(self, now: float) -> None:
        """One octet into a shut window, what fits into a silly one (RFC 9293 sections 3.8.6.1 and 3.8.6.2.1)."""
        if self.flight():
            self.send(self.una, 1, now)
        elif self.unsent() > 0:
            self._probing = self.wnd == 0
            self.send(self.nxt, min(max(self.wnd, 1), self.mss, self.unsent()), now)

    def _end_probing(self, ack: int) -> None:
        """The window is open again. An octet that the peer did not take was never sent, else it would be a hole."""
        self._probing = False
        self.rtt.restore()
        if ack == self.una and self.flight() == 1:
            self.nxt = self.una
            self._timed_seq = None
            self.rto_at = None

    def _restart_from_una(self, now: float) -> None:
        if self.loss is None:
            self.loss = LossRecovery(self)
        self.loss.enter_loss(self.retries > 1, now)

    def resize(self, mss: int, largest: int, now: float) -> None:
        """The path takes only `mss` bytes of payload now (RFC 1191): send the flight again in smaller segments."""
        self.mss = self.cc.mss = mss
        self.largest = largest
        if not self.flight():
            return
        if self.loss is None:
            self.loss = LossRecovery(self)
        self.loss.enter_smaller(now)
