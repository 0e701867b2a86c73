"""One TCP connection with a client (RFC 9293), from its SYN to its end.

The client always opens. The connection stays in DIALING until the application says `accept` or `refuse`, so that the
client learns the truth about the far end (the SYN is answered only then).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ztun.stack.arrivals import Arrivals
from ztun.stack.handler import Handler
from ztun.stack.receiver import Receiver
from ztun.stack.sender import Sender
from ztun.stack.sendqueue import Bytes
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
)
from ztun.stack.timers import NEVER
from ztun.wire import tcp
from ztun.wire.handshake import Offer, Terms
from ztun.wire.icmp import Reason
from ztun.wire.sequence import MASK, unwrap
from ztun.wire.tcp import ACK, FIN, SYN

if TYPE_CHECKING:
    from ztun.stack.stack import Stack

_FIN_WINDOW: Final = 512  # of a segment that asks for nothing


class Connection(Arrivals):
    """key: source and destination address, source and destination port of the client's packets, as on the wire;
    iss: our initial sequence number; stamp_offset: what is added to the clock for TSval, in milliseconds."""

    __slots__ = (
        "armed",
        "sent",
        "syn",
        "timer",
        "user_timeout",
    )  # fmt: skip

    def __init__(
        self,
        stack: Stack,
        key: bytes,
        iss: int,
        stamp_offset: int,
        syn: bytes,
        seq: int,
        options: tcp.Options,
        window: int,
        now: float,
    ) -> None:
        super().__init__(stack, key, iss, stamp_offset, seq, options)
        self.syn = syn  # the client's packet, to quote in an ICMP error; of an offloaded connection, our answer
        self.state = DIALING
        self.handler = None
        own_scale = self._own_scale()
        self.tx = Sender(self, iss + 1, self._payload_size())
        self.tx.set_window(window, seq, 0)
        capacity = min(stack.settings.receive_buffer, 0xFFFF << own_scale)
        self.rx = Receiver(seq + 1, capacity, own_scale, self._payload_size())
        self._set_sizes()
        self.user_timeout = stack.settings.user_timeout  # seconds; the application may change it (RFC 9293 MUST-21)
        self._stamp_recent_at = now
        self.last_heard = now
        self.last_data = now
        self.received = 0
        self.sent = 0
        self.armed = NEVER
        self.timer = 0
        self._syn_at = None
        self._idle_at = NEVER
        self._opened_at = now
        self._probes = 0

    # Facts.

    @property
    def is_closed(self) -> bool:
        return self.state is CLOSED

    @property
    def is_established(self) -> bool:
        """The client answered our SYN-ACK, some time."""
        return self.state is not DIALING and self.state is not SYN_RECEIVED

    @property
    def is_half_open(self) -> bool:
        """Whether the client has yet to answer our SYN-ACK."""
        if self.state is OFFLOADED:
            return self._syn_at is not None
        return self.state is DIALING or self.state is SYN_RECEIVED

    def is_in_flight(self, seq: int) -> bool:
        """Whether we sent this sequence number and its ACK has not come. seq: as on the wire."""
        if self.state is SYN_RECEIVED:
            return seq == self.iss & MASK
        return self.tx.una <= unwrap(seq, self.tx.una) < self.tx.nxt

    def quiescent(self) -> bool:
        """Nothing is unacknowledged either way, so that the flow could be handed to the kernel."""
        return self.state is ESTABLISHED and not (
            self.tx.flight()
            or self.tx.queue.end > self.tx.nxt
            or self.rx.unacknowledged
            or self.rx.reassembly
            or self.rx.held
        )

    @property
    def queued(self) -> int:
        """Bytes given to `send` that the client has not acknowledged."""
        return self.tx.queue.end - self.tx.queue.start

    def room(self) -> int:
        """How many bytes `send` would put on the way at once."""
        if self.state is not ESTABLISHED and self.state is not CLOSE_WAIT:
            return 0
        room, memory = self.tx.room(), self.stack.memory
        if memory.used < memory.limit or not room:
            return room
        return 0 if self.queued else min(room, memory.allowance(2 * self.tx.mss))

    # What the application asks for.

    def accept(self, handler: Handler, now: float) -> None:
        """The outbound is connected: answer the SYN. Without effect when the client gave up (`is_closed`)."""
        if self.state is not DIALING:
            return
        self.handler = handler
        self.syn = b""
        self.state = SYN_RECEIVED
        self._send_syn_ack(now)

    def offer(self) -> Offer:
        """What the client's SYN said, for somebody who may take the connection over."""
        said = (
            self.key,
            self.rx.nxt & MASK,
            self.client_mss,
            self.scale if self._scaled else None,
            self.sack_permitted,
            self.stamp_recent if self.timestamps else None,
        )
        return tuple.__new__(Offer, said)  # past a function that is interpreted

    def hand_over(self, handler: Handler, terms: Terms, now: float) -> None:
        """Answer the SYN on the terms of somebody else, who carries all segments from now on.

        What still comes here are SYNs, which are answered again, and what nobody could carry. It counts as half-open
        until `heard`; `conclude` or `abort` is its end. Without effect when the client gave up (`is_closed`).
        """
        if self.state is not DIALING:
            return
        self.handler = handler
        self.state = OFFLOADED
        self.timestamps = terms.stamps
        self.iss = terms.number - 1
        self.tx.una = self.tx.nxt = terms.number
        options = tcp.pack_options(
            tcp.Options(
                mss=min(terms.mss, self._own_mss()),
                window_scale=terms.scale,
                sack_permitted=terms.sack,
                timestamps=(self.stamp(now), self.stamp_recent) if terms.stamps else None,
            )
        )
        self.syn = self.header.pack(self.iss, self.rx.nxt, SYN | ACK, min(terms.window, 0xFFFF), options, 0)
        self.stack.outbox.append((self.syn,))
        self._syn_at = now

    def heard(self) -> None:
        """The client has answered `hand_over`, or even more. Idempotent."""
        if self.state is OFFLOADED and self._syn_at is not None:
            self._syn_at = None
            self.stack.established(self)

    def repeat_answer(self) -> None:
        """The client has not been heard since `hand_over`: it may not have got our SYN-ACK."""
        if self.state is OFFLOADED:
            self.stack.outbox.append((self.syn,))

    def say_fin(self, stamps: tuple[int, int] | None) -> None:
        """Tell the client that nothing more will come, in the name of who carries. stamps: value and echo."""
        if self.state is OFFLOADED:
            options = b"" if stamps is None else tcp.TIMESTAMPS.pack(tcp.TIMESTAMP_LEAD, *stamps)
            self.stack.outbox.append((self.header.pack(self.tx.nxt, self.rx.nxt, FIN | ACK, _FIN_WINDOW, options, 0),))

    def catch_up(self, sent: int, received: int, una: int, nxt: int, rcv_nxt: int, last_data: float) -> None:
        """Tell what was carried so far. sent, received: bytes of payload; una: what the client has acknowledged; nxt,
        rcv_nxt: the numbers behind what was sent to it, and behind what it sent."""
        if self.state is OFFLOADED:
            self.sent, self.received, self.last_data = sent, received, last_data
            self.tx.una, self.tx.nxt, self.rx.nxt = una, nxt, rcv_nxt

    def conclude(self, how: Closed, now: float) -> None:
        """It came to an end where it was carried: nothing is left to be said."""
        if self.state is OFFLOADED:
            self._finish(how, now)

    def refuse(self, now: float, reason: Reason | None = None) -> None:
        """The outbound is not to be had. reason: an ICMP error to send in place of a RST."""
        if self.state is not DIALING:
            return
        if reason is None:
            self._emit_reset(0, self.rx.nxt)
            self._finish(Closed.REFUSED, now)
        else:
            self.stack.send_unreachable(self.syn, reason, now)
            self._finish(Closed.UNREACHABLE, now)

    def send(self, data: Bytes, now: float, owner: memoryview | None = None, last: bool = False) -> None:
        """Send bytes. owner: the pool's buffer that `data` lies in; it goes back to the pool once acknowledged.

        last: `shutdown` follows, so that the FIN can share the last segment. Without effect when our side is closed.
        """
        if self.state is not ESTABLISHED and self.state is not CLOSE_WAIT:
            if owner is not None:
                self.stack.pool.release(owner)
            return
        self.sent += len(data)
        self.last_data = now
        if last:
            self.state = FIN_WAIT_1 if self.state is ESTABLISHED else LAST_ACK
            self.tx.fin_queued = True
        self.tx.push(data, owner, now)

    def consumed(self, count: int, now: float) -> None:
        """The handler passed on `count` of the bytes that it had kept."""
        self.rx.held -= count
        self._charge()
        if self.rx.window_grew() and self.state in (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2):
            self._emit_ack(now)

    def shutdown(self, now: float) -> None:
        """No more data from our side: FIN after what is queued."""
        if self.state is ESTABLISHED:
            self.state = FIN_WAIT_1
        elif self.state is CLOSE_WAIT:
            self.state = LAST_ACK
        else:
            return
        self.tx.fin_queued = True
        self.tx.transmit(now)

    def abort(self, now: float, how: Closed = Closed.ABORTED) -> None:
        """Reset the connection. Without a RST when both ends have closed and all is said (RFC 9293 section 3.10.5)."""
        if self.state is CLOSED:
            return
        if self.state is DIALING:
            self._emit_reset(0, self.rx.nxt)
        elif self.state is OFFLOADED:
            for number in {self.tx.una, self.tx.nxt}:  # nobody knows what of the rest the client has got
                self._emit_reset(number, self.rx.nxt)
        elif self.tx.unsent() or self.state not in (CLOSING, LAST_ACK):
            options = self._stamp_option(now) if self.timestamps else b""  # RFC 7323 section 3.2
            self._emit_reset(self.tx.nxt, self.rx.nxt, options)
        self._finish(how, now)

    # The SYN-ACK.

    def _send_syn_ack(self, now: float) -> None:
        options = tcp.pack_options(
            tcp.Options(
                mss=self._own_mss(),
                window_scale=self.rx.scale if self._scaled else None,
                sack_permitted=self.sack_permitted,
                timestamps=(self.stamp(now), self.stamp_recent) if self.timestamps else None,
            )
        )
        window = min(self.rx.window(), 0xFFFF)
        self.rx.edge = self.rx.nxt + window  # the window of a SYN is never scaled (RFC 7323 section 2.2)
        self.stack.outbox.append((self.header.pack(self.iss, self.rx.nxt, SYN | ACK, window, options, 0),))
        if self._syn_at is None:
            self._opened_at = now
        self._syn_at = now + self.tx.rtt.rto
        self.arm(self._syn_at)

    # Time.

    def arm(self, when: float) -> None:
        if when < self.armed:
            self.stack.timers.arm(self, when)

    def deadline(self) -> float:
        """The earliest of all that this connection waits for."""
        when = self._idle_at
        for at in (self.tx.rto_at, self.rx.ack_at, self._syn_at):
            if at is not None and at < when:
                when = at
        return when

    def expired(self, now: float) -> None:
        """Do everything whose time has come."""
        if self.state is CLOSED:
            return
        if self.rx.ack_at is not None and self.rx.ack_at <= now:
            self._emit_ack(now)
        if self._syn_at is not None and self._syn_at <= now:
            self._repeat_syn_ack(now)
        elif self.tx.rto_at is not None and self.tx.rto_at <= now and not self.tx.timed_out(now):
            self.abort(now, Closed.TIMED_OUT)
        if self._idle_at <= now and not self.is_closed:
            self._check_idle(now)

    def flush_ack(self, now: float) -> None:
        """End of a batch: acknowledge now, or within the delayed-ACK time (RFC 9293 section 3.8.6.3)."""
        rx = self.rx
        rx.scheduled = False
        if self.state is CLOSED:
            return
        if rx.ack_now:
            self._emit_ack(now)
        elif rx.unacknowledged and rx.ack_at is None:
            rx.ack_at = now + self.stack.settings.delayed_ack
            self.arm(rx.ack_at)

    def _repeat_syn_ack(self, now: float) -> None:
        self.tx.retries += 1
        if self.tx.retries > self.stack.settings.syn_retries:
            self.abort(now, Closed.TIMED_OUT)
            return
        self.tx.rtt.back_off()
        self._send_syn_ack(now)

    def _check_idle(self, now: float) -> None:
        """Keep-alive (RFC 9293 section 3.8.4), the idle time-out, and the end of FIN-WAIT-2."""
        settings = self.stack.settings
        limit = settings.fin_wait_2 if self.state is FIN_WAIT_2 else settings.tcp_idle
        if self.last_data + limit <= now or self._probes >= settings.keepalive_probes:
            self.stack.keepalive["given_up"] += self._probes >= settings.keepalive_probes
            self.abort(now, Closed.TIMED_OUT)
            return
        following = self.last_heard + settings.keepalive_idle
        if self.tx.flight() or self.tx.unsent():
            following = max(following, now + settings.keepalive_interval)  # what is outstanding asks in its place
        elif following <= now or self._probes:
            self._probes += 1
            self.stack.keepalive["probes"] += 1
            self.emit(self.tx.nxt - 1, ACK, 0, [], now)
            following = now + settings.keepalive_interval
        self._idle_at = min(following, self.last_data + limit)

    # Ends.

    def _enter_time_wait(self, now: float) -> None:
        self.stack.keep_in_time_wait(self, now)
        self._finish(Closed.FINISHED, now)

    def _finish(self, how: Closed, now: float) -> None:
        half_open = self.is_half_open
        self.state = CLOSED
        self._idle_at = NEVER
        self._syn_at = self.tx.rto_at = self.rx.ack_at = None
        self.tx.queue.clear()
        self.stack.timers.cancel(self)
        self.stack.forget(self, half_open)
        if self.handler is not None:
            self.handler.closed(how, now)
