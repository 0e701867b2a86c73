"""TCP header and options (RFC 9293 section 3.1, RFC 7323, RFC 2018)."""

from __future__ import annotations

import struct
from typing import Final

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
PSH: Final = 8
ACK: Final = 16
URG: Final = 32
ECE: Final = 64
CWR: Final = 128

_END: Final = 0
_NOP: Final = 1
_MSS: Final = 2
_WINDOW_SCALE: Final = 3
_SACK_PERMITTED: Final = 4
_SACK: Final = 5
_TIMESTAMPS: Final = 8
_PAIR: Final = struct.Struct("!II")

MAX_WINDOW_SCALE: Final = 14  # RFC 7323 section 2.3

# Layout that nearly every segment with timestamps has: NOP NOP TS (RFC 7323 appendix A).
TIMESTAMP_LEAD: Final = 0x0101080A
TIMESTAMPS: Final = struct.Struct("!III")


# MSS, SACK permitted, timestamps, NOP, window scale: the SYN of Linux.
_LINUX_SYN: Final = struct.Struct("!HHIIIHBB")


class Options:
    """mss in bytes; window_scale as a shift; timestamps as (TSval, TSecr); sack as (left, right) wire numbers."""

    __slots__ = ("mss", "sack", "sack_permitted", "timestamps", "window_scale")

    def __init__(
        self,
        mss: int | None = None,
        window_scale: int | None = None,
        sack_permitted: bool = False,
        timestamps: tuple[int, int] | None = None,
        sack: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.mss = mss
        self.window_scale = window_scale
        self.sack_permitted = sack_permitted
        self.timestamps = timestamps
        self.sack = sack

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and self._all() == other._all()

    def __hash__(self) -> int:
        return hash(self._all())

    def _all(self) -> tuple[object, ...]:
        return self.mss, self.window_scale, self.sack_permitted, self.timestamps, self.sack


NO_OPTIONS: Final = Options()


def parse_options(data: memoryview) -> Options:
    """Parse the option bytes of a SYN. The layout of Linux and Android has a short way."""
    if len(data) == _LINUX_SYN.size:
        lead, mss, middle, value, echo, last, length, scale = _LINUX_SYN.unpack(data)
        if lead == 0x0204 and middle == 0x0402080A and last == 0x0103 and length == 3:
            return Options(mss, scale if scale < MAX_WINDOW_SCALE else MAX_WINDOW_SCALE, True, (value, echo))
    return _parse_options(data)


def _parse_options(data: memoryview) -> Options:
    """Parse the option bytes. A broken option ends the list, as the kernel does; unknown ones are skipped."""
    mss = scale = stamps = None
    permitted = False
    sack: tuple[tuple[int, int], ...] = ()
    position, end = 0, len(data)
    while position < end:
        kind = data[position]
        if kind == _NOP:
            position += 1
            continue
        if kind == _END or position + 1 >= end:
            break
        length = data[position + 1]
        if length < 2 or position + length > end:
            break
        body = data[position + 2 : position + length]
        if kind == _MSS and length == 4:
            mss = int.from_bytes(body, "big")
        elif kind == _WINDOW_SCALE and length == 3:
            scale = min(body[0], MAX_WINDOW_SCALE)
        elif kind == _SACK_PERMITTED and length == 2:
            permitted = True
        elif kind == _SACK and length > 2 and (length - 2) % 8 == 0:
            sack = tuple(_PAIR.iter_unpack(body))
        elif kind == _TIMESTAMPS and length == 10:
            stamps = _PAIR.unpack(body)
        position += length
    return Options(mss, scale, permitted, stamps, sack)


def read_options(packet: memoryview, start: int, payload: int) -> Options:
    """The options of the header at `start`, which ends at `payload`. The layouts of nearly every segment come first."""
    if payload - start == 32:
        lead, value, echo = TIMESTAMPS.unpack_from(packet, start + 20)
        if lead == TIMESTAMP_LEAD:
            return Options(timestamps=(value, echo))
    elif payload - start == 20:
        return NO_OPTIONS
    return _parse_options(packet[start + 20 : payload])


def pack_options(options: Options) -> bytes:
    """Option bytes padded with NOPs to a multiple of four."""
    if options.sack_permitted and options.timestamps is not None and None not in (options.mss, options.window_scale):
        scale = options.window_scale
        return _LINUX_SYN.pack(0x0204, options.mss, 0x0402080A, *options.timestamps, 0x0103, 3, scale)
    out = b""
    if options.mss is not None:
        out += struct.pack("!BBH", _MSS, 4, options.mss)
    if options.sack_permitted:
        out += bytes((_SACK_PERMITTED, 2)) if options.timestamps else bytes((_NOP, _NOP, _SACK_PERMITTED, 2))
    if options.timestamps is not None:
        lead = b"" if options.sack_permitted else bytes((_NOP, _NOP))
        out += lead + bytes((_TIMESTAMPS, 10)) + _PAIR.pack(*options.timestamps)
    if options.window_scale is not None:
        out += bytes((_NOP, _WINDOW_SCALE, 3, options.window_scale))
    if options.sack:
        out += bytes((_NOP, _NOP, _SACK, 2 + 8 * len(options.sack)))
        out += b"".join(_PAIR.pack(left, right) for left, right in options.sack)
    return out
