"""The receiving half of a connection: what has arrived, what may arrive, and when to say so."""

from __future__ import annotations

from typing import Final

from ztun.stack.reassembly import Reassembly

# So many out-of-order pieces are held: one for each so many bytes of buffer, but at least so many.
_BYTES_PER_PIECE: Final = 512
_PIECES: Final = 256
NO_PIECES: Final = Reassembly(0)  # of every connection that misses nothing, which is nearly all, nearly always


class Receiver:
    """Sequence numbers are full integers. nxt: next byte expected; edge: right edge of the advertised window."""

    __slots__ = (
        "_step", "ack_at", "ack_now", "capacity", "charged", "edge", "fin", "held", "mss", "nxt", "reassembly", "scale",
        "scheduled", "unacknowledged",
    )  # fmt: skip

    def __init__(self, first: int, capacity: int, scale: int, mss: int) -> None:
        self.nxt = first
        self.capacity = capacity
        self.scale = scale
        self.mss = mss
        self._step = min(mss, capacity // 2)  # what is less is not worth moving the window's edge
        self.edge = first
        self.held = 0  # bytes that the handler has and could not pass on yet
        self.charged = 0  # bytes that the stack's memory account has for this half
        self.fin: int | None = None  # sequence number of the peer's FIN once it was seen
        self.reassembly = NO_PIECES
        self.unacknowledged = 0  # bytes received since the last ACK
        self.ack_now = False
        self.ack_at: float | None = None  # when a delayed ACK is due
        self.scheduled = False  # on the stack's list of connections to look at after this batch

    def window(self) -> int:
        """The window to advertise, a multiple of what the scale can say, in bytes.

        Its right edge never moves back (RFC 9293 section 3.8.6.2.2), and forward by whole segments only. In between
        it is rounded up where there is room, else down: that takes less than one unit back from what was advertised
        (RFC 7323 section 2.4), not from what is accepted.
        """
        free = self.capacity - self.held
        nxt, scale = self.nxt, self.scale
        edge = nxt + (free >> scale << scale)
        if edge - self.edge >= self._step:
            self.edge = edge
            return edge - nxt
        known = self.edge - nxt
        if known <= 0:
            return 0
        if scale and (rounded := -(-known >> scale) << scale) <= free:
            self.edge = nxt + rounded
            return rounded
        return known >> scale << scale

    def window_grew(self) -> bool:
        """True when the peer should hear of room that it does not know of: a quarter of the buffer, or two segments
        after it was nearly shut."""
        known = self.edge - self.nxt
        gain = self.nxt + self.capacity - self.held - self.edge
        return gain >= self.capacity // 4 or (known < 2 * self.mss <= gain)

    def acceptable(self, seq: int, length: int) -> bool:
        """RFC 9293 section 3.10.7.4, first check. length counts SYN and FIN.

        What begins at the very next byte is looked at even when the window is shut: its ACK counts, and its FIN.
        """
        if seq == self.nxt:
            return True
        if length == 0:
            # One further than RFC 9293 has it: that is where the ACKs of a client come from that has filled our window
            # and lost something of it, and they must count.
            return self.nxt <= seq <= self.edge
        return seq < self.edge and seq + length > self.nxt

    def keep(self, seq: int, payload: memoryview) -> bool:
        """Hold on to bytes behind a gap. See Reassembly.insert."""
        if self.reassembly is NO_PIECES:
            self.reassembly = Reassembly(max(self.capacity // _BYTES_PER_PIECE, _PIECES))
        return self.reassembly.insert(seq, payload)

    def take_piece(self) -> memoryview | None:
        """The bytes that are next in line now that a gap is filled."""
        piece = self.reassembly.take(self.nxt)
        if not self.reassembly:
            self.reassembly = NO_PIECES
        return piece

    def count(self, length: int) -> None:
        """`length` in-order bytes arrived: at least every second full segment is acknowledged (RFC 5681 4.2)."""
        self.nxt += length
        self.unacknowledged += length
        if self.unacknowledged >= 2 * self.mss:
            self.ack_now = True

    def acknowledged(self) -> None:
        """An ACK for everything received is on its way."""
        self.unacknowledged = 0
        self.ack_now = False
        self.ack_at = None
