"""`ztun demo` as a person sees it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from ztun.lab.namespace import wait_until
from ztun.lab.ztun import command


def _namespaces(pid: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"ztun-{pid}-*")]


def test_demo_shows_every_step_within_a_minute_and_cleans_up() -> None:
    started = time.monotonic()
    process = subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 0, output
    assert time.monotonic() - started < 60
    for shown in ("198.18.", "the proxy", "the client itself", "NXDOMAIN", "Gbit/s", "203.0.113.0/24", "running"):
        assert shown in output
    assert "✗" not in output
    assert _namespaces(process.pid) == []


@pytest.mark.parametrize("moment", [0.3, 2.5])
def test_interrupted_demo_cleans_up(moment: float) -> None:
    process = subprocess.Popen(command("demo"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert wait_until(lambda: len(_namespaces(process.pid)) == 3)
    time.sleep(moment)

    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=15)

    assert process.returncode not in (0, None)
    assert "Traceback" not in output
    assert "interrupted" in output
    assert _namespaces(process.pid) == []
    assert not list(Path("/tmp").glob(f"ztun-{process.pid}-*"))
