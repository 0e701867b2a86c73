"""Round-trip time estimation and the retransmission time-out (RFC 6298)."""

from __future__ import annotations

from typing import Final

_GRANULARITY: Final = 0.001
_AFTER_LOST_SYN: Final = 3.0


class RttEstimator:
    """Keeps SRTT, RTTVAR and RTO, all in seconds. srtt is None before the first sample."""

    __slots__ = ("_initial", "_maximum", "_minimum", "backed_off", "lowest", "rto", "rttvar", "srtt")

    def __init__(self, initial: float, minimum: float, maximum: float) -> None:
        self.srtt: float | None = None
        self.lowest = 0.0  # of all samples; 0 before the first
        self.rttvar = 0.0
        self.rto = initial
        self.backed_off = False
        self._initial = initial
        self._minimum = minimum
        self._maximum = maximum

    def sample(self, rtt: float) -> None:
        """Take one measurement of a segment that was not retransmitted (Karn), which also ends any back-off."""
        if rtt < self.lowest or self.srtt is None:
            self.lowest = rtt
        if self.srtt is None:
            self.srtt = rtt
            self.rttvar = rtt / 2
        else:
            error = rtt - self.srtt
            self.rttvar += ((error if error > 0 else -error) - self.rttvar) / 4
            self.srtt += error / 8
        self.restore()

    def back_off(self) -> None:
        """Double the time-out after it expired (5.5)."""
        self.rto = min(self.rto * 2, self._maximum)
        self.backed_off = True

    def begin_after_loss(self) -> None:
        """The handshake took retransmissions, so nothing was measured and data begins (5.7)."""
        self.rto = max(self._initial, _AFTER_LOST_SYN)
        self.backed_off = False

    def restore(self) -> None:
        """The time-out as it is without back-off (2.2, 2.3)."""
        self.backed_off = False
        if self.srtt is None:
            self.rto = self._initial
        else:
            variation = 4 * self.rttvar
            rto = self.srtt + (variation if variation > _GRANULARITY else _GRANULARITY)
            if rto < self._minimum:
                rto = self._minimum
            self.rto = rto if rto < self._maximum else self._maximum
