"""`python -m bench`: every measurement on every subject in turn, round after round, in one laboratory."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import time
from pathlib import Path

from rich.console import Console

from bench.measure import Cells, Run
from bench.quiet import wait_for_quiet
from bench.rows import LINES, ROWS
from bench.servers import start_servers
from bench.subjects import OURS, SUBJECTS
from bench.table import Samples, make_table, verdict
from ztun.lab import Lab
from ztun.lab.servers import SOCKS_UDP

RESULTS = Path(__file__).parent / "results"
_DESCRIPTORS = 65_536  # 10,000 flows; sing-tun system has two sockets for each


def main() -> None:
    options = _options()
    console = Console(width=170, highlight=False)
    _allow_descriptors()
    samples: Samples = {name: {} for name in options.only}
    failures: list[str] = []
    started = time.monotonic()
    order = random.Random(0)
    with Lab() as lab:
        start_servers(lab)
        for title, rounds, rows in _passes(options):
            for number in range(rounds):
                turn = list(options.only)
                order.shuffle(turn)  # a fixed order would favour somebody
                for name in turn:
                    at = f"{title} {number + 1}/{rounds}, {time.monotonic() - started:.0f} s"
                    if busy := wait_for_quiet():
                        failures.append(f"quiet: {at}: {name} began while {busy:.0%} of the machine was busy")
                    console.print(f"[dim]{at}: {name}")
                    for proxy, measured in _by_proxy(options, rows).items():
                        failures += _measure(lab, name, proxy, measured, options, samples[name])
    seconds = time.monotonic() - started
    title = f"Medians of {options.rounds} rounds of {options.seconds:g} s, {'IPv6' if options.ipv6 else 'IPv4'}"
    console.print(make_table(samples, options.rows, f"{title}; the run took {seconds:.0f} s"))
    for failure in dict.fromkeys(failures):
        console.print(f"[yellow]note:[/] {failure}")
    console.print(f"[dim]{_save(samples, failures, options, seconds)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, help="of each measurement")
    parser.add_argument("--quick", action="store_true", help="one round of a second each, about two minutes")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of %(default)s")
    parser.add_argument("--proxy", choices=[SOCKS_UDP, "microsocks"], help="for all rows that use a real one")
    parser.add_argument("--window", type=int, default=256, help="datagrams under way; 0 floods")
    parser.add_argument("--memory-rounds", type=int, default=1, help="memory hardly varies")
    parser.add_argument("--ipv6", action="store_true")
    parser.add_argument("--only", action="append", choices=list(SUBJECTS), help="a subject; may be repeated")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    options.seconds = options.seconds or (1 if options.quick else 2)
    options.rows = options.rows.split(",")
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    options.only = options.only or list(SUBJECTS)
    return options


def _allow_descriptors() -> None:
    """For us and all that is started here: as many as are wanted, or as the hard limit allows where it is fixed."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(_DESCRIPTORS, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
    except (ValueError, OSError):  # no CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _passes(options: argparse.Namespace) -> list[tuple[str, int, list[str]]]:
    """(title, rounds, rows). Memory comes last: 10,000 flows leave work behind for whoever is measured next."""
    others = [name for name in options.rows if name != "memory"]
    passes = [("round", options.rounds, others)] if others else []
    return passes + ([("memory", options.memory_rounds, ["memory"])] if "memory" in options.rows else [])


def _by_proxy(options: argparse.Namespace, rows: list[str]) -> dict[str, list[str]]:
    """proxy -> rows to measure through it. Two rows that are one measurement are measured once."""
    found: dict[str, list[str]] = {}
    measured = set()
    for name in rows:
        row = ROWS[name]
        if row.measure not in measured:
            measured.add(row.measure)
            proxy = row.proxy if row.proxy == "sink" else options.proxy or row.proxy
            found.setdefault(proxy, []).append(name)
    return found


def _measure(
    lab: Lab, name: str, proxy: str, rows: list[str], options: argparse.Namespace, cells: dict[str, list[float]]
) -> list[str]:
    """Start a subject, measure, and stop it. Returns what could not be measured; the others go on."""
    failures = []
    try:
        with SUBJECTS[name](lab, proxy) as pid:
            run = Run(lab, pid, options.seconds, options.ipv6, options.window)
            for row in rows:
                found: Cells = {}
                try:
                    ROWS[row].measure(run, found)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    failures.append(f"{name}, {row}: {error}")
                for line, value in found.items():
                    cells.setdefault(line, []).append(value)
    except RuntimeError as error:
        failures.append(f"{name}, {', '.join(rows)}: {error}")
    return failures


def _save(samples: Samples, failures: list[str], options: argparse.Namespace, seconds: float) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
    goals = {
        line: {name: verdict(samples, name, line)[1] for name in samples if name in OURS}
        for line, rule in LINES.items()
        if rule.goal is not None and rule.row in options.rows
    }
    result = {
        "options": vars(options),
        "machine": machine,
        "seconds": round(seconds),
        "units": {line: rule.unit for line, rule in LINES.items()},
        "samples": samples,
        "goals_met": goals,
        "notes": failures,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


if __name__ == "__main__":
    main()
