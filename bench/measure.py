"""How each cell of the table is measured. Every function loads the subject that is active.

They put what they measure into `cells`, and raise RuntimeError for the rest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ztun.lab import Lab, plan

TICKS = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parents[1]
FLOW_STEPS = (100, 1_000, 10_000)
_SETTLE = 0.5  # seconds between the last flow and the look at the memory
_MEGABYTE = 1e6

Cells = dict[str, float]
"""name of a line of the table -> value"""


class Run(NamedTuple):
    """What a measurement needs: the lab with a subject active, its process (None for forwarding), and the options."""

    lab: Lab
    pid: int | None
    seconds: float
    ipv6: bool
    window: int

    @property
    def target(self) -> str:
        return plan.SITE6 if self.ipv6 else plan.SITE4


def throughput(run: Run, cells: Cells) -> None:
    """iperf3, and the CPU time of the subject's process over the same runs, per direction."""
    for direction in ("up", "down"):
        spent, moved = 0.0, 0.0
        for flows in (1, 8):
            before = _cpu_seconds(run.pid)
            rate = _iperf(run, flows, direction)
            spent += _cpu_seconds(run.pid) - before
            moved += rate / 8 * run.seconds  # GB
            cells[f"{flows} flow{'s' * (flows > 1)} {direction}"] = rate
        if run.pid is not None:
            cells[f"CPU {direction}"] = spent / moved


def _iperf(run: Run, flows: int, direction: str) -> float:
    """Gbit/s that arrived."""
    argv = [
        "iperf3",
        "--json",
        "-c",
        run.target,
        "-p",
        str(plan.IPERF_PORT),
        "-t",
        f"{run.seconds:g}",
        "-P",
        str(flows),
    ]
    argv += ["--reverse"] * (direction == "down")
    answer = json.loads(run.lab.client.run(*argv, check=False, timeout=run.seconds + 30).stdout)
    if "error" in answer:
        raise RuntimeError(f"iperf3: {answer['error']}")
    return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9


def requests(run: Run, cells: Cells) -> None:
    cells["requests"] = _wrk(run, 32)[0]


def connections(run: Run, cells: Cells) -> None:
    cells["connections"] = _wrk(run, 32, "-H", "Connection: close")[0]


def latency(run: Run, cells: Cells) -> None:
    cells["latency"] = _wrk(run, 1)[1]


def _wrk(run: Run, clients: int, *arguments: str) -> tuple[float, float]:
    """Requests a second and the median latency in µs."""
    host = f"[{run.target}]" if run.ipv6 else run.target
    # wrk takes whole seconds only.
    argv = ["wrk", "-t1", f"-c{clients}", f"-d{max(round(run.seconds), 1)}", "--latency", *arguments, f"http://{host}/"]
    output = run.lab.client.run(*argv, timeout=run.seconds + 30).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    median = re.search(r"50%\s+([\d.]+)(us|ms|s)\b", output)
    if rate is None or median is None or float(rate[1]) == 0:
        raise RuntimeError(f"wrk: {output}")
    errors = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output)
    if errors is not None and any(map(int, errors.groups())):
        print(f"  wrk: {errors[0]}", file=sys.stderr)
    return float(rate[1]), float(median[1]) * {"us": 1, "ms": 1e3, "s": 1e6}[median[2]]


def udp(run: Run, cells: Cells) -> None:
    for direction in ("up", "down"):
        cells[f"UDP {direction}"] = _datagrams(run, direction)


def _datagrams(run: Run, direction: str) -> float:
    """Thousands of datagrams a second that arrived."""
    argv = [sys.executable, "-m", "bench.datagrams", direction, str(run.seconds), str(run.window)]
    done = run.lab.client.run(*argv, check=False, timeout=run.seconds + 30, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"UDP {direction}: {(done.stdout + done.stderr).strip()[-500:]}")
    result = json.loads(done.stdout)
    return float(result["delivered"] / result["seconds"] / 1e3)


def memory(run: Run, cells: Cells) -> None:
    """Memory of the subject's process with more and more idle flows, and the time each took to open."""
    if run.pid is None:
        return
    cells["memory idle"] = memory_of(run.pid)["Rss"]
    argv = [sys.executable, "-m", "bench.flows", *map(str, FLOW_STEPS)]
    process = run.lab.client.spawn(
        *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    try:
        for step, line in zip(FLOW_STEPS, _lines(process), strict=True):
            time.sleep(_SETTLE)
            used = memory_of(run.pid)
            cells[f"memory {step}"] = used["Rss"]
            if step == FLOW_STEPS[-1]:
                cells["PSS"], cells["private"] = used["Pss"], used["Private"]
            earlier = max((n for n in FLOW_STEPS if n < step), default=0)
            cells[f"time {step}"] = json.loads(line)["seconds"] * 1e6 / (step - earlier)
    finally:
        process.kill()
        process.wait()
    last = FLOW_STEPS[-1]
    cells["per flow"] = (cells[f"memory {last}"] - cells["memory idle"]) * _MEGABYTE / 1e3 / last


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    """A line per step; asks for the next when the caller is back. Raises RuntimeError with the client's last words."""
    assert process.stdin is not None
    assert process.stdout is not None
    for step in FLOW_STEPS:
        line = process.stdout.readline()
        if not line.startswith("{"):
            words = [line, *process.stdout.read().splitlines()]
            raise RuntimeError(f"on the way to {step} flows: {words[-1].strip() or 'no output'}")
        yield line
        process.stdin.write("\n")
        process.stdin.flush()


def memory_of(pid: int) -> dict[str, float]:
    """Rss, Pss and Private (what is nobody else's) of a process in MB (proc(5), smaps_rollup)."""
    text = Path("/proc", str(pid), "smaps_rollup").read_text()
    found = {name: int(size) * 1024 / _MEGABYTE for name, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return {**found, "Private": found["Private_Clean"] + found["Private_Dirty"]}


def _cpu_seconds(pid: int | None) -> float:
    """CPU time of a process so far, user and system (proc(5), stat fields 14 and 15)."""
    if pid is None:
        return 0.0
    fields = Path("/proc", str(pid), "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
