"""The table: what is measured for `--rows`, and how each line of the result is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench.measure import Cells, Run, connections, latency, memory, requests, throughput, udp
from ztun.lab.servers import SOCKS_UDP


class Row(NamedTuple):
    """What `--rows` names: a measurement, the proxy it goes through, and how its lines are judged."""

    measure: Callable[[Run, Cells], None]
    proxy: str


class Line(NamedTuple):
    """A line of the table. goal: of the ratio to the best peer, or of the value itself when `absolute`."""

    row: str
    unit: str
    more_is_better: bool = True
    goal: float | None = None
    absolute: bool = False


ROWS: dict[str, Row] = {
    "throughput": Row(throughput, SOCKS_UDP),
    "requests": Row(requests, SOCKS_UDP),
    "latency": Row(latency, SOCKS_UDP),
    "udp": Row(udp, "sink"),
    "connections": Row(connections, "microsocks"),
    "cpu": Row(throughput, SOCKS_UDP),
    "memory": Row(memory, "sink"),
}
LINES: dict[str, Line] = {
    "1 flow up": Line("throughput", "Gbit/s", goal=1.5),
    "1 flow down": Line("throughput", "Gbit/s", goal=1.5),
    "8 flows up": Line("throughput", "Gbit/s", goal=1.5),
    "8 flows down": Line("throughput", "Gbit/s", goal=1.5),
    "CPU up": Line("cpu", "s/GB", more_is_better=False, goal=0.6),
    "CPU down": Line("cpu", "s/GB", more_is_better=False, goal=0.6),
    "requests": Line("requests", "1/s", goal=1.2),
    "connections": Line("connections", "1/s", goal=1.2),
    "latency": Line("latency", "µs", more_is_better=False, goal=0.8),
    "UDP up": Line("udp", "1000/s", goal=1.2),
    "UDP down": Line("udp", "1000/s", goal=1.2),
    "memory 10000": Line("memory", "MB", more_is_better=False, goal=150, absolute=True),
    "PSS": Line("memory", "MB", more_is_better=False),
    "private": Line("memory", "MB", more_is_better=False),
    "memory idle": Line("memory", "MB", more_is_better=False),
    "memory 100": Line("memory", "MB", more_is_better=False),
    "memory 1000": Line("memory", "MB", more_is_better=False),
    "per flow": Line("memory", "kB", more_is_better=False),
    "time 100": Line("memory", "µs/flow", more_is_better=False),
    "time 1000": Line("memory", "µs/flow", more_is_better=False),
    "time 10000": Line("memory", "µs/flow", more_is_better=False),
}
