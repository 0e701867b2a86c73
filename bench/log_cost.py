"""`python -m bench.log_cost`: what the log at `info` costs, a line for each flow that ends, against `error`."""

from __future__ import annotations

import signal
import statistics

from bench.measure import Cells, Run, connections, throughput
from bench.servers import start_servers
from ztun.lab import Lab, plan

ROUNDS = 5
SECONDS = 2.0


def measure(lab: Lab, level: str) -> Cells:
    cells: Cells = {}
    instance = lab.ztun(
        {
            "outbounds": [{"tag": "it", "type": "socks5", "server": f"{plan.UPSTREAM4}:{plan.SOCKS_PORT}"}],
            "route": {"rules": [{"ip_cidr": [plan.SITE4], "outbound": "it"}]},
            "log": {"level": level},
        }
    )
    try:
        run = Run(lab, instance.pid, SECONDS, False, 256)
        connections(run, cells)
        throughput(run, cells)
        return cells
    finally:
        instance.stop(signal.SIGTERM)


def main() -> None:
    found: dict[str, list[Cells]] = {"error": [], "info": []}
    with Lab() as lab:
        start_servers(lab)
        for number in range(ROUNDS):
            for level in ("error", "info") if number % 2 else ("info", "error"):
                found[level].append(measure(lab, level))
    for line in ("connections", "1 flow up", "1 flow down", "8 flows up", "8 flows down"):
        without, with_log = (statistics.median(cells[line] for cells in found[level]) for level in ("error", "info"))
        print(f"{line:<14} {without:10.2f} at error, {with_log:10.2f} at info: {with_log / without:.3f}")


if __name__ == "__main__":
    main()
