"""Segment scripts: what a client does, step by step, in numbers relative to what it has heard.

A step names places, not numbers: "the next byte that the other side expects", "its right window edge", "all it has
sent". So one script can be played to two stacks whose sequence numbers and windows differ.
"""

from __future__ import annotations

import random
from typing import NamedTuple

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32

OPEN, CLOSED = 80, 81  # ports: where somebody listens, and where nobody does


class Segment(NamedTuple):
    """base: "next" or "edge", from which `offset` counts; ack: offset from everything that was heard;
    stamp: "new", "old" (PAWS) or "none"; window: as on the wire."""

    flags: int
    base: str = "next"
    offset: int = 0
    length: int = 0
    ack: int = 0
    stamp: str = "new"
    window: int = 65535


class Application(NamedTuple):
    """What the far side's application does: "send" (`count` bytes), "shutdown" or "abort"."""

    action: str
    count: int = 0


Step = Segment | Application


class Script(NamedTuple):
    """isn: the client's; the options of its SYN; steps: the SYN is the first."""

    seed: int
    family: int
    port: int
    isn: int
    mss: int | None
    wscale: int | None
    sack_ok: bool
    timestamps: bool
    steps: tuple[Step, ...]


def make_script(seed: int) -> Script:
    """The script of this number, always the same."""
    chance = random.Random(seed)
    kind = chance.choices(["connected", "half-open", "strange"], [8, 2, 1])[0]
    steps: list[Step]
    if kind == "connected":
        steps = [Segment(SYN), Segment(ACK), *(_step(chance) for _ in range(chance.randint(3, 14)))]
    elif kind == "half-open":
        steps = [Segment(SYN), *(_segment(chance) for _ in range(chance.randint(1, 3))), Segment(ACK)]
        steps += [_step(chance) for _ in range(chance.randint(0, 4))]
    else:
        steps = [_stray(chance) for _ in range(chance.randint(1, 4))]
    steps = _with_one_edge(steps)
    return Script(
        seed,
        chance.choice([4, 4, 6]),
        CLOSED if kind == "strange" and chance.random() < 0.5 else OPEN,
        chance.choice([0, 1, 1000, 1 << 31, (1 << 32) - 1, (1 << 32) - 3000, chance.getrandbits(32)]),
        chance.choice([None, 536, 1400, 1460]),
        chance.choice([None, None, 0, 7, 14]),
        chance.random() < 0.6,
        chance.random() < 0.6,
        tuple(steps),
    )


def _with_one_edge(steps: list[Step]) -> list[Step]:
    """Only the first segment at the edge stays: two edges of different windows would not move alike. No SYN is there,
    since a new connection would begin at different numbers."""
    seen = False
    kept = []
    for step in steps:
        if isinstance(step, Segment) and step.base == "edge":
            if seen or step.flags & SYN:
                continue
            seen = True
        kept.append(step)
    return kept


def _step(chance: random.Random) -> Step:
    roll = chance.random()
    if roll < 0.12:
        return Application("send", chance.choice([1, 100, 1460, 3000]))
    if roll < 0.16:
        return Application("shutdown")
    if roll < 0.17:
        return Application("abort")
    if roll < 0.45:  # what an honest client would send: the script must get somewhere
        flags = ACK | (FIN if chance.random() < 0.12 else 0) | (PSH if chance.random() < 0.5 else 0)
        return Segment(flags, "next", 0, chance.choice([0, 1, 100, 536]))
    return _segment(chance)


def _segment(chance: random.Random) -> Segment:
    length = chance.choice([0, 0, 1, 10, 100, 536])
    return Segment(
        _flags(chance), *_place(chance, length), length, _ack(chance),
        chance.choices(["new", "old", "none"], [12, 1, 1])[0], chance.choice([65535, 65535, 1000, 0]),
    )  # fmt: skip


def _flags(chance: random.Random) -> int:
    return chance.choices(
        [ACK, ACK | PSH, ACK | FIN, ACK | URG, RST, RST | ACK, SYN, SYN | ACK, 0, FIN, FIN | PSH | URG, SYN | FIN,
         SYN | RST],
        [40, 10, 12, 3, 5, 3, 4, 3, 2, 2, 1, 1, 1],
    )[0]  # fmt: skip


def _place(chance: random.Random, length: int) -> tuple[str, int]:
    """Where the segment begins."""
    where = chance.choices(["next", "ahead", "old", "overlap", "edge", "far"], [30, 25, 10, 10, 8, 5])[0]
    if where == "next":
        return "next", 0
    if where == "ahead":
        return "next", chance.choice([1, 2, 50, 100, 150, 536, 1000, 2000, 3000])
    if where == "old":
        return "next", -chance.choice([1, 2, length or 1, length + 1, 1000, 100_000])
    if where == "overlap":
        return "next", -(length // 2)
    if where == "edge":
        return "edge", chance.choice([-length - 1, -length, -1, 0, 1, 1000])
    return "next", chance.choice([1 << 29, 1 << 30, -(1 << 30), (1 << 31) - 1, -(1 << 31) + 1])


def _ack(chance: random.Random) -> int:
    roll = chance.random()
    if roll < 0.8:
        return 0
    if roll < 0.9:
        return -chance.choice([1, 100, 1460, 100_000, 1 << 28, 1 << 30])
    return chance.choice([1, 2, 1000, 1 << 20, 1 << 30])


def _stray(chance: random.Random) -> Segment:
    """To a port on which no connection is known."""
    flags = chance.choice([ACK, RST, RST | ACK, SYN, SYN | ACK, SYN | FIN, SYN | RST, FIN, FIN | ACK, 0, PSH, URG,
                           FIN | PSH | URG, SYN | URG, SYN | PSH])  # fmt: skip
    length = 0 if flags & SYN else chance.choice([0, 0, 1, 100])
    return Segment(flags, "next", 0, length, chance.choice([0, 1, 1000, 1 << 31]))
