"""TIME-WAIT (RFC 9293 section 3.4.2) in a table of its own: a few integers for a connection that is over."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ztun.stack.header import FlowHeader, reverse
from ztun.wire import tcp
from ztun.wire.sequence import MASK

_BEYOND: Final = 0x10000 + 1  # further than any unscaled window of the old connection reached


class Waiting:
    """nxt: our next sequence number; expected: the client's; stamps: (offset of our TSval, the client's last TSval)."""

    __slots__ = ("expected", "nxt", "stamps", "until")

    def __init__(self, nxt: int, expected: int, stamps: tuple[int, int] | None, until: float) -> None:
        self.nxt = nxt
        self.expected = expected
        self.stamps = stamps
        self.until = until

    def may_reopen(self, seq: int, bits: int, options: tcp.Options) -> bool:
        """A SYN that is clearly newer than the old connection (RFC 9293 section 3.10.7.4, RFC 6191)."""
        if bits & (tcp.SYN | tcp.ACK | tcp.RST) != tcp.SYN:
            return False
        if self.stamps is not None and options.timestamps is not None:
            ahead = (options.timestamps[0] - self.stamps[1]) & MASK
            if ahead:
                return ahead < 0x80000000
        return 0 < (seq - self.expected) & MASK < 0x80000000

    def number_after(self, iss: int) -> int:
        """`iss`, or where that is not above all that the old connection used, one that is (RFC 9293 MAY-2)."""
        if 0 < (iss - self.nxt) & MASK < 0x80000000:
            return iss
        return (self.nxt + _BEYOND) & MASK


class TimeWaitTable:
    """At most `limit` entries; the oldest gives way. All wait equally long, so insertion order is expiry order."""

    __slots__ = ("_entries", "_limit", "_time")

    def __init__(self, time: float, limit: int) -> None:
        self._time = time
        self._limit = limit
        self._entries: OrderedDict[bytes, Waiting] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, key: bytes, nxt: int, expected: int, stamps: tuple[int, int] | None, now: float) -> None:
        self._expire(now)
        if len(self._entries) >= self._limit:
            self._entries.popitem(last=False)
        self._entries[key] = Waiting(nxt, expected, stamps, now + self._time)

    def get(self, key: bytes, now: float) -> Waiting | None:
        self._expire(now)
        return self._entries.get(key)

    def remove(self, key: bytes) -> None:
        self._entries.pop(key, None)

    def restart(self, key: bytes, now: float) -> None:
        """Wait the whole time again: the client sent its FIN once more (RFC 9293 section 3.10.7.4)."""
        self._entries[key].until = now + self._time
        self._entries.move_to_end(key)

    def acknowledgment(self, key: bytes, hop_limit: int, now: float) -> bytes:
        """The ACK that answers a segment of the old connection."""
        entry = self._entries[key]
        options = b""
        if entry.stamps is not None:
            stamp = (int(now * 1000) + entry.stamps[0]) & MASK
            options = tcp.TIMESTAMPS.pack(tcp.TIMESTAMP_LEAD, stamp, entry.stamps[1])
        return FlowHeader(reverse(key), hop_limit).pack(entry.nxt, entry.expected, tcp.ACK, 0xFFFF, options, 0)

    def _expire(self, now: float) -> None:
        entries = self._entries
        while entries and next(iter(entries.values())).until <= now:
            entries.popitem(last=False)
