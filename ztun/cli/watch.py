"""`--watch`: the same view again and again; in place on a terminal, one after the other in a pipe."""

from __future__ import annotations

import io
import json as jsons
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from ztun.cli.output import make_console

_FIGURES = ("hits", "packets", "bytes")
_NAMES = ("prefix", "address", "counter", "rule")
# The alternate screen (xterm), so that the shell's is as before afterwards; the cursor would only flicker.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _LINE_END, _SCREEN_END = "\x1b[H", "\x1b[K", "\x1b[J"

Answer = dict[str, Any]
Show = Callable[[Console, Mapping[str, Any]], None]


def watch(ask: Callable[[], Answer], interval: float, *, show: Show | None) -> int:
    """Show what `ask` returns each `interval` seconds, with rates, until Ctrl-C. Returns 0. Raises what `ask` raises.

    show: prints an answer for a person; None: a line of JSON each time.
    """
    console = make_console()
    try:
        if show is None:
            for answer in _answers(ask, interval):
                print(jsons.dumps(answer, ensure_ascii=False), flush=True)
        elif console.is_terminal:
            with _screen():
                for answer in _answers(ask, interval):
                    _paint(answer, interval, show)
        else:
            for answer in _answers(ask, interval):
                print(time.strftime("%Y-%m-%d %H:%M:%S"))
                show(console, answer)
                print(flush=True)
    except KeyboardInterrupt:
        pass  # the one way to end it
    return 0


def _answers(ask: Callable[[], Answer], interval: float) -> Iterator[Answer]:
    before: Answer = {}
    asked = 0.0
    while True:
        began = time.monotonic()
        now = ask()
        yield add_rates(now, before, began - asked) if before.get("pid") == now.get("pid") else now
        before, asked = now, began
        time.sleep(max(0.0, began + interval - time.monotonic()))


def add_rates(now: Answer, before: Mapping[str, Any], seconds: float) -> Answer:
    """`now` with "hits_per_s", "packets_per_s" and "bytes_per_s" beside each counter that `before` has as well."""
    if not before:
        return now
    former = dict(_counters(before))
    for place, entry in _counters(now):
        was = former.get(place)
        if was is not None:
            entry |= {
                f"{key}_per_s": round(max(0, entry[key] - was[key]) / seconds, 1)
                for key in _FIGURES
                if key in entry and key in was
            }
    return now


def _counters(answer: Mapping[str, Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """All that counts, with the place where it stands."""
    for name, figures in (answer.get("counters") or {}).items():
        yield ("counters", name), figures
    for rule in answer.get("rules") or ():
        yield ("rules", rule.get("rule")), rule
    for table in answer.get("maps") or ():
        for entry in table["entries"]:
            name = next((entry[key] for key in _NAMES if key in entry), None) if isinstance(entry, dict) else None
            if name is not None:
                yield (table["name"], "map", name), entry


@contextmanager
def _screen() -> Iterator[None]:
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _paint(answer: Answer, interval: float, show: Show) -> None:
    """Over what was there before, and no more lines than the terminal has."""
    terminal = make_console()
    width, height = terminal.size
    drawn = Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system="standard", highlight=False, emoji=False
    )
    show(drawn, answer)
    assert isinstance(drawn.file, io.StringIO)
    lines = [f"every {interval:g} s, {time.strftime('%H:%M:%S')}; Ctrl-C ends", *drawn.file.getvalue().splitlines()]
    if len(lines) > height:
        lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines: a higher terminal shows them"]
    text = f"{_LINE_END}\n".join(line[: 10 * width] for line in lines)
    sys.stdout.write(f"{_HOME}{text}{_LINE_END}{_SCREEN_END}")
    sys.stdout.flush()
