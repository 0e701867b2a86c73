"""Where there is no BPF to be had, whatever the reason, routes take its place, and it is said: once, and aloud."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from e2e.conftest import BASE
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
