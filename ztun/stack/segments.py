"""What a connection says: its segments, with the options, the ACK and the window of the moment they are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ztun.stack.header import FlowHeader, FlowKey, reverse
from ztun.stack.sendqueue import Bytes
from ztun.stack.timers import NEVER
from ztun.wire import ip, tcp
from ztun.wire.sequence import MASK, unwrap
from ztun.wire.tcp import ACK, RST

if TYPE_CHECKING:
    from ztun.stack.receiver import Receiver
    from ztun.stack.sender import Sender
    from ztun.stack.stack import Stack

_CHALLENGE_INTERVAL = 0.5  # seconds between challenge ACKs of one flow (RFC 5961 section 7)
_TS_OPTIONS: Final = 12
# RFC 9293 section 3.7.1
_DEFAULT_MSS4: Final = 536
_DEFAULT_MSS6: Final = 1220
_MINIMUM_MTU4: Final = 68  # RFC 791: what every link takes
_MINIMUM_MSS: Final = 88  # smaller offers are attacks on the sender (CVE-2019-11479), not networks


class Segments(FlowKey):
    """The agreed options of one connection and the packets made with them. A base of `Connection`, which sets tx and
    rx; a class of its own costs the segments on their way nothing, a part behind an attribute would."""

    __slots__ = (
        "_challenge_at",
        "_scaled",
        "_usual_header",
        "client_mss",
        "header",
        "iss",
        "last_ack_sent",
        "rx",
        "sack_permitted",
        "scale",
        "stack",
        "stamp_offset",
        "stamp_recent",
        "timestamps",
        "tx",
    )  # fmt: skip

    tx: Sender
    rx: Receiver

    def __init__(self, stack: Stack, key: bytes, iss: int, stamp_offset: int, seq: int, options: tcp.Options) -> None:
        super().__init__(key)
        self.stack = stack
        self.iss = iss
        self.header = FlowHeader(reverse(key), stack.settings.hop_limit, stack.settings.traffic_class)
        self.timestamps = options.timestamps is not None
        self._usual_header = 20 + _TS_OPTIONS if self.timestamps else 20  # bytes, of a segment without other options
        self.sack_permitted = options.sack_permitted
        self.scale = options.window_scale or 0
        self.client_mss = max(options.mss or (_DEFAULT_MSS6 if len(key) == 36 else _DEFAULT_MSS4), _MINIMUM_MSS)
        self._scaled = options.window_scale is not None
        self.stamp_offset = stamp_offset
        self.stamp_recent = options.timestamps[0] if options.timestamps else 0
        self.last_ack_sent = seq + 1
        self._challenge_at = -NEVER

    # Sizes.

    def _own_scale(self) -> int:
        """The smallest window scale with which the receive buffer can be said (RFC 7323 section 2.3)."""
        if not self._scaled:
            return 0
        return min(max(self.stack.settings.receive_buffer.bit_length() - 16, 0), tcp.MAX_WINDOW_SCALE)

    def _own_mss(self) -> int:
        """What fits into our MTU without options (RFC 6691)."""
        return self.stack.settings.mtu - (60 if len(self.key) == 36 else 40)

    def _payload_size(self) -> int:
        return min(self.client_mss, self._own_mss()) - (_TS_OPTIONS if self.timestamps else 0)

    def _set_sizes(self) -> None:
        options = _TS_OPTIONS if self.timestamps else 0
        self.header.set_segment_size(self.tx.mss, options)
        self.tx.largest = min(self.header.largest_payload(options), self.tx.limit)

    def packet_too_big(self, mtu: int, seq: int, now: float) -> None:
        """An ICMP error that quotes our segment `seq`: the path takes `mtu` bytes only (RFC 1191, RFC 8201).

        A router older than RFC 1191 says 0, and 576 bytes is what every path should take (section 5 there).
        """
        if not self.tx.una <= unwrap(seq, self.tx.una) < self.tx.nxt:  # RFC 5927 section 4.1
            self.stack.drop("icmp-sequence")
            return
        if len(self.key) == 36:
            mtu = max(mtu, ip.MINIMUM_MTU6)
        elif mtu < _MINIMUM_MTU4:
            mtu = 576
        size = mtu - (60 if len(self.key) == 36 else 40) - (_TS_OPTIONS if self.timestamps else 0)
        if size < self.tx.mss:
            self.tx.mss = size
            self._set_sizes()
            self.tx.resize(size, self.tx.largest, now)

    # Packets out.

    def emit(self, seq: int, flags: int, payload: int, views: list[Bytes], now: float) -> None:
        """Put one segment into the outbox, with the ACK and the window of this moment."""
        rx = self.rx
        nxt = rx.nxt
        window = rx.window() >> rx.scale
        if self.timestamps:
            stamp = (int(now * 1000) + self.stamp_offset) & MASK
            options = tcp.TIMESTAMPS.pack(tcp.TIMESTAMP_LEAD, stamp, self.stamp_recent)
        else:
            options = b""
        self.stack.outbox.append((self.header.pack(seq, nxt, flags, window, options, payload), *views))
        rx.unacknowledged = 0
        rx.ack_now = False
        rx.ack_at = None
        self.last_ack_sent = nxt

    def _stamp_option(self, now: float) -> bytes:
        return tcp.TIMESTAMPS.pack(tcp.TIMESTAMP_LEAD, self.stamp(now), self.stamp_recent)

    def stamp(self, now: float) -> int:
        """TSval: milliseconds from an offset of the flow's own (RFC 7323 section 5.4)."""
        return (int(now * 1000) + self.stamp_offset) & MASK

    def _emit_ack(self, now: float) -> None:
        rx = self.rx
        if not rx.reassembly or not self.sack_permitted:
            self.emit(self.tx.nxt, ACK, 0, [], now)
            return
        blocks = rx.reassembly.sack_blocks(3 if self.timestamps else 4)
        options = tcp.pack_options(
            tcp.Options(
                timestamps=(self.stamp(now), self.stamp_recent) if self.timestamps else None,
                sack=tuple((left & MASK, right & MASK) for left, right in blocks),
            )
        )
        window = rx.window() >> rx.scale
        self.stack.outbox.append((self.header.pack(self.tx.nxt, rx.nxt, ACK, window, options, 0),))
        rx.acknowledged()
        self.last_ack_sent = rx.nxt

    def _emit_reset(self, seq: int, ack: int | None, options: bytes = b"") -> None:
        flags = RST if ack is None else RST | ACK
        self.stack.outbox.append((self.header.pack(seq, ack or 0, flags, 0, options, 0),))

    def _challenge(self, now: float) -> None:
        if now - self._challenge_at >= _CHALLENGE_INTERVAL:
            self._challenge_at = now
            self._emit_ack(now)
