"""The result for people: a line per measurement, a column per subject, the ratio to the best peer and the goal."""

from __future__ import annotations

import statistics

from rich.table import Table

from bench.rows import LINES, Line
from bench.subjects import OURS, PEERS

Samples = dict[str, dict[str, list[float]]]
"""subject -> line -> value of each round"""


def median(samples: Samples, subject: str, line: str) -> float | None:
    values = samples.get(subject, {}).get(line)
    return statistics.median(values) if values else None


def best_peer(samples: Samples, line: str) -> float | None:
    medians = [value for name in PEERS if (value := median(samples, name, line)) is not None]
    if not medians:
        return None
    return max(medians) if LINES[line].more_is_better else min(medians)


def verdict(samples: Samples, subject: str, line: str) -> tuple[float | None, bool | None]:
    """The ratio to the best peer, and whether the goal is met; None for what cannot be said."""
    value, best, rule = median(samples, subject, line), best_peer(samples, line), LINES[line]
    ratio = value / best if value is not None and best else None
    judged = value if rule.absolute else ratio
    if rule.goal is None or judged is None:
        return ratio, None
    return ratio, judged >= rule.goal if rule.more_is_better else judged <= rule.goal


def make_table(samples: Samples, rows: list[str], title: str) -> Table:
    table = Table(box=None, title=title, title_justify="left", pad_edge=False)
    ours = [name for name in samples if name in OURS]
    table.add_column("", no_wrap=True)
    for name in samples:
        table.add_column(name, justify="right", style="bold" if name in OURS else "", overflow="fold")
    for name in ours:
        table.add_column("ratio" if len(ours) == 1 else f"ratio {name.removeprefix('ztun ')}", justify="right")
    table.add_column("goal", justify="right")
    table.add_column("met")
    for line, rule in LINES.items():
        if rule.row in rows:
            cells = [_number(median(samples, name, line)) for name in samples]
            verdicts = [verdict(samples, name, line) for name in ours]
            ratios = ["" if ratio is None else f"{ratio:.2f}" for ratio, _ in verdicts]
            met = ["" if met is None else "yes" if met else "NO" for _, met in verdicts]
            table.add_row(f"{line}, {rule.unit}", *cells, *ratios, _goal(rule), " ".join(met))
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _goal(rule: Line) -> str:
    if rule.goal is None:
        return ""
    sign = "≥" if rule.more_is_better else "≤"
    return f"{sign} {rule.goal:g}{' ' + rule.unit if rule.absolute else ' ×'}"
