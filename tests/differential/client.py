"""The client of one script towards one stack: builds the packets of its steps, reads the answers."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import packets

from .script import ACK, FIN, RST, SYN, Script, Segment

_PATTERN = bytes(range(1, 252)) * 300
_UNKNOWN_ISS = 0x12345678  # the number that is acknowledged while the other side has none yet
_EDGE = 40000  # where the right edge is taken to be before a window was heard
_NEAR = 4000  # bytes around the edge that segments there can cover
AT_EDGE = 1 << 40
_TICK = 100  # milliseconds of the client's clock between two steps


class Heard(NamedTuple):
    """One segment, numbers relative: seq to the other side's SYN (None for an absolute zero), ack to ours.

    fresh: it carries something that was not sent before.
    """

    flags: int
    seq: int | None
    ack: int | None
    payload: bytes
    window: int
    options: dict[str, Any]
    fresh: bool


class Facts(NamedTuple):
    """Where a step stood, numbers relative to the client's SYN: what its segment covers, what the other side expected
    then, its right edge, and the end of what it had sent. established: the handshake was over. eof: so was our side."""

    start: int
    end: int
    nxt: int
    edge: int
    sent: int
    opened: bool
    established: bool
    eof: bool
    window: int


class Answer(NamedTuple):
    """What a stack said to one step, in the form that two stacks must agree on. How often it said so, and how it cut
    its data, is its own affair.

    syn: the options of its SYN-ACK. reset: (with ACK, seq, ack). ack: the last cumulative one. seq: of its last empty
    segment, unless new data went out. data_end: how far its stream goes, FIN included. sack: blocks of its last
    segment. echo: TSecr, in ticks. received, eof, broken: what the application knows.
    """

    syn: tuple[Any, ...] | None
    reset: tuple[bool, int | None, int | None] | None
    ack: int | None
    seq: int | None
    data_end: int
    sack: tuple[tuple[int, int], ...]
    echo: int | None
    received: bytes
    eof: bool
    broken: bool


def pattern(start: int, length: int) -> bytes:
    """The bytes of every stream at this place of it, whichever segment carries them."""
    offset = start % 251
    return _PATTERN[offset : offset + length]


class Client:
    """nxt: what the other side expects next; edge: its right window edge; sent: the end of what it has sent."""

    def __init__(self, script: Script, address: bytes, server: bytes, port: int) -> None:
        self.script = script
        self.address = address
        self.server = server
        self.port = port
        self.iss: int | None = None
        self.nxt = 0
        self.edge = _EDGE
        self.sent = 0
        self.clock = 0
        self.facts: list[Facts] = []
        self.established = False
        self.eof = False
        self.app: object = None
        self._window = 0xFFFF
        self.stamps = False
        self._scale = 0
        self._mark = 0
        self._last_stamp = 0

    # Out.

    def build(self, step: Segment) -> bytes:
        """The IP packet of this step."""
        self.clock += 1
        first = bool(step.flags & SYN) and self.iss is None
        start = (self.nxt if step.base == "next" else self.edge) + step.offset
        if step.base == "edge":
            self._mark = self.edge
        occupied = step.length + bool(step.flags & SYN) + bool(step.flags & FIN)
        self._note(start, start + occupied, step.window)
        stamps = None
        if (first and self.script.timestamps) or (self.stamps and step.stamp != "none"):
            stamps = (self._stamp(-100_000 if step.stamp == "old" and not first else 0), self._last_stamp)
        options = packets.pack_options(ts=stamps)
        if first:
            script = self.script
            options = packets.pack_options(script.mss, script.wscale, script.sack_ok, stamps)
        acknowledged = (self.iss or _UNKNOWN_ISS) + self.sent + step.ack
        return packets.tcp_packet(
            self.address, self.server, (self.port, self.script.port), start + self.script.isn,
            acknowledged if step.flags & ACK else 0, step.flags, step.window, options,
            pattern(start, step.length),
        )  # fmt: skip

    def note_application_step(self) -> None:
        self._note(self.nxt, self.nxt, self._window)

    def _note(self, start: int, end: int, window: int) -> None:
        self.facts.append(
            Facts(start, end, self.nxt, self.edge, self.sent, self.iss is not None, self.established, self.eof, window)
        )
        self._window = window

    def _stamp(self, back: int) -> int:
        return 0xFFFF_FF00 + self.clock * _TICK + back  # wraps during the script

    # In.

    def read(self, packet: bytes) -> Heard:
        """Read one TCP segment to this client, the IP header first."""
        at = 40 if packet[0] >> 4 == 6 else 20
        seq, ack, bits, window = struct.unpack_from("!IIHH", packet, at + 4)
        size = bits >> 10 & 0x3C
        options = read_options(packet[at + 20 : at + size])
        flags = bits & 0x37
        if flags & SYN and flags & ACK and self.iss != seq:  # the first, or that of a new connection on these ports
            self.iss = seq
            self.stamps = "ts" in options
            self._scale = options.get("wscale", 0)
            self.nxt, self.edge, self.sent = relative(ack, self.script.isn), _EDGE, 0
            self.established = self.eof = False
        base = _UNKNOWN_ISS if self.iss is None else self.iss
        heard = Heard(
            flags,
            relative(seq, base) if seq or not flags & RST else None,
            relative(ack, self.script.isn) if flags & ACK else None,
            packet[at + size :],
            window << (0 if flags & SYN else self._scale),
            options,
            False,
        )
        heard = heard._replace(fresh=_end(heard) > self.sent)
        self._learn(heard)
        return heard

    def _learn(self, heard: Heard) -> None:
        if heard.flags & RST or heard.ack is None or heard.seq is None:
            return
        self.nxt = max(self.nxt, heard.ack)
        edge = heard.ack + heard.window
        self.edge = edge if self.edge == _EDGE else max(self.edge, edge)
        self.sent = max(self.sent, _end(heard))
        # Before it is established the kernel wants the stamp of a SYN-ACK echoed, not that of an ACK.
        if "ts" in heard.options and (self.established or heard.flags & SYN):
            self._last_stamp = heard.options["ts"][0]

    def answer(self, heard: list[Heard], received: bytes, eof: bool, broken: bool) -> Answer:
        """What the segments of one step amount to.

        Retransmissions are left out: loss recovery is compared elsewhere, by what comes of it.
        """
        syn = reset = ack = seq = echo = None
        sack: tuple[tuple[int, int], ...] = ()
        for one in heard:
            if one.flags & RST:
                reset = (bool(one.flags & ACK), one.seq, one.ack)
                continue
            if one.payload or one.flags & FIN:
                if not one.fresh:
                    continue
            else:
                seq = one.seq
            if one.flags & SYN:
                syn = tuple(sorted(one.options))
            ack = None if one.ack is None else self._place(one.ack + self.script.isn)
            # What is acknowledged already is left out: the kernel repeats it in the ACK of a FIN.
            blocks = (
                block for block in one.options.get("sack", ()) if relative(block[1], self.script.isn) > (one.ack or 0)
            )
            sack = tuple(sorted((self._place(a), self._place(b)) for a, b in blocks))
            if "ts" in one.options:
                echo = relative(one.options["ts"][1], 0xFFFF_FF00) // _TICK
        if self.sent > self.facts[-1].sent:
            seq = None  # the data tells it
        return Answer(syn, reset, ack, seq, self.sent, sack, echo, received, eof, broken)

    def note_application(self, app: object, eof: bool) -> None:
        """Another application than before means that the handshake is over."""
        if app is not self.app:
            self.app = app
            self.established = True
        self.eof = eof

    def _place(self, number: int) -> int:
        """A number of ours as a distance from the SYN or, near the edge that was used, from that plus AT_EDGE."""
        place = relative(number, self.script.isn)
        return place - self._mark + AT_EDGE if self._mark and abs(place - self._mark) < _NEAR else place


def _end(heard: Heard) -> int:
    return (heard.seq or 0) + len(heard.payload) + bool(heard.flags & SYN) + bool(heard.flags & FIN)


def read_options(data: bytes) -> dict[str, Any]:
    options: dict[str, Any] = {}
    position = 0
    while position < len(data) and data[position]:
        kind = data[position]
        if kind == 1:
            position += 1
            continue
        length = data[position + 1]
        body = data[position + 2 : position + length]
        if kind == 2:
            options["mss"] = int.from_bytes(body, "big")
        elif kind == 3:
            options["wscale"] = body[0]
        elif kind == 4:
            options["sack_ok"] = True
        elif kind == 5:
            options["sack"] = list(struct.iter_unpack("!II", body))
        elif kind == 8:
            options["ts"] = struct.unpack("!II", body)
        position += length
    return options


def relative(number: int, base: int) -> int:
    """`number` - `base` as a signed 32-bit difference."""
    return ((number - base + 0x80000000) & 0xFFFFFFFF) - 0x80000000
