"""Where there is no BPF to be had, whatever the reason, routes take its place, and it is said: once, and aloud."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import BASE
from e2e.foreign import attach_tcx, load
from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import complete

NO_BPF = str(Path(__file__).with_name("no_bpf.py"))
# What root has is what the bounding set lets it have after exec (capabilities(7)).
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set", "-bpf,-sys_admin,-perfmon", "--inh-caps", "-all"]
WAYS = {
    "no privilege": (WITHOUT_PRIVILEGE, "Operation not permitted"),
    "lockdown": ([sys.executable, NO_BPF, "EPERM"], "Operation not permitted"),
    "an old kernel": ([sys.executable, NO_BPF, "ENOSYS"], "Function not implemented"),
}
NEXT = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = TCX_NEXT; exit
SAID = "no BPF: capturing with routes alone"


def without(lab: Lab, way: str, **capture: str) -> Ztun:
    """`ztun up` in such a place, launched."""
    lab.stop()
    instance = lab.prepare()
    instance.wrapper = tuple(WAYS[way][0])
    instance.write(complete({**BASE, "capture": capture}, instance.directory))
    instance.launch("up", "--config", str(instance.config_path))
    return instance


@pytest.mark.parametrize("way", WAYS)
def test_routes_take_over_and_it_is_said_wherever_one_looks(lab: Lab, way: str) -> None:
    instance = without(lab, way)
    instance.wait_ready()

    reason = instance.status()["fallback_reason"]
    assert WAYS[way][1] in reason
    assert "\n" not in reason
    assert instance.output.count(SAID) == 1
    assert reason in instance.output
    for command in ("status", "routes"):
        arguments = (command, "--socket", str(instance.socket_path))
        answer = json.loads(instance.command(*arguments, "--json").stdout)
        assert (answer["backend"], answer["fallback_reason"]) == ("routes", reason)
        told = " ".join(instance.command(*arguments).stdout.split())
        assert f"instead of the first choice: {' '.join(reason.split())}" in told

    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    assert lab.page(f"http://[{plan.SITE6}]/")["client"] == plan.UPSTREAM6
    assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
    with pytest.raises(TimeoutError):
        lab.client.connect(plan.BLOCKED4, plan.HTTP_PORT, timeout=0.5)
    assert instance.stop() == 0, instance.output
    assert "Traceback" not in instance.output


@pytest.mark.parametrize("backend", ["bpf", "tcx", "clsact"])
def test_where_bpf_was_asked_for_it_is_an_error_of_one_line(lab: Lab, backend: str) -> None:
    instance = without(lab, "an old kernel", backend=backend)
    assert wait_until(lambda: not instance.alive, 15)
    assert instance.returncode == 1
    assert instance.output.splitlines()[-1].startswith("ztun: BPF programs not loaded: ")
    assert "Traceback" not in instance.output


@contextlib.contextmanager
def full_hook(lab: Lab) -> Iterator[None]:
    """As many programs of somebody else's on lan0 as TCX takes, each of which lets everything pass."""
    fds: list[int] = []
    try:
        with contextlib.suppress(OSError):  # ERANGE, at last
            while True:
                fds.append(load("theirs", NEXT))
                fds.append(attach_tcx(lab.gateway, "lan0", fds[-1]))
        assert len(fds) > 100
        yield
    finally:
        for fd in fds:
            os.close(fd)


def test_an_interface_that_refuses_is_captured_by_routes_until_it_takes_the_program(lab: Lab) -> None:
    with full_hook(lab):
        instance = start(lab, BASE)
        reason = "lan0 by routes, cannot attach to lan0 (tcx): Numerical result out of range"
        status = instance.status()
        assert (status["backend"], status["fallback_reason"]) == ("tcx", reason)
        assert status["network"]["lan"] == [{"name": "lan0", "state": "up"}]
        assert instance.output.count("no BPF on an interface: capturing from it by routes") == 1
        told = " ".join(instance.command("routes", "--socket", str(instance.socket_path)).stdout.split())
        assert reason in told
        assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
        assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
    lab.gateway.ip("link set lan0 alias theirs-are-gone")  # tried again when the network changes
    assert wait_until(lambda: instance.status()["fallback_reason"] is None)
    assert instance.routes()["ip_rules"] == []
    assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    assert instance.stop() == 0, instance.output
