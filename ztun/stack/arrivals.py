"""What a client's segments do to a connection (RFC 9293 section 3.10.7)."""

from __future__ import annotations

from typing import Final

from ztun.stack.handler import Handler
from ztun.stack.receiver import NO_PIECES
from ztun.stack.segments import Segments
from ztun.stack.state import (
    CLOSE_WAIT,
    CLOSED,
    CLOSING,
    DIALING,
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    LAST_ACK,
    OFFLOADED,
    SYN_RECEIVED,
    Closed,
    State,
)
from ztun.wire import tcp
from ztun.wire.sequence import MASK, unwrap
from ztun.wire.tcp import ACK, FIN, RST, SYN

_EXCEPTIONS: Final = ACK | RST | SYN  # of these, the short way takes only ACK
_OPEN: Final = (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, LAST_ACK)  # likeliest first
_PAWS_IDLE: Final = 24 * 86400.0  # RFC 7323 section 5.5: an idle connection's TS.Recent is no longer trusted


class Arrivals(Segments):
    """The receiving of one connection. A base of `Connection`, as `Segments` is, and for the same reason."""

    __slots__ = (
        "_idle_at",
        "_opened_at",
        "_probes",
        "_stamp_recent_at",
        "_syn_at",
        "handler",
        "last_data",
        "last_heard",
        "received",
        "state",
    )  # fmt: skip

    state: State
    handler: Handler | None
    _idle_at: float
    _opened_at: float
    _probes: int
    _stamp_recent_at: float
    _syn_at: float | None
    last_data: float
    last_heard: float
    received: int

    # What Connection has.

    @property
    def is_closed(self) -> bool:
        raise NotImplementedError

    def arm(self, when: float) -> None:
        raise NotImplementedError

    def flush_ack(self, now: float) -> None:
        raise NotImplementedError

    def _send_syn_ack(self, now: float) -> None:
        raise NotImplementedError

    def _enter_time_wait(self, now: float) -> None:
        raise NotImplementedError

    def repeat_answer(self) -> None:
        raise NotImplementedError

    def _finish(self, how: Closed, now: float) -> None:
        raise NotImplementedError

    # Segments in.

    def receive(
        self, seq: int, ack: int, bits: int, window: int, packet: memoryview, start: int, end: int, now: float
    ) -> bool:
        """Take one segment. seq, ack, bits, window: header fields in host order; start, end: of the TCP header and
        payload in `packet`. Returns True when a view of the packet's buffer was kept.

        Nearly all are the next in line, on a connection that misses nothing: for them a few comparisons are enough.
        """
        payload = start + (bits >> 10 & 0x3C)
        rx, tx = self.rx, self.tx
        una, nxt = tx.una, rx.nxt
        step = (ack - una) & MASK
        length = end - payload
        if (
            self.state not in _OPEN
            or bits & _EXCEPTIONS != ACK
            or seq != nxt & MASK
            or payload - start != self._usual_header
            or length < 0
            or step > tx.nxt - una
            or not (step or length or bits & FIN)
            or length > rx.edge - nxt
            or rx.fin is not None
            or rx.reassembly is not NO_PIECES
            or tx.loss is not None
            or not window
            or not tx.wnd
            or tx.rtt.backed_off
            or (length and self.stack.memory.used >= self.stack.memory.limit)
        ):
            return self._receive_any(seq, ack, bits, window, packet, start, end, now)
        if self.timestamps:
            lead, value, _ = tcp.TIMESTAMPS.unpack_from(packet, start + 20)
            if lead != tcp.TIMESTAMP_LEAD or (value - self.stamp_recent) & 0x80000000:
                return self._receive_any(seq, ack, bits, window, packet, start, end, now)
            if nxt == self.last_ack_sent:  # RFC 7323 section 4.3
                self.stamp_recent = value
                self._stamp_recent_at = now
        self.last_heard = now
        self._probes = 0
        window <<= self.scale
        grew = window > tx.wnd
        tx.wnd, tx.wl1, tx.wl2 = window, nxt, una + step  # it is next in line, so the newest there is
        if window > tx.max_wnd:
            tx.max_wnd = window
        if step:
            self.last_data = now
            tx.advance(una + step, now)
        elif grew and tx.unsent():
            tx.transmit(now)
        if self.state is ESTABLISHED or self.state is CLOSE_WAIT:
            if step or grew:
                assert self.handler is not None
                self.handler.writable(now)
        elif step:
            self._acknowledged_fin(now)
        if self.state is CLOSED:
            return False
        if bits & FIN:
            return self._take_last(packet, payload, end, now)
        if not length:
            return False
        kept = self._deliver(packet[payload:end], now)
        self._acknowledge_later()
        return kept

    def _take_last(self, packet: memoryview, payload: int, end: int, now: float) -> bool:
        """The next in line, and the FIN behind it."""
        rx = self.rx
        rx.fin = rx.nxt + end - payload
        kept = payload < end and self._deliver(packet[payload:end], now)
        if self.state is not CLOSED:
            self._take_fin(now)
        return kept

    def _receive_any(
        self, seq: int, ack: int, bits: int, window: int, packet: memoryview, start: int, end: int, now: float
    ) -> bool:
        """As `receive`, whatever it is (RFC 9293 section 3.10.7)."""
        payload = start + (bits >> 10 & 0x3C)
        if payload > end or payload < start + 20:
            self.stack.drop("tcp-length")
            return False
        options = tcp.read_options(packet, start, payload)
        if self.state is DIALING or self.state is CLOSED:
            self._receive_while_dialing(seq, bits, options, now)
            return False
        if self.state is OFFLOADED:
            self._receive_while_offloaded(seq, bits, now)
            if self.is_closed:
                self.stack.receive_anew(self.key, seq, ack, bits, window, packet, start, end, now)
            return False
        if not bits & (ACK | RST | SYN):
            self.stack.drop("tcp-flags")
            return False
        seq = unwrap(seq, self.rx.nxt)
        length = end - payload
        if not self._stamps_pass(options, bits, length, now) or not self._is_acceptable(seq, length, bits, now):
            return False
        self.last_heard = now
        self._probes = 0
        if not self._take_ack(unwrap(ack, self.tx.una), seq, bits, window, length, options, now):
            return False
        if self.is_closed:
            return False
        rx = self.rx
        if bits & FIN and (rx.fin is None or seq + length < rx.fin):
            rx.fin = seq + length  # of several, the one that is reached first counts
            rx.reassembly.cut(rx.fin)
            self._charge()
        if rx.fin is not None and length and seq + length > rx.fin:
            length = self._cut_after_fin(seq, now)
        kept = length > 0 and self._take_data(seq, packet[payload : payload + length], now)
        if rx.fin is not None:
            if rx.fin == rx.nxt:
                self._take_fin(now)
            elif bits & FIN and length == 0 and rx.fin > rx.nxt:
                self._emit_ack(now)
        return kept

    def _cut_after_fin(self, seq: int, now: float) -> int:
        """Nothing comes after a FIN (RFC 9293 section 3.10.7.4, seventh check). Returns how many bytes lie before it,
        or -1 for none."""
        rx = self.rx
        assert rx.fin is not None
        self.stack.drop("tcp-after-fin")
        if seq < rx.fin:
            return rx.fin - seq
        if rx.nxt <= rx.fin:
            self._emit_ack(now)  # there is a gap before the FIN
        return -1

    def _receive_while_dialing(self, seq: int, bits: int, options: tcp.Options, now: float) -> None:
        """A repeated SYN waits with the first one. Only a RST ends the wait."""
        if bits & RST and seq in (self.rx.nxt & MASK, (self.rx.nxt - 1) & MASK):
            self._finish(Closed.RESET_BY_CLIENT, now)
        elif bits & SYN and seq == (self.rx.nxt - 1) & MASK and self.timestamps and options.timestamps:
            # The client takes its first round-trip time from the SYN that is echoed: the dial is no part of it.
            self.stamp_recent = options.timestamps[0]

    def _receive_while_offloaded(self, seq: int, bits: int, now: float) -> None:
        """A SYN that comes again has lost its answer; another one begins anew what may be over, unknown to us. All else
        was for somebody who could not carry it."""
        if bits & (SYN | ACK | RST) == SYN and seq == (self.rx.nxt - 1) & MASK:
            self.repeat_answer()
        elif bits & SYN:
            if self.stack.settle is not None:
                self.stack.settle(self)
            if not self.is_closed:
                self._challenge(now)
        else:
            self.stack.drop("tcp-offloaded")

    def _stamps_pass(self, options: tcp.Options, bits: int, length: int, now: float) -> bool:
        """PAWS (RFC 7323 section 5.3). A segment that lacks the agreed option is dropped, a RST aside."""
        if not self.timestamps or bits & RST:
            return True
        if options.timestamps is None:
            if bits & SYN:
                return True
            self.stack.drop("tcp-no-timestamp")
            return False
        value = options.timestamps[0]
        if (value - self.stamp_recent) & 0x80000000 and now - self._stamp_recent_at < _PAWS_IDLE:
            self.stack.drop("tcp-paws")
            if length or bits & FIN:
                self._emit_ack(now)
            else:
                self._challenge(now)  # two ends must not answer each other's ACKs for ever
            return False
        return True

    def _is_acceptable(self, seq: int, length: int, bits: int, now: float) -> bool:
        """The window check, RST and SYN of RFC 9293 section 3.10.7.4, as hardened by RFC 5961."""
        counted = length + (1 if bits & FIN else 0)
        acceptable = self.rx.acceptable(seq, counted)
        if bits & RST:
            self._take_reset(seq, acceptable, now)
            return False
        if bits & SYN:
            if self.state is SYN_RECEIVED and seq == self.rx.nxt - 1 and not bits & ACK:
                self._send_syn_ack(now)
            else:
                self._challenge(now)
            return False
        if acceptable:
            return True
        self.stack.drop("tcp-window")
        if counted and seq + counted <= self.rx.nxt:
            self._emit_ack(now)  # our ACK was lost, or a spurious retransmission
        else:
            self._challenge(now)
        return False

    def _take_reset(self, seq: int, acceptable: bool, now: float) -> None:
        rx = self.rx
        # macOS resets what it has just closed with the number of its FIN, and is slow to answer challenges.
        if seq == rx.nxt or (seq == rx.fin and rx.nxt > seq):
            self._finish(Closed.RESET_BY_CLIENT, now)
        elif acceptable:
            self._challenge(now)
        else:
            self.stack.drop("tcp-reset-window")

    def _take_ack(
        self, ack: int, seq: int, bits: int, window: int, length: int, options: tcp.Options, now: float
    ) -> bool:
        tx = self.tx
        if self.state is SYN_RECEIVED:
            if ack != self.iss + 1:
                self.stack.drop("tcp-ack")
                self._emit_reset(ack, None)
                return False
            self._establish(seq, ack, now)
        elif ack > tx.nxt or ack < max(tx.una - tx.max_wnd, self.iss + 1):
            self.stack.drop("tcp-ack")
            self._challenge(now)
            return False
        # RFC 7323 section 5.3 R3, but after the ACK was believed: whoever guesses a place in the window only shall not
        # poison what is compared with.
        if options.timestamps is not None and seq <= self.last_ack_sent:
            self.stamp_recent = options.timestamps[0]
            self._stamp_recent_at = now
        before = tx.wnd
        una = tx.una
        empty = length == 0 and not bits & FIN
        if ack >= una:
            tx.set_window(window << self.scale, seq, ack)
        sack: tuple[tuple[int, int], ...] = ()
        if options.sack and self.sack_permitted:
            sack = tuple((unwrap(left, una), unwrap(right, una)) for left, right in options.sack)
        if ack > una:
            self.last_data = now
            if tx.loss is not None and self.timestamps:
                tx.loss.echo = options.timestamps[1] if options.timestamps is not None else None
            if tx.rtt.backed_off and options.timestamps is not None and self.timestamps:
                self._measure(options.timestamps[1], now)
        if ack > una or tx.flight() or before != tx.wnd or sack or tx.loss is not None:
            tx.acknowledge(ack, empty, before == tx.wnd, sack, now)
            if self.state is ESTABLISHED or self.state is CLOSE_WAIT:
                if self.handler is not None and (ack > una or tx.wnd > before or tx.has_holes()):
                    self.handler.writable(now)
            else:
                self._acknowledged_fin(now)
        return True

    def _measure(self, echo: int, now: float) -> None:
        """An echoed timestamp tells which transmission was answered, so Karn's doubt ends (RFC 7323 section 4.2)."""
        elapsed = (self.stamp(now) - echo) & MASK
        if elapsed < 60_000:
            self.tx.end_back_off(elapsed / 1000, now)

    def _establish(self, seq: int, ack: int, now: float) -> None:
        self.state = ESTABLISHED
        self._syn_at = None
        self.tx.rto_at = None
        if self.tx.retries == 0:
            self.tx.rtt.sample(now - self._opened_at)
        else:
            self.tx.rtt.begin_after_loss()
            self.tx.cc.cwnd = self.tx.mss  # RFC 5681 section 3.1: the path lost a SYN,ACK
        self.tx.retries = 0
        self.stack.established(self)
        self.last_data = now
        self._idle_at = now + min(self.stack.settings.keepalive_idle, self.stack.settings.tcp_idle)
        self.arm(self._idle_at)
        assert self.handler is not None
        self.handler.established(now)

    def _acknowledged_fin(self, now: float) -> None:
        """Advance when our FIN was acknowledged."""
        if self.tx.unsent() or self.tx.una < self.tx.nxt:
            return
        if self.state is FIN_WAIT_1:
            self.state = FIN_WAIT_2
            self._idle_at = now + self.stack.settings.fin_wait_2
            self.arm(self._idle_at)
        elif self.state is CLOSING:
            self._enter_time_wait(now)
        elif self.state is LAST_ACK:
            self._finish(Closed.FINISHED, now)

    def _take_data(self, seq: int, payload: memoryview, now: float) -> bool:
        rx = self.rx
        if seq != rx.nxt:
            if seq > rx.nxt:
                kept = not self.stack.memory_is_full() and rx.keep(seq, payload[: max(rx.edge - seq, 0)])
                self._charge()
                self._emit_ack(now)  # a gap is told at once (RFC 5681 section 4.2)
                return kept
            payload = payload[rx.nxt - seq :]
        if len(payload) > rx.edge - rx.nxt:
            payload = payload[: max(rx.edge - rx.nxt, 0)]
        memory = self.stack.memory
        if memory.used >= memory.limit:
            payload = self._cut_to_memory(payload)
        if not payload:  # only the FIN is new, or the window is shut and its probe wants an answer
            rx.ack_now = True
            self._acknowledge_later()
            return False
        kept = self._deliver(payload, now)
        if rx.reassembly:
            rx.ack_now = True  # and so is a gap that was filled
            while not self.is_closed and (piece := rx.take_piece()) is not None:
                self._deliver(piece, now)
            self._charge()
        self._acknowledge_later()
        return kept

    def _deliver(self, payload: memoryview, now: float) -> bool:
        rx, size = self.rx, len(payload)
        rx.count(size)
        self.received += size
        self.last_data = now
        assert self.handler is not None
        # Until the handler has said what it keeps, it keeps everything: what it sends meanwhile tells the window.
        rx.held += size
        kept = self.handler.data(payload, now)
        rx.held -= size - kept
        if not kept:
            return False
        self._charge()
        return True

    def _cut_to_memory(self, payload: memoryview) -> memoryview:
        """The connections hold too much: what this one may add. The client keeps the rest and sends it again."""
        allowed = 0 if self.rx.held else self.stack.memory.allowance(2 * self.rx.mss)
        if len(payload) <= allowed:
            return payload
        self.stack.drop("memory-limit")
        return payload[:allowed]

    def _charge(self) -> None:
        """Say how much of what was received is held now."""
        rx = self.rx
        if self.state is not CLOSED:
            held = rx.held + rx.reassembly.cost
            self.stack.memory.used += held - rx.charged
            rx.charged = held

    def _acknowledge_later(self) -> None:
        """The ACK waits for the end of the batch: what the application sends until then carries it."""
        if not self.rx.scheduled:
            self.rx.scheduled = True
            self.stack.ack_later.append(self)

    def _take_fin(self, now: float) -> None:
        """Everything up to the FIN is here."""
        if self.state is ESTABLISHED:
            self.state = CLOSE_WAIT
        elif self.state is FIN_WAIT_1:
            self.state = CLOSING
        elif self.state is not FIN_WAIT_2:
            return
        self.rx.nxt += 1
        self.rx.ack_now = True
        assert self.handler is not None
        if self.state is FIN_WAIT_2:
            self._emit_ack(now)
            self.handler.eof(now)
            if self.state is FIN_WAIT_2:
                self._enter_time_wait(now)
        else:
            self._acknowledge_later()
            self.handler.eof(now)
