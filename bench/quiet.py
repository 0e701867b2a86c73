"""Is anybody else at work? What one subject leaves behind (the kernel frees 10,000 sockets for seconds, in kworkers)
must not be charged to the next, and other programs spoil every figure on few cores."""

from __future__ import annotations

import time
from pathlib import Path

_BUSY = 0.15  # of all cores: more is not quiet
_LOOK = 0.3  # seconds
_PATIENCE = 10.0


def wait_for_quiet() -> float | None:
    """Wait until the machine is idle. None when it is, else the share of all cores that was busy to the end."""
    deadline = time.monotonic() + _PATIENCE
    while (busy := _busy_share()) > _BUSY:
        if time.monotonic() > deadline:
            return busy
    return None


def _busy_share() -> float:
    idle, total = _times()
    time.sleep(_LOOK)
    idle_after, total_after = _times()
    return 1 - (idle_after - idle) / max(total_after - total, 1)


def _times() -> tuple[int, int]:
    """Idle and all ticks since boot (proc(5), stat): idle and iowait of user … steal."""
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
