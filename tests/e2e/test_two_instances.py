"""Two instances side by side in one network namespace, each with its own LAN, names and Fake-IPs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.lan_sites import Site, one_cable
from ztun.control.claims import holders
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import complete

RULES = [{"domain_suffix": ["test"], "outbound": "socks"}, {"ip_cidr": [plan.SITE4, plan.SITE6], "outbound": "socks"}]
FIRST: dict[str, Any] = {
    "dns": {"fake_ip": {"range": "198.18.0.0/16", "range6": "2001:2:0:1::/64"}},
    "route": {"rules": RULES},
}
SECOND: dict[str, Any] = {
    "tun": {"name": "ztun1"},
    "capture": {"lan": ["lan1"]},
    "dns": {"listen": ["10.10.1.1:53"], "fake_ip": {"range": "198.19.0.0/16", "range6": "2001:2:0:2::/64"}},
    "route": {"rules": [*RULES, {"ip_cidr": [plan.DIRECT4], "outbound": "block"}]},
}


@pytest.fixture(scope="module")
def cable(lab: Lab) -> Iterator[Site]:
    with one_cable(lab) as site:
        yield site


@pytest.fixture
def first(lab: Lab, cable: Site) -> Ztun:
    """The one that is there already; the tests share it, to save its start."""
    running = next((one for one in lab.running() if one.config["capture"]["lan"] == ["lan0"]), None)
    return running or lab.ztun({**FIRST, "capture": {"lan": ["lan0"]}})


def refused(lab: Lab, config: dict[str, Any], **environment: str) -> str:
    """What an instance says that is not let in."""
    instance = lab.prepare()
    instance.write(complete(config, instance.directory))
    instance.launch("up", "--config", str(instance.config_path), env=os.environ | environment)
    assert wait_until(lambda: instance.returncode is not None, 20)
    assert instance.returncode == 1
    return instance.output


@pytest.mark.parametrize("backend_name", ["tcx", "clsact", "routes"])
def test_each_serves_its_lan_and_leaves_the_other_alone(lab: Lab, cable: Site, backend_name: str) -> None:
    before = snapshot(lab.gateway)
    left = lab.ztun({**FIRST, "capture": {"lan": ["lan0"], "backend": backend_name}})
    alone = snapshot(lab.gateway)
    right = lab.ztun({**SECOND, "capture": {"lan": ["lan1"], "backend": backend_name}})
    try:
        for host, address in (("site.test", None), (plan.SITE4, None), (f"[{plan.SITE6}]", None)):
            assert lab.page(f"http://{host}/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6), (host, address)
            assert cable.fetch(f"http://{host}/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
        assert lab.dig("site.test", "A").startswith("198.18.")
        assert cable.namespace.run("dig", "+short", "site.test", "A").stdout.startswith("198.19.")
        # A rule of one of them concerns nobody else.
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
        assert cable.is_refused(f"http://{plan.DIRECT4}/")
        assert [instance.status()["outbounds"]["socks"]["dials"] for instance in (left, right)] >= [3, 3]
        assert {program["ifname"] for program in left.routes()["programs"]} <= {"lan0", "ztun0"}
        assert {program["ifname"] for program in right.routes()["programs"]} <= {"lan1", "ztun1"}
        assert {rule["iif"] for rule in right.routes()["ip_rules"]} <= {"lan1"}
        assert {rule["iif"] for rule in left.routes()["ip_rules"]} <= {"lan0"}
        assert right.stop() == 0
        assert differences(alone, snapshot(lab.gateway)) == []
        assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    finally:
        lab.stop()
    assert differences(before, snapshot(lab.gateway)) == []


def test_a_killed_one_takes_nothing_of_the_other_with_it(lab: Lab, cable: Site, first: Ztun) -> None:
    second = lab.ztun({**SECOND, "capture": {"lan": ["lan1"], "backend": "clsact"}})
    second.kill()
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    again = lab.ztun({**SECOND, "capture": {"lan": ["lan1"], "backend": "clsact"}})
    assert cable.fetch("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert again.stop() == 0


def test_what_two_cannot_share_is_refused_in_one_line(lab: Lab, cable: Site, first: Ztun) -> None:
    who = f"another ztun (pid {first.pid}, --socket {first.socket_path})"
    before = snapshot(lab.gateway)
    assert refused(lab, {**SECOND, "capture": {"lan": ["lan1", "lan0"]}}) == (
        f"ztun: capture.lan: lan0 is in use by {who}; an interface belongs to one instance only, leave it out of one\n"
    )
    assert refused(lab, {**SECOND, "tun": {}}) == f"ztun: tun.name: ztun0 is in use by {who}; choose another name\n"
    assert refused(lab, {**SECOND, "dns": {"listen": []}}) == (
        f"ztun: dns.fake_ip.range: 198.18.0.0/15 overlaps 198.18.0.0/16, which is in use by {who}; "
        "give each a range of its own, as 198.18.0.0/16 and 198.19.0.0/16\n"
    )
    dns = {**SECOND["dns"], "listen": [f"{plan.GATEWAY_LAN4}:53"]}
    assert refused(lab, {**SECOND, "dns": dns}) == (
        f"ztun: dns.listen: {plan.GATEWAY_LAN4}:53 is in use by {who}; choose another address or port\n"
    )
    store = first.config["dns"]["fake_ip"]["store"]
    dns = {**SECOND["dns"], "fake_ip": {**SECOND["dns"]["fake_ip"], "store": store}}
    assert refused(lab, {**SECOND, "dns": dns}) == (
        f"ztun: dns.fake_ip.store: {store} is in use by another ztun (pid {first.pid}); choose another file\n"
    )
    assert refused(lab, {**SECOND, "control": {"socket": str(first.socket_path)}}) == (
        f"ztun: already running as pid {first.pid}; stop it with `ztun down` first\n"
    )
    assert differences(before, snapshot(lab.gateway)) == []
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)


def test_the_commands_find_the_one_that_is_meant(lab: Lab, cable: Site, first: Ztun) -> None:
    second = lab.ztun(SECOND)
    for instance in (first, second):
        by_socket = json.loads(first.command("status", "--json", "--socket", str(instance.socket_path)).stdout)
        by_file = json.loads(first.command("status", "--json", "--config", str(instance.config_path)).stdout)
        assert by_socket["pid"] == by_file["pid"] == instance.pid
    # With neither, it is the default socket; where nobody listens there, they are told who does elsewhere.
    missed = first.command("status", "--socket", str(lab.directory / "nobody.sock"), check=False)
    assert missed.returncode == 1
    for instance in (first, second):
        assert f"--socket {instance.socket_path} (pid {instance.pid})" in missed.stderr
    assert first.command("down", "--socket", str(second.socket_path)).returncode == 0
    assert not second.alive
    assert first.alive


def test_names_and_paths_follow_the_name_of_the_tun(lab: Lab, cable: Site, first: Ztun, tmp_path: Path) -> None:
    config = tmp_path / "second.json"
    config.write_text(json.dumps({**SECOND, "outbounds": first.config["outbounds"]}))
    checked = json.loads(first.command("check", "--json", str(config)).stdout)
    assert checked["ok"]
    missed = first.command("status", "--config", str(config), check=False)
    assert "no control socket at /run/ztun/ztun1.sock" in missed.stderr


def test_a_demo_runs_beside_it(lab: Lab, first: Ztun) -> None:
    shown = first.command("demo", timeout=120)
    assert shown.returncode == 0
    assert first.status()["state"] == "running"
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)


def test_nothing_is_claimed_any_more(lab: Lab) -> None:
    lab.stop()
    with lab.gateway.entered():
        assert holders() == []
