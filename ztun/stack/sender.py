"""The sending half of a connection: windows, retransmission, loss recovery.

Loss recovery follows RFC 6675 with SACK and RFC 6582 without. Sequence numbers are full integers.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from ztun.stack.congestion import NewReno
from ztun.stack.ranges import RangeSet
from ztun.stack.rto import RttEstimator
from ztun.stack.sendqueue import SendQueue
from ztun.wire import tcp

if TYPE_CHECKING:
    from ztun.stack.connection import Connection

_DUPLICATE_THRESHOLD = 3
_MAX_RANGES = 2048  # of the SACK scoreboard; only an attacker needs more (compare CVE-2019-11477)


class Recovery(Enum):
    NONE = 0
    FAST = 1  # duplicate ACKs or SACK said so
    LOSS = 2  # the retransmission timer did


class Sender:
    """una: oldest unacknowledged; nxt: next to send; wnd: the peer's window; mss: payload of a full segment."""

    __slots__ = (
        "_conn", "_duplicates", "_high_retransmit", "_limited", "_lost_until", "_recover", "_timed_at", "_timed_seq",
        "_wl1", "_wl2", "cc", "fin_queued", "largest", "last_send", "limit", "mss", "nxt", "queue", "recovery",
        "retransmits", "retries", "rto_at", "rtt", "sacked", "una", "wnd",
    )  # fmt: skip

    def __init__(self, conn: Connection, first: int, mss: int) -> None:
        settings = conn.stack.settings
        self._conn = conn
        self.queue = SendQueue(first, conn.stack.pool)
        self.una = self.nxt = first
        self.mss = mss
        self.largest = mss
        self.limit = settings.send_buffer
        self.wnd = 0
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
        self._recover = first
        self._high_retransmit = first
        self._lost_until = first
        self._timed_seq: int | None = None
        self._timed_at = 0.0
        self._limited = False  # the congestion window, not the application, held data back

    # What the application may do.

    def room(self) -> int:
        """How many bytes can be sent at once. Small gaps are not worth a super-segment while ACKs are on their way."""
        if self.fin_queued or self.recovery is not Recovery.NONE:
            return 0
        window = min(self.cc.cwnd, self.wnd, self.limit)
        room = window - (self.queue.end - self.una)
        if room < self.largest:
            self._limited = self.cc.cwnd <= self.wnd
            if self.queue.end > self.una and room < min(window // 4, self.largest):
                return 0
        return min(room, self.largest)

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
            while self._send_new(min(self.cc.cwnd, self.wnd) - self.flight(), now):
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
            if self.unsent() == 1:
                self._send(self.nxt, 1, now)
            return False
        count = min(unsent, room, self.largest)
        if count <= 0 or (count < unsent and count < self.mss and self.flight()):
            self._limited = True
            return False
        if self.mss < count < unsent:
            count -= count % self.mss
        if count == unsent and self.fin_queued:
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
                self._timed_seq, self._timed_at = end, now
            self.nxt = end
        else:
            self.retransmits += 1
            self._timed_seq = None  # Karn: an ACK could answer either transmission
        views = self.queue.views(seq, payload) if payload else []
        self._conn.emit(seq, flags, payload, views, now)
        self.last_send = now
        if self.rto_at is None:
            self._arm(now)

    def _arm(self, now: float) -> None:
        self.rto_at = now + self.rtt.rto
        self._conn.arm(self.rto_at)

    # What the peer says.

    def set_window(self, window: int, seq: int, ack: int) -> None:
        """Take the peer's window unless the segment is older than the one that set it (RFC 9293 section 3.10.7.4)."""
        if seq > self._wl1 or (seq == self._wl1 and ack >= self._wl2):
            self.wnd = window
            self._wl1, self._wl2 = seq, ack

    def acknowledge(
        self, ack: int, empty: bool, same_window: bool, sack: tuple[tuple[int, int], ...], now: float
    ) -> None:
        """Process an acceptable ACK. empty: the segment had neither data nor FIN."""
        if ack > self.una or self.wnd == 0:
            self.retries = 0
        news = self._take_sack(sack) if sack else False
        if ack > self.una:
            self._advance(ack, now)
        elif self.flight() and empty and (news or (same_window and ack == self.una)):
            self._duplicates += 1
        if self.recovery is not Recovery.FAST and self._is_loss():
            self._enter_fast_recovery()
        if self.recovery is Recovery.FAST:
            self._mark_lost()
        if self.unsent() > 0 or self.recovery is not Recovery.NONE:
            self.transmit(now)

    def _take_sack(self, sack: tuple[tuple[int, int], ...]) -> bool:
        before = self.sacked.total
        for start, end in sack:
            if self.una < start < end <= self.nxt and len(self.sacked) < _MAX_RANGES:
                self.sacked.add(start, end)
        return self.sacked.total > before

    def _advance(self, ack: int, now: float) -> None:
        count = ack - self.una
        flight = self.nxt - self.una
        if self._timed_seq is not None and ack >= self._timed_seq:
            self.rtt.sample(now - self._timed_at)
            self._timed_seq = None
        self.una = ack
        self.queue.acknowledge(min(ack, self.queue.end))
        self._duplicates = 0
        if self.sacked:
            self.sacked.discard_below(ack)
        if self.recovery is Recovery.NONE:
            if self._limited or flight >= self.cc.cwnd:
                self.cc.acknowledged(count)
                self._limited = False
        else:
            self._advance_in_recovery(ack, count)
        self.rto_at = now + self.rtt.rto if self.nxt > ack or self.unsent() > 0 else None
        if self.rto_at is not None:
            self._conn.arm(self.rto_at)

    def _advance_in_recovery(self, ack: int, count: int) -> None:
        if ack >= self._recover:
            if self.recovery is Recovery.FAST:
                self.cc.cwnd = self.cc.ssthresh
            self.recovery = Recovery.NONE
            return
        if self.recovery is Recovery.LOSS:
            self.cc.acknowledged(count)
        elif not self._conn.sack_permitted:
            self._lost_until = ack + self.mss  # a partial ACK names the next hole (RFC 6582 section 3.2 step 3)
        self._high_retransmit = max(self._high_retransmit, ack)

    # Loss recovery.

    def _is_loss(self) -> bool:
        if self.recovery is Recovery.LOSS or self.una < self._recover:
            return False
        if self._duplicates >= _DUPLICATE_THRESHOLD:
            return True
        return self.sacked.total > _DUPLICATE_THRESHOLD * self.mss

    def _enter_fast_recovery(self) -> None:
        self.recovery = Recovery.FAST
        self._recover = self.nxt
        self._high_retransmit = self.una
        self._lost_until = self.una + min(self.mss, self.flight())
        self._timed_seq = None
        self.cc.loss(self.flight())

    def _mark_lost(self) -> None:
        """Everything below the last two segments' worth of SACKed bytes is lost (RFC 6675, IsLost)."""
        above = 0
        for start, end in reversed(self.sacked):
            above += end - start
            if above > (_DUPLICATE_THRESHOLD - 1) * self.mss:
                self._lost_until = max(self._lost_until, start)
                return

    def _pipe(self) -> int:
        """An estimate of the bytes still in the network (RFC 6675, SetPipe)."""
        if not self._conn.sack_permitted and self.recovery is Recovery.FAST:
            return max(self.flight() - self._duplicates * self.mss - self.mss, 0)
        resent = min(self._high_retransmit, self._lost_until)
        pipe = max(resent - self.una, 0) - self.sacked.count_between(self.una, resent)
        alive = max(self._lost_until, self.una)
        return pipe + self.nxt - alive - self.sacked.count_between(alive, self.nxt)

    def _transmit_in_recovery(self, now: float) -> None:
        while True:
            room = self.cc.cwnd - self._pipe()
            if room < self.mss:
                return
            gap = self.sacked.next_gap(max(self._high_retransmit, self.una), min(self._lost_until, self.nxt))
            if gap is None:
                if not self._send_new(min(room, self.wnd - self.flight()), now):
                    return
                continue
            start, end = gap
            count = min(end - start, self.largest, room)
            if count > self.mss and count < end - start:
                count -= count % self.mss
            self._high_retransmit = start + count
            self._send(start, count, now)

    def timed_out(self, now: float) -> bool:
        """The retransmission (or persist) timer expired. False when the peer is given up."""
        self.rto_at = None
        self.retries += 1
        if self.retries > self._conn.stack.settings.data_retries:
            return False
        self.rtt.back_off()
        if not self.flight():
            self._probe(now)
        elif self.wnd == 0:
            self._send(self.una, 1, now)
        else:
            self._restart_from_una(now)
        return True

    def _probe(self, now: float) -> None:
        """One octet into a closed window (RFC 9293 section 3.8.6.1)."""
        if self.unsent() > 0:
            self._send(self.nxt, 1, now)

    def _restart_from_una(self, now: float) -> None:
        self.cc.time_out(self.flight(), self.retries > 1)
        self.recovery = Recovery.LOSS
        self._recover = self.nxt
        self._duplicates = 0
        self._timed_seq = None
        self.sacked.clear()  # the receiver may have dropped what it SACKed (RFC 2018 section 8)
        self._high_retransmit = self.una
        self._lost_until = self.nxt
        self._transmit_in_recovery(now)

    def resize(self, mss: int, largest: int, now: float) -> None:
        """The path takes only `mss` bytes of payload now (RFC 1191): send the flight again in smaller segments."""
        self.mss = self.cc.mss = mss
        self.largest = largest
        if self.flight() and self.recovery is Recovery.NONE:
            self._enter_fast_recovery()
            self._lost_until = self.nxt
            self._transmit_in_recovery(now)
