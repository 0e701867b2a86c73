"""Whether there is room for one more connection, and who takes it up already."""

from __future__ import annotations

from ztun.stack.memory import Memory
from ztun.stack.settings import StackSettings
from ztun.stack.sources import SourceCounts, source_of


class Admission:
    """Counts connections and half-open ones (no SYN-ACK answered yet), in all and per source.

    At a bound the newest is refused: those that are here already have more to lose, and their sources have shown that
    they can be reached.
    """

    __slots__ = ("_connections", "_half_open_of", "_memory", "_of", "_settings", "half_open")

    def __init__(self, settings: StackSettings, memory: Memory) -> None:
        self._settings = settings
        self._memory = memory
        self._connections = 0
        self.half_open = 0
        self._of = SourceCounts(settings.max_connections_per_source)
        self._half_open_of = SourceCounts(settings.max_half_open_per_source)

    @property
    def sources(self) -> int:
        """Of how many something is counted."""
        return max(len(self._of), len(self._half_open_of))

    def objection(self, address: bytes) -> str | None:
        """The drop reason for which a SYN from this client is refused, or None."""
        settings = self._settings
        source = source_of(address)
        if self._connections >= settings.max_connections:
            return "tcp-limit"
        if self.half_open >= settings.max_half_open:
            return "tcp-limit-half-open"
        if self._of.is_full(source):
            return "tcp-limit-source"
        if self._half_open_of.is_full(source):
            return "tcp-limit-half-open-source"
        return "memory-limit" if self._memory.used >= self._memory.limit else None

    def opened(self, address: bytes) -> None:
        """A SYN was taken."""
        source = source_of(address)
        self._connections += 1
        self.half_open += 1
        self._of.add(source)
        self._half_open_of.add(source)

    def established(self, address: bytes) -> None:
        """The client answered the SYN-ACK."""
        self.half_open -= 1
        self._half_open_of.remove(source_of(address))

    def closed(self, address: bytes, half_open: bool) -> None:
        """The connection is gone; half_open: it was never established."""
        self._connections -= 1
        self._of.remove(source_of(address))
        if half_open:
            self.established(address)
