"""This kernel's TCP as the client of a Gateway, over a real TUN that loses, repeats and reorders packets both ways."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_WORLD = Path(__file__).with_name("lossy_world.py")
_SIZE = 4 << 20  # bytes, down and then up


def transfer(**options: Any) -> dict[str, Any]:
    """Run a world in a namespace of its own, which goes with its process."""
    defaults = {"size": _SIZE, "seed": 1, "drop": 0.0, "repeat": 0.0, "delay": 0.0, "family": 4}
    command = ["unshare", "--net", sys.executable, str(_WORLD), json.dumps(defaults | options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


# Seconds one way. A lost super-segment can be a whole flight, and no retransmission time-out is below 0.2 s.
@pytest.mark.parametrize(
    ("size", "drop", "repeat", "delay", "limit"),
    [
        (_SIZE, 0.0, 0.0, 0.0, 1.0),
        (_SIZE, 0.0, 0.1, 0.1, 5.0),
        (_SIZE, 0.02, 0.02, 0.02, 5.0),
        (_SIZE, 0.05, 0.02, 0.02, 15.0),
        (_SIZE >> 4, 0.1, 0.05, 0.05, 15.0),
    ],
    ids=["fair", "disordered", "poor", "bad", "terrible"],
)
def test_a_few_megabytes_arrive_whole_and_in_time(
    size: int, drop: float, repeat: float, delay: float, limit: float
) -> None:
    family = 6 if drop in (0.02, 0.1) else 4
    outcome = transfer(size=size, drop=drop, repeat=repeat, delay=delay, family=family)
    assert outcome["down"], outcome
    assert outcome["up"], outcome
    assert outcome["down_took"] < limit, outcome
    assert outcome["up_took"] < limit, outcome
    assert outcome["errors"] == 0, outcome
    assert outcome["dropped"] > 0 or drop < 0.05
