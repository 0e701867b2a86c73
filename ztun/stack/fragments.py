"""Reassembly of IP fragments (RFC 791 section 3.2, RFC 8200 section 4.5), within bounds."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from ztun.stack.memory import PIECE
from ztun.stack.sources import SourceCounts, source_of
from ztun.stack.timers import NEVER
from ztun.wire import ip
from ztun.wire.extensions import ERRONEOUS_FIELD
from ztun.wire.malformed import MalformedError, ParameterError

_TIMEOUT: Final = 60.0  # seconds (RFC 1122 section 3.3.2, RFC 8200 section 4.5)
_MAX_PIECES: Final = 512  # of one datagram; a link of 576 bytes makes 119
_MAX_SIZE: Final = {4: 65535 - 20, 6: 65535}  # of a transport payload, by the length fields of the IP headers
_SMALLEST: Final = {ip.TCP: 20, ip.UDP: 8, ip.ICMP: 8}  # transport headers over IPv4
_ENTRY: Final = 4 * PIECE  # what a datagram costs beside its pieces
_LENGTH_FIELD: Final = 4  # offset in the IPv6 header
_Key = tuple[bytes, bytes, int, int]


class _Partial:
    """One datagram that is not whole yet. size is known once its last fragment came, protocol once its first did."""

    __slots__ = ("cost", "first", "held", "pieces", "protocol", "refused", "size", "until")

    def __init__(self, until: float) -> None:
        self.pieces: dict[int, bytes] = {}
        self.held = 0
        self.cost = _ENTRY
        self.size: int | None = None
        self.protocol = 0
        self.first: bytes | None = None  # the packet with offset 0, to quote in Time Exceeded
        self.refused = False  # fragments overlap: none of those still to come is taken (RFC 5722 section 4)
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
    """Datagrams under way, oldest first. A `Timed` for the stack's timers.

    limit, per_source: bytes, counted with what Python's objects take. What would exceed them is refused, and the
    datagram that it is a piece of; the others go on.
    """

    def __init__(self, limit: int, per_source: int) -> None:
        self.armed = NEVER
        self.timer = 0
        self.timed_out: list[bytes] = []  # first fragments of datagrams that never became whole
        self._limit = limit
        self._partials: OrderedDict[_Key, _Partial] = OrderedDict()
        self._used = 0
        self._of = SourceCounts(per_source)

    def __len__(self) -> int:
        return len(self._partials)

    def add(self, head: ip.IpHeader, packet: memoryview, start: int, now: float) -> tuple[int, bytes] | None:
        """Take one fragment; its IP header is at `start`. Returns (protocol, transport payload) once it is whole.

        Overlaps end the datagram, as RFC 5722 asks for IPv6 and as the kernel does for IPv4.
        Raises MalformedError, also ParameterError.
        """
        assert head.fragment is not None
        identification, offset, more = head.fragment
        piece = bytes(packet[head.payload : head.end])
        _check(head, piece, offset, more)
        key = (head.source, head.destination, identification, head.protocol if head.version == 4 else 0)
        partial = self._partials.get(key)
        if partial is not None and partial.pieces.get(offset) == piece:
            return None  # an exact copy is no overlap
        if partial is not None and (partial.refused or not partial.fits(offset, offset + len(piece), more)):
            self._refuse(key, partial)
            raise MalformedError("ip-fragment-overlap")
        partial = self._room_for(key, partial, len(piece) + PIECE + (len(piece) if not offset else 0), now)
        partial.pieces[offset] = piece
        partial.held += len(piece)
        if offset == 0:
            partial.first = bytes(packet[start : head.end])
            partial.protocol = head.protocol  # RFC 8200 section 4.5: that of the first one counts
        if not more:
            partial.size = offset + len(piece)
        whole = partial.whole()
        if whole is None:
            return None
        self._remove(key)
        return partial.protocol, whole

    def _room_for(self, key: _Key, partial: _Partial | None, cost: int, now: float) -> _Partial:
        """The datagram, begun now if need be, with `cost` more charged to it and its source."""
        source = source_of(key[0])
        more = cost + (_ENTRY if partial is None else 0)
        reason = None
        if self._used + more > self._limit or (partial is not None and len(partial.pieces) >= _MAX_PIECES):
            reason = "ip-fragment-limit"
        elif self._of.is_full(source, more):
            reason = "ip-fragment-limit-source"
        if reason is not None:
            if partial is not None:
                self._remove(key)
            raise MalformedError(reason)
        if partial is None:
            partial = self._partials[key] = _Partial(now + _TIMEOUT)
        partial.cost += cost
        self._used += more
        self._of.add(source, more)
        return partial

    def _refuse(self, key: _Key, partial: _Partial) -> None:
        """Keep nothing of the datagram but its name, so that later fragments of it are known."""
        freed = partial.cost - _ENTRY
        if freed:
            self._used -= freed
            self._of.remove(source_of(key[0]), freed)
        partial.cost = _ENTRY
        partial.refused = True
        partial.pieces.clear()
        partial.first = None

    def _remove(self, key: _Key) -> _Partial:
        partial = self._partials.pop(key)
        self._used -= partial.cost
        self._of.remove(source_of(key[0]), partial.cost)
        return partial

    def deadline(self) -> float:
        return next(iter(self._partials.values())).until if self._partials else NEVER

    def expired(self, now: float) -> None:
        while self._partials and self.deadline() <= now:
            partial = self._remove(next(iter(self._partials)))
            if partial.first is not None:
                self.timed_out.append(partial.first)


def _check(head: ip.IpHeader, piece: bytes, offset: int, more: bool) -> None:
    """Sizes: all but the last are multiples of 8, none ends beyond what a packet can hold (RFC 8200 section 4.5), and
    the first over IPv4 has the transport header (RFC 1858 section 2.1; over IPv6 `extensions` looks)."""
    misfit = more and len(piece) % 8 != 0
    if head.version == 6:
        if misfit:
            raise ParameterError("ip-fragment-size", ERRONEOUS_FIELD, _LENGTH_FIELD)
        if offset + len(piece) > _MAX_SIZE[6]:
            raise ParameterError("ip-fragment-size", ERRONEOUS_FIELD, head.pointer + 2)
    if misfit or not piece or offset + len(piece) > _MAX_SIZE[head.version]:
        raise MalformedError("ip-fragment-size")
    if head.version == 4 and not offset and len(piece) < _SMALLEST.get(head.protocol, 0):
        raise MalformedError("ip-fragment-tiny")
