"""`python -m bench`: iperf3 from the client's namespace, each subject in turn, round after round."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.subjects import BASE_LINES, PROXIES, SUBJECTS
from ztun.lab import Lab, plan

RESULTS = Path(__file__).parent / "results"
TICKS = os.sysconf("SC_CLK_TCK")


class Load(NamedTuple):
    """One way of loading: TCP flows at once, and the direction seen from the client."""

    flows: int
    direction: str

    def __str__(self) -> str:
        return f"{self.flows} {self.direction}"


LOADS = [Load(flows, direction) for flows in (1, 8) for direction in ("up", "down")]
Samples = dict[str, dict[str, list[float]]]
"""subject -> load -> Gbit/s of each round"""


def main() -> None:
    options = _options()
    console = Console(width=130)
    samples: Samples = {name: {str(load): [] for load in LOADS} for name in options.only}
    cpu: Samples = {name: {str(load): [] for load in LOADS} for name in options.only}
    with Lab() as lab:
        for number in range(options.rounds):
            turn = list(options.only)
            random.Random(number).shuffle(turn)  # a fixed order would favour somebody
            for name in turn:
                console.print(f"round {number + 1}/{options.rounds}: {name}", style="dim", end=" ", highlight=False)
                _measure(lab, name, options, samples[name], cpu[name])
                rates = ", ".join(f"{load} {values[-1]:.2f}" for load, values in samples[name].items())
                console.print(rates, style="dim", highlight=False)
    _print(console, samples, cpu, options)
    console.print(f"[dim]{_save(samples, cpu, options)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each measurement")
    parser.add_argument("--proxy", choices=list(PROXIES), default="danted", help="microsocks copies 1 KB at a time")
    parser.add_argument("--ipv6", action="store_true")
    parser.add_argument("--only", action="append", choices=list(SUBJECTS), help="a subject; may be repeated")
    options = parser.parse_args()
    options.only = options.only or list(SUBJECTS)
    return options


def _measure(
    lab: Lab, name: str, options: argparse.Namespace, rates: dict[str, list[float]], cpu: dict[str, list[float]]
) -> None:
    target = plan.SITE6 if options.ipv6 else plan.SITE4
    with SUBJECTS[name](lab, options.proxy) as pid:
        for load in LOADS:
            before = _cpu_seconds(pid)
            started = time.monotonic()
            rates[str(load)].append(_iperf(lab, target, load, options.seconds))
            cpu[str(load)].append((_cpu_seconds(pid) - before) / (time.monotonic() - started))


def _iperf(lab: Lab, target: str, load: Load, seconds: float) -> float:
    """Gbit/s that arrived. Raises RuntimeError when the run failed."""
    argv = ["iperf3", "--json", "-c", target, "-p", str(plan.IPERF_PORT), "-t", f"{seconds:g}", "-P", str(load.flows)]
    argv += ["--reverse"] * (load.direction == "down")
    answer = json.loads(lab.client.run(*argv, check=False, timeout=seconds + 30).stdout)
    if "error" in answer:
        raise RuntimeError(f"iperf3 to {target}: {answer['error']}")
    return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9


def _cpu_seconds(pid: int | None) -> float:
    """CPU time of a process so far, user and system (proc(5), stat fields 14 and 15)."""
    if pid is None:
        return 0.0
    fields = Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _print(console: Console, samples: Samples, cpu: Samples, options: argparse.Namespace) -> None:
    best = {str(load): _best_peer(samples, str(load)) for load in LOADS}
    title = f"TCP, Gbit/s: median of {options.rounds} × {options.seconds:g} s through {options.proxy}"
    table = Table(
        box=None,
        title_justify="left",
        title=f"{title}, {'IPv6' if options.ipv6 else 'IPv4'} (× the best peer) [CPU of one core]",
    )
    table.add_column("")
    for load in LOADS:
        table.add_column(f"{load.flows} flow{'s' * (load.flows > 1)} {load.direction}", justify="right")
    for name, loads in samples.items():
        cells = []
        for key, values in loads.items():
            median = statistics.median(values)
            ratio = f" ({median / best[key]:.2f}×)" if best[key] else ""
            share = f" [{statistics.median(cpu[name][key]):.0%}]" if name not in BASE_LINES else ""
            cells.append(f"{median:.2f}{ratio}{share}".replace("[", "\\["))
        table.add_row(name, *cells, style="bold" if name == "ztun" else "")
    console.print(table)


def _best_peer(samples: Samples, load: str) -> float:
    peers = (name for name in samples if name != "ztun" and name not in BASE_LINES)
    return max((statistics.median(samples[name][load]) for name in peers), default=0.0)


def _save(samples: Samples, cpu: Samples, options: argparse.Namespace) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("%Y%m%d-%H%M%S.json")
    machine = {"kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version()}
    result = {"options": vars(options), "machine": machine, "gbit_per_s": samples, "cpu": cpu}
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


if __name__ == "__main__":
    main()
