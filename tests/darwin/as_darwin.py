"""`python as_darwin.py ARGUMENTS` is `ztun ARGUMENTS` with the macOS part of ztun, on Linux.

sys.platform says "darwin" while the two modules are imported that look at it, and nowhere else. What macOS would do is
done by the stand-ins beside this file. The directory of resolver(5) and that of the saved sysctls are given by the
environment: ZTUN_TEST_RESOLVER, ZTUN_TEST_RUN, and that of what instances claim by ZTUN_TEST_CLAIMS;
ZTUN_TEST_TRACE is a file that gets, at the end, what was asked for.
"""

from __future__ import annotations

# First of all what looks at sys.platform itself, and has to see the truth.
import asyncio  # noqa: F401
import atexit
import contextlib
import ctypes  # noqa: F401
import json
import os
import platform  # noqa: F401
import signal
import subprocess  # noqa: F401
import sys
import tempfile  # noqa: F401
from pathlib import Path

import structlog  # noqa: F401


def _become_darwin() -> None:
    before, sys.platform = sys.platform, "darwin"
    try:
        import ztun.defaults
        import ztun.platform  # noqa: F401
    finally:
        sys.platform = before


def main() -> int:
    _become_darwin()
    from darwin.kqueue_stand_in import EpollQueue
    from darwin.stand_in import LinuxStandIn
    from ztun.control import claims
    from ztun.platform import darwin
    from ztun.platform.darwin import forwarding, instances, resolver

    calls = LinuxStandIn()
    darwin.use(calls, EpollQueue)
    resolver.DIRECTORY = Path(os.environ["ZTUN_TEST_RESOLVER"])
    forwarding.DIRECTORY = Path(os.environ["ZTUN_TEST_RUN"])
    claims.FILES = instances.DIRECTORY = Path(os.environ["ZTUN_TEST_CLAIMS"])
    trace = Path(os.environ["ZTUN_TEST_TRACE"])

    def write() -> None:
        with contextlib.suppress(PermissionError):
            trace.write_text(json.dumps({"ran": calls.ran, "frames": [frame.hex() for frame in calls.frames]}))

    atexit.register(write)
    from ztun import privileges

    privileges.current = lambda thread="": None  # macOS has no capabilities(7)
    signal.signal(signal.SIGUSR2, lambda *_: [bridge.remove() for bridge in calls.bridges.values()])
    from ztun.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
