"""`ztun doctor` before, beside and after an instance, with real proxies and a real resolver."""

from __future__ import annotations

import json
from typing import Any

from e2e.conftest import BASE, OUTBOUNDS
from e2e.traffic import start
from ztun.lab import Lab, Ztun
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import PROXIES, complete

HEALTHY: dict[str, Any] = {**BASE, "outbounds": PROXIES, "route": {"default": "socks"}}


def examine(instance: Ztun) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the findings by name."""
    done = instance.command("doctor", "--json", "--config", str(instance.config_path), check=False)
    return done.returncode, {each["name"]: each for each in json.loads(done.stdout)["findings"]}


def test_a_healthy_gateway_has_no_problem_and_stays_as_it_was(lab: Lab) -> None:
    lab.stop()
    instance = lab.prepare()
    instance.write(complete(HEALTHY, instance.directory))
    instance.config_path.chmod(0o600)
    before = snapshot(lab.gateway)

    code, found = examine(instance)

    assert differences(before, snapshot(lab.gateway)) == []
    # How many files this machine lets us open is its own business.
    assert [each for each in found.values() if each["level"] != "ok" and each["name"] != "open-files"] == []
    assert code == (1 if found["open-files"]["level"] == "problem" else 0)
    assert all(proxy["tag"] in found["proxies"]["detail"] for proxy in PROXIES)


def test_beside_its_instance_nothing_of_it_is_taken_for_somebody_elses(lab: Lab) -> None:
    for backend in ("tcx", "clsact", "routes"):
        instance = start(lab, {**HEALTHY, "capture": {"backend": backend}})
        instance.config_path.chmod(0o600)
        _code, found = examine(instance)
        assert str(instance.pid) in found["instance"]["detail"]
        others = ("tun-name", "fake-ip", "qdisc", "programs", "foreign-xdp", "ip-rules", "leftovers", "port-53")
        assert {name: found[name]["level"] for name in others} == dict.fromkeys(others, "ok"), backend


def test_proxies_that_refuse_are_named(lab: Lab) -> None:
    lab.stop()
    instance = lab.prepare()
    instance.write(complete({**HEALTHY, "outbounds": OUTBOUNDS}, instance.directory))
    code, found = examine(instance)
    assert code == 1
    faults = found["proxies"]["detail"].split("; ")
    assert [fault.split(":")[0] for fault in faults] == ["socks-badauth", "socks-gone"]
    assert "refuses username and password" in faults[0]
    assert "connection refused" in faults[1]
