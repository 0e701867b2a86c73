"""Where ztun's stack and the kernel's answer differently on purpose: each with the reason, none without a condition.

A script is compared up to the first step that one of these explains; what follows it starts from different states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .client import AT_EDGE, Answer, Facts
from .script import ACK, CLOSED, FIN, RST, SYN, Application, Script, Segment, Step


class Case(NamedTuple):
    """One step of one script with both answers. facts: where it stood with the kernel; before: all earlier steps,
    each with its facts; differing: the fields of Answer that are not equal."""

    script: Script
    step: Step
    facts: Facts
    before: list[tuple[Step, Facts]]
    kernel: Answer
    ztun: Answer
    differing: frozenset[str]


class Difference(NamedTuple):
    """name, reason: for people. explains: whether the case is of this kind."""

    name: str
    reason: str
    explains: Callable[[Case], bool]


class Parting(NamedTuple):
    """A step after which the two hold different states although they may have answered alike.

    parts(script, step, facts, before): as in Case.
    """

    name: str
    reason: str
    parts: Callable[[Script, Step, Facts, list[tuple[Step, Facts]]], bool]


class Comparison(NamedTuple):
    """steps: how many were compared; reason: the name of what ended it early, None when nothing did;
    unexplained: the step whose answers differ for no listed reason."""

    steps: int
    reason: str | None = None
    unexplained: Case | None = None


def compare(script: Script, kernel: list[Answer], ztun: list[Answer], facts: list[Facts]) -> Comparison:
    """Compare the answers of both step by step, as far as they can be compared."""
    before: list[tuple[Step, Facts]] = []
    for number, (step, ours, theirs, fact) in enumerate(zip(script.steps, ztun, kernel, facts, strict=True), 1):
        parting = next((one.name for one in PARTINGS if one.parts(script, step, fact, before)), None)
        if theirs != ours:
            differing = frozenset(name for name in Answer._fields if getattr(ours, name) != getattr(theirs, name))
            case = Case(script, step, fact, before, theirs, ours, differing)
            reason = next((one.name for one in DIFFERENCES if one.explains(case)), parting)
            return Comparison(number, reason, case if reason is None else None)
        if parting is not None:
            return Comparison(number, parting)
        before.append((step, fact))
    return Comparison(len(script.steps))


def _segment(case: Case, *, having: int = 0, lacking: int = 0) -> Segment | None:
    """The step, when it is a segment with and without these flags."""
    step = case.step
    if isinstance(step, Segment) and step.flags & having == having and not step.flags & lacking:
        return step
    return None


def _no_connection(case: Case) -> bool:
    if case.step is None or not _segment(case, lacking=ACK | RST):
        return False
    pure_syn = isinstance(case.step, Segment) and case.step.flags & (SYN | FIN) == SYN
    return (
        not pure_syn
        and case.script.port != CLOSED
        and case.differing == {"reset"}
        and case.kernel.reset is None
        and case.ztun.reset is not None
        and case.ztun.reset[0]
    )


DIFFERENCES = [
    Difference(
        "a segment without ACK that belongs to no connection",
        "RFC 9293 section 3.10.7.1 (CLOSED) wants a RST, section 3.10.7.2 (LISTEN) silence. A gateway does not know who"
        " listens before it has dialled, and does not dial for what is no SYN.",
        _no_connection,
    ),
    Difference(
        "no SACK blocks on data segments",
        "Every out-of-order arrival is told at once in an ACK of its own; data leaves in super-segments whose header is"
        " always the same (RFC 2018 section 4: SHOULD).",
        lambda case: case.differing == {"sack"} and not case.ztun.sack and case.kernel.data_end > case.facts.sent,
    ),
    Difference(
        "a FIN out of order is not in the SACK blocks, nor is anything after it",
        "RFC 2018 speaks of data; a FIN that waits costs the client at most its retransmission. What comes after it is"
        " given up at once; the kernel does that after it has acknowledged the FIN.",
        lambda case: (
            case.differing - {"seq"} == {"sack"} and _without_fin(case) == case.ztun.sack and _steps_back(case)
        ),
    ),
    Difference(
        "an old empty segment is answered (seldom)",
        "RFC 7323 section 5.3 R1: `send an acknowledgment in reply`. The kernel no longer does for a bare ACK.",
        lambda case: (
            (step := _segment(case, having=ACK, lacking=RST | SYN | FIN)) is not None
            and step.stamp == "old" and not step.length
            and case.kernel.ack is None and case.ztun.ack == case.facts.nxt and case.facts.start != case.facts.nxt
        ),
    ),
    Difference(
        "whose timestamp is remembered",
        "RFC 7323 section 5.3 R3 asks only for the place in the window. The kernel's slow path wants an ACK number that"
        " is not old besides, its fast path not even a valid one; we want a valid one, so that who guesses a place in"
        " the window alone cannot poison TS.Recent.",
        lambda case: (
            case.differing == {"echo"}
            and any(isinstance(step, Segment) and step.ack != 0 for step, _ in [*case.before, (case.step, case.facts)])
        ),
    ),
    Difference(
        "in SYN-RECEIVED the timestamp of the SYN is echoed",
        "Nothing of a segment counts before its ACK is believed; the kernel echoes what it has just dropped.",
        lambda case: case.facts.opened and not case.facts.established and case.differing == {"echo"},
    ),
    Difference(
        "TIME-WAIT keeps the last timestamp of the connection",
        "The kernel learns newer ones from whatever comes later. Our table keeps what the connection itself believed.",
        lambda case: (
            case.facts.eof and case.differing == {"echo"}
            and Application("shutdown") in [step for step, _ in case.before]
        ),
    ),
    Difference(
        "where ACKs and RSTs stand when the window was shut over data in flight",
        "RFC 9293 section 3.10.7.4 says SND.NXT; the kernel steps back to the edge of the window.",
        lambda case: (
            case.differing in ({"seq"}, {"reset"})
            and bool(case.ztun.reset) == bool(case.kernel.reset)
            and _steps_back(case)
        ),
    ),
    Difference(
        "in SYN-RECEIVED a segment without ACK is dropped first",
        "RFC 9293 section 3.10.7.4 would drop it at the fifth check, the kernel looks at its place and time before.",
        lambda case: (
            _segment(case, lacking=ACK | RST | SYN) is not None
            and case.facts.opened and not case.facts.established
            and case.kernel.ack == case.facts.nxt and (case.ztun.ack, case.ztun.reset) == (None, None)
        ),
    ),
    Difference(
        "in SYN-RECEIVED the sequence number is looked at before the ACK number",
        "RFC 9293 section 3.10.7.4 has this order; the kernel resets for a wrong ACK number first.",
        lambda case: (
            _segment(case, having=ACK, lacking=RST) is not None
            and case.facts.opened and not case.facts.established
            and case.kernel.reset is not None and not case.kernel.reset[0] and case.ztun.reset is None
        ),
    ),
    Difference(
        "in SYN-RECEIVED another SYN in the window is challenged",
        "RFC 9293 section 3.10.7.4 returns to LISTEN, as the kernel does with a RST. We have dialled by then, and RFC"
        " 5961 section 4 protects the flow from strangers.",
        lambda case: (
            _segment(case, having=SYN, lacking=RST) is not None
            and case.facts.opened and not case.facts.established
            and case.kernel.reset is not None and case.ztun.reset is None
        ),
    ),
    Difference(
        "data after the FIN is ignored, and so is another FIN",
        "RFC 9293 section 3.10.7.4: `This should not occur … Ignore the segment text.` The kernel resets, as RFC 1122"
        " section 4.2.2.13 asks of an application that does not read any more (ours has read all there is), and"
        " acknowledges a second FIN after the first.",
        lambda case: (
            (step := _segment(case, lacking=RST | SYN)) is not None
            and case.facts.eof and case.facts.end > case.facts.nxt
            and (
                (step.length > 0 and case.kernel.reset is not None and case.ztun.reset is None)
                or (step.flags & FIN > 0 and case.kernel.ack == case.facts.nxt + 1)
            )
        ),
    ),
    Difference(
        "how much a sender sends before it hears more",
        "RFC 9293 section 3.8.6.2.1 leaves open what to do with a window smaller than a segment; TCP_NODELAY lets the"
        " kernel fill it. And the kernel counts its congestion window in segments, small ones too, we in bytes (RFC"
        " 3465, RFC 6928).",
        lambda case: (
            "data_end" in case.differing and case.differing <= {"data_end", "ack", "seq", "echo", "sack"}
            and (
                min(facts.window for _, facts in [*case.before, (case.step, case.facts)]) < 4000
                or max(case.kernel.data_end, case.ztun.data_end) - _acknowledged(case) > 5 * 524
            )
        ),
    ),
    Difference(
        "a RST at the end of what was SACKed is challenged",
        "RFC 5961 section 3.2 knows the next byte only; the kernel takes the right edge of its SACK blocks as well.",
        lambda case: (
            _segment(case, having=RST) is not None and case.script.sack_ok and case.facts.start > case.facts.nxt
            and case.kernel.broken and case.ztun.ack == case.facts.nxt
            and any(case.facts.start == facts.end for _, facts in case.before)
        ),
    ),
    Difference(
        "TIME-WAIT does not answer an empty segment that is where it should be",
        "Whatever its timestamp: the client may be in TIME-WAIT too, and two ends must not answer each other for ever.",
        lambda case: (
            (step := _segment(case, lacking=RST | SYN | FIN)) is not None
            and step.stamp == "old" and not step.length and case.facts.eof and case.ztun.ack is None
            and Application("shutdown") in [step for step, _ in case.before]
        ),
    ),
    Difference(
        "data with a far too old ACK number is dropped",
        "RFC 5961 section 5.2. The kernel does, but for the segment that its fast path expects next.",
        lambda case: (
            (step := _segment(case, having=ACK)) is not None and step.length > 0
            and (step.ack < -65535 or case.facts.sent + step.ack < 1)
            and case.facts.start == case.facts.nxt
            and case.kernel.received == case.ztun.received + case.kernel.received[-step.length :]
        ),
    ),
]  # fmt: skip


def _steps_back(case: Case) -> bool:
    """The kernel's ACK or RST stands below SND.NXT, ours at it; or both agree."""
    if case.kernel.reset is not None and case.ztun.reset is not None:
        kernel, ztun = case.kernel.reset[1], case.ztun.reset[1]
    else:
        kernel, ztun = case.kernel.seq, case.ztun.seq
    return kernel == ztun or (kernel or 0) < (ztun or 0) == case.facts.sent


def _without_fin(case: Case) -> tuple[tuple[int, int], ...]:
    """The kernel's blocks up to the first FIN that was not reached before this step."""
    steps = [*case.before, (case.step, case.facts)]
    fin = min((place for place in _fins(steps) if place >= case.facts.nxt), default=1 << 62)
    edge = next((facts.edge for step, facts in steps if _at_edge(step)), 0)
    blocks = []
    for start, end in case.kernel.sack:
        shift = edge - AT_EDGE if start > AT_EDGE // 2 else 0
        if start + shift < fin:
            blocks.append((start, min(end, fin - shift)))
    return tuple((start, end) for start, end in blocks if start < end and end > (case.kernel.ack or 0))


def _fins(steps: list[tuple[Step, Facts]]) -> list[int]:
    """The numbers of the FINs that came."""
    return [
        facts.end - 1
        for step, facts in steps
        if isinstance(step, Segment) and step.flags & (FIN | ACK | RST | SYN) == FIN | ACK and step.ack <= 0
    ]


def _acknowledged(case: Case) -> int:
    """How much of the other side's data the client has acknowledged."""
    return max(
        (
            facts.sent + step.ack
            for step, facts in case.before
            if isinstance(step, Segment)
            and step.flags & (ACK | RST | SYN) == ACK
            and step.ack <= 0
            and facts.nxt <= facts.end <= facts.edge
        ),
        default=0,
    )


def _furthest(before: list[tuple[Step, Facts]], edge: int) -> int:
    """The end of the last segment that may be held."""
    return max((facts.end for _, facts in before if facts.end <= edge), default=0)


def _at_edge(step: Step) -> bool:
    return isinstance(step, Segment) and step.base == "edge"


PARTINGS = [
    Parting(
        "data at or after the place of a FIN that came early",
        "RFC 9293 section 3.10.7.4: nothing comes after a FIN. The kernel lets data that contradicts it replace it.",
        lambda script, step, facts, before: (
            isinstance(step, Segment)
            and (
                any(facts.nxt <= fin < facts.start + step.length for fin in _fins(before))
                or any(facts.nxt <= fin < _furthest(before, facts.edge) for fin in _fins([(step, facts)]))
            )
        ),
    ),
    Parting(
        "in SYN-RECEIVED the SYN again, now with an ACK",
        "The kernel cuts the SYN off and takes the ACK. RFC 9293 section 3.10.7.4 ends with the SYN: we challenge it.",
        lambda script, step, facts, before: (
            isinstance(step, Segment) and step.flags & (SYN | ACK | RST) == SYN | ACK
            and facts.opened and not facts.established and facts.start == facts.nxt - 1
        ),
    ),
    Parting(
        "a RST with an old timestamp",
        "RFC 7323 section 5.2: PAWS is not applied to RST. In SYN-RECEIVED the kernel does, and stays.",
        lambda script, step, facts, before: (
            isinstance(step, Segment) and step.flags & RST > 0 and step.stamp == "old"
            and facts.opened and not facts.established
        ),
    ),
    Parting(
        "a segment without the agreed timestamp",
        "RFC 7323 section 3.2: SHOULD drop, without an answer; the kernel takes it.",
        lambda script, step, facts, before: (
            isinstance(step, Segment) and script.timestamps and facts.opened
            and step.stamp == "none" and not step.flags & (RST | SYN)
        ),
    ),
    Parting(
        "a segment that ends where the next byte is expected",
        "The kernel still takes its ACK, FIN and timestamp as acceptable; RFC 9293 section 3.10.7.4 wants at least one"
        " number of it in the window.",
        lambda script, step, facts, before: (
            isinstance(step, Segment) and facts.opened
            and facts.start < facts.nxt and facts.nxt in (facts.end, facts.end - bool(step.flags & SYN))
        ),
    ),
    Parting(
        "a segment that reaches over the right edge",
        "The kernel takes all of it while its receive queue is empty, or nothing; we take what lies in the window.",
        lambda script, step, facts, before: (
            isinstance(step, Segment) and facts.opened and facts.start <= facts.edge < facts.end
        ),
    ),
]  # fmt: skip
