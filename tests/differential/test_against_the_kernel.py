"""Random segments to the stack and to this machine's kernel TCP: they answer alike, or differ for a listed reason.

ZTUN_SCRIPTS says how many scripts are played (`make differential SCRIPTS=100000`).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence

import pytest

from ztun.stack import segments

from .differences import DIFFERENCES, PARTINGS, Case, Comparison, compare
from .kernel import KernelSide
from .play import TooSlowError, play_to_kernel, play_to_ztun
from .script import Application, Script, Segment, Step, make_script

SCRIPTS = int(os.environ.get("ZTUN_SCRIPTS", "10000"))
_BATCH = 200
_used = itertools.count()  # every batch has addresses of its own


@pytest.fixture(autouse=True)
def no_throttle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tcp_invalid_ratelimit = 0 does with the kernel."""
    monkeypatch.setattr(segments, "_CHALLENGE_INTERVAL", 0.0)


@pytest.mark.timeout(3600)
def test_the_stack_answers_as_the_kernel_does(kernel: KernelSide) -> None:
    reasons: Counter[str | None] = Counter()
    steps = 0
    for first in range(0, SCRIPTS, _BATCH):
        scripts = [make_script(seed) for seed in range(first, min(first + _BATCH, SCRIPTS))]
        for script, found in zip(scripts, _compare(kernel, scripts), strict=True):
            assert found.unexplained is None, _describe(script, found)
            reasons[found.reason] += 1
            steps += found.steps
    print(f"{SCRIPTS} scripts, {steps} steps compared")
    for reason, count in reasons.most_common():
        print(f"{count:8} {reason or 'alike to the end'}")
    assert reasons[None] > SCRIPTS // 4, "most scripts ended early: there is little left to compare"


@pytest.mark.parametrize("name", [one.name for one in [*DIFFERENCES, *PARTINGS]])
def test_each_listed_difference_is_still_one(kernel: KernelSide, name: str) -> None:
    """A reason that explains nothing any more must go."""
    (found,) = _compare(kernel, [make_script(EXAMPLES[name])])
    assert found.reason == name


def _compare(kernel: KernelSide, scripts: Sequence[Script]) -> list[Comparison]:
    first = next(_used) * _BATCH
    played = play_to_ztun(scripts, first)
    try:
        answers = play_to_kernel(kernel, scripts, first)
    except TooSlowError:
        middle = len(scripts) // 2
        return [*_compare(kernel, scripts[:middle] or scripts), *_compare(kernel, scripts[middle:] if middle else [])]
    return [
        compare(script, theirs, ours, facts)
        for script, (theirs, facts), (ours, _) in zip(scripts, answers, played, strict=True)
    ]


def _describe(script: Script, found: Comparison) -> str:
    """The script as far as it was played, and where the answers part."""
    case = found.unexplained
    assert case is not None
    lines = [f"script {script.seed}: {script._replace(steps=())}"]
    lines += [f"  {number}: {_step(step)}" for number, step in enumerate(script.steps[: found.steps])]
    lines += [
        f"  {name}: kernel {getattr(case.kernel, name)!r}, stack {getattr(case.ztun, name)!r}"
        for name in _differing(case)
    ]
    return "\n".join([*lines, f"  {case.facts}"])


def _differing(case: Case) -> list[str]:
    return sorted(case.differing)


def _step(step: Step) -> str:
    if isinstance(step, Application):
        return f"the application: {step.action} {step.count or ''}"
    assert isinstance(step, Segment)
    flags = "".join(letter for bit, letter in enumerate("FSRPAU") if step.flags >> bit & 1) or "no flags"
    where = f"{flags} at {step.base} {step.offset:+}, {step.length} bytes"
    return f"{where}, ack {step.ack:+}, {step.stamp} stamp, window {step.window}"


EXAMPLES = {
    "a segment without ACK that belongs to no connection": 55,
    "no SACK blocks on data segments": 38,
    "a FIN out of order is not in the SACK blocks, nor is anything after it": 5,
    "an old empty segment is answered (seldom)": 20,
    "whose timestamp is remembered": 10,
    "in SYN-RECEIVED the timestamp of the SYN is echoed": 20363,
    "TIME-WAIT keeps the last timestamp of the connection": 180,
    "where ACKs and RSTs stand when the window was shut over data in flight": 399,
    "in SYN-RECEIVED a segment without ACK is dropped first": 78,
    "in SYN-RECEIVED the sequence number is looked at before the ACK number": 0,
    "in SYN-RECEIVED another SYN in the window is challenged": 93,
    "data after the FIN is ignored, and so is another FIN": 72,
    "how much a sender sends before it hears more": 43,
    "a RST at the end of what was SACKed is challenged": 9901,
    "TIME-WAIT does not answer an empty segment that is where it should be": 7417,
    "data with a far too old ACK number is dropped": 362,
    "data at or after the place of a FIN that came early": 13,
    "in SYN-RECEIVED the SYN again, now with an ACK": 7723,
    "a RST with an old timestamp": 531,
    "a segment without the agreed timestamp": 12,
    "a segment that ends where the next byte is expected": 17,
    "a segment that reaches over the right edge": 3,
}
