"""The servers in upstream that the laboratory does not have."""

from __future__ import annotations

import functools
import sys

from bench import datagrams, sink
from bench.measure import ROOT
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until


def start_servers(lab: Lab) -> None:
    """The sink, and the far end of the datagrams. Raises RuntimeError when one does not listen."""
    for name, argv in {"sink": ["bench.sink", str(sink.PORT)], "datagrams": ["bench.datagrams", "serve"]}.items():
        lab.spawn(lab.upstream, name, sys.executable, "-m", *argv, cwd=ROOT)
    for port in (sink.PORT, datagrams.CONTROL_PORT):
        if not wait_until(functools.partial(_listens, lab, port)):
            raise RuntimeError(f"nobody listens on port {port} in upstream")


def _listens(lab: Lab, port: int) -> bool:
    with lab.upstream.socket() as probe:
        return probe.connect_ex((plan.UPSTREAM4, port)) == 0
