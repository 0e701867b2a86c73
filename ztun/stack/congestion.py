"""Congestion control: NewReno's windows (RFC 5681, RFC 6582) counted in bytes (RFC 3465)."""

from __future__ import annotations

from typing import Final

_INITIAL_SEGMENTS: Final = 10  # RFC 6928
_UNSET: Final = 1 << 62


class NewReno:
    """cwnd and ssthresh in bytes. The connection tells what happened; recovery itself is the connection's business."""

    __slots__ = ("cwnd", "mss", "ssthresh")

    def __init__(self, mss: int) -> None:
        self.mss = mss
        self.cwnd = _INITIAL_SEGMENTS * mss
        self.ssthresh = _UNSET

    def acknowledged(self, count: int) -> None:
        """`count` bytes were acknowledged while the window was the limit.

        One ACK answers a whole super-segment here, so slow start takes all of what it covers, not two segments' worth.
        """
        if self.cwnd < self.ssthresh:
            self.cwnd += count
        else:
            self.cwnd += max(self.mss * count // self.cwnd, 1)

    def loss(self, flight: int) -> None:
        """Fast retransmit: halve (RFC 5681 equation 4)."""
        self.ssthresh = max(flight // 2, 2 * self.mss)
        self.cwnd = self.ssthresh

    def time_out(self, flight: int, repeated: bool) -> None:
        """The retransmission timer expired: back to one segment. ssthresh stays when the same data timed out before."""
        if not repeated:
            self.ssthresh = max(flight // 2, 2 * self.mss)
        self.cwnd = self.mss

    def restart(self) -> None:
        """The connection was idle for longer than its RTO (RFC 5681 section 4.1)."""
        self.cwnd = min(self.cwnd, _INITIAL_SEGMENTS * self.mss)
