"""Reassembly of IP fragments (RFC 791 section 3.2, RFC 8200 section 4.5), within bounds."""

from __future__ import annotations

from collections import OrderedDict

from ztun.stack.timers import NEVER
from ztun.wire import ip

_TIMEOUT = 60.0  # seconds (RFC 1122 section 3.3.2, RFC 8200 section 4.5)
_MAX_DATAGRAMS = 256
_MAX_BYTES = 4 << 20
_MAX_PIECES = 1024  # of one datagram
_MAX_SIZE = {4: 65535 - 20, 6: 65535}  # of a transport payload, by the length fields of the IP headers
_Key = tuple[bytes, bytes, int, int]


class _Partial:
    """One datagram that is not whole yet. size is known once its last fragment came."""

    __slots__ = ("first", "held", "pieces", "size", "until")

    def __init__(self, until: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.held = 0
        self.size: int | None = None
        self.first: bytes | None = None  # the packet with offset 0, to quote in Time Exceeded
        self.until = until

    def fits(self, offset: int, end: int, more: bool) -> bool:
        """False when the piece overlaps another or contradicts the size that is known."""
        if self.size is not None and (end > self.size or not more):
            return False
        if not more and any(start + len(piece) > end for start, piece in self.pieces.items()):
            return False
        return not any(start < end and offset < start + len(piece) for start, piece in self.pieces.items())

    def whole(self) -> bytes | None:
        if self.size is None or self.held != self.size:
            return None
        return b"".join(piece for _, piece in sorted(self.pieces.items()))


class FragmentTable:
    """Datagrams under way, oldest first. A `Timed` for the stack's timers."""

    def __init__(self) -> None:
        self.armed = NEVER
        self.timer = 0
        self.timed_out: list[bytes] = []  # first fragments of datagrams that never became whole
        self.expired_count = 0
        self._partials: OrderedDict[_Key, _Partial] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._partials)

    def add(self, head: ip.IpHeader, packet: memoryview, start: int, now: float) -> bytes | None:
        """Take one fragment; its IP header is at `start`. Returns the transport payload once it is whole.

        Overlaps end the datagram, as RFC 5722 asks for IPv6 and as the kernel does for IPv4.
        Raises ip.MalformedError.
        """
        assert head.fragment is not None
        identification, offset, more = head.fragment
        piece = bytes(packet[head.payload : head.end])
        end = offset + len(piece)
        if end > _MAX_SIZE[head.version] or not piece or (more and len(piece) % 8):
            raise ip.MalformedError("ip-fragment-size")
        key = (head.source, head.destination, identification, head.protocol if head.version == 4 else 0)
        partial = self._partials.get(key)
        if partial is None:
            partial = self._partials[key] = _Partial(now + _TIMEOUT)
        elif partial.pieces.get(offset) == piece:
            return None  # an exact copy is no overlap
        if not partial.fits(offset, end, more) or len(partial.pieces) >= _MAX_PIECES:
            self._remove(key)
            raise ip.MalformedError("ip-fragment-overlap")
        partial.pieces[offset] = piece
        partial.held += len(piece)
        self._bytes += len(piece)
        if offset == 0:
            partial.first = bytes(packet[start : head.end])
        if not more:
            partial.size = end
        whole = partial.whole()
        if whole is not None:
            self._remove(key)
        self._make_room()
        return whole

    def _remove(self, key: _Key) -> _Partial:
        partial = self._partials.pop(key)
        self._bytes -= partial.held
        return partial

    def _make_room(self) -> None:
        while len(self._partials) > _MAX_DATAGRAMS or self._bytes > _MAX_BYTES:
            self._remove(next(iter(self._partials)))
            self.expired_count += 1

    def deadline(self) -> float:
        return next(iter(self._partials.values())).until if self._partials else NEVER

    def expired(self, now: float) -> None:
        while self._partials and self.deadline() <= now:
            partial = self._remove(next(iter(self._partials)))
            self.expired_count += 1
            if partial.first is not None:
                self.timed_out.append(partial.first)
