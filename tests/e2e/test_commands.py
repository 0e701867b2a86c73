"""The commands against a running gateway, and their JSON as an interface."""

from __future__ import annotations

import json
import os

import pytest

from e2e.conftest import BASE
from ztun.lab import Lab, Ztun, plan
from ztun.lab.ztun import complete


def test_up_says_what_it_did_in_a_few_lines(lab: Lab, any_ztun: Ztun) -> None:
    lines = any_ztun.output.splitlines()

    assert 1 <= len(lines) <= 15
    assert "ztun0" in any_ztun.output
    assert "lan0" in any_ztun.output


def test_status_json_has_the_promised_keys(lab: Lab, any_ztun: Ztun) -> None:
    lab.page("http://site.test/")
    status = json.loads(any_ztun.command("status", "--json", "--config", str(any_ztun.config_path)).stdout)

    assert {"state", "uptime_s", "tcp", "udp", "icmp", "dns", "pool", "outbounds", "drops"} <= status.keys()
    assert status["state"] == "running"
    assert status["tcp"]["total"] >= 1
    assert "active" in status["tcp"]


def test_routes_json_has_the_promised_keys(lab: Lab, ztun: Ztun, backend: str) -> None:
    routes = json.loads(ztun.command("routes", "--json", "--socket", str(ztun.socket_path)).stdout)

    assert {"backend", "routes", "ip_rules", "programs", "maps", "counters"} <= routes.keys()
    assert routes["backend"] == backend
    assert all({"name", "type", "entries"} <= entry.keys() for entry in routes["maps"])
    # What routes capture is counted by the TUN alone, and ip rules do what a program does elsewhere.
    assert {"packets", "bytes"} <= routes["counters"]["tunnel" if backend == "routes" else "direct"].keys()
    if backend == "routes":
        assert routes["programs"] == []
        assert "lan0" in {rule["iif"] for rule in routes["ip_rules"]}
        return
    program = next(program for program in routes["programs"] if program["ifname"] == "lan0")
    assert {"name", "hook", "ifname", "id"} <= program.keys()
    assert program["id"] in ztun.bpf_ids()["prog"]


def test_routes_show_every_prefix_with_verdict_and_rule(lab: Lab, ztun: Ztun) -> None:
    text = ztun.command("routes", "--config", str(ztun.config_path)).stdout

    for expected in ("198.18.0.0/15", "2001:2::/48", "203.0.113.0/24", f"{plan.BLOCKED4}/32", "lan0", "ztun0"):
        assert expected in text


def test_status_is_readable(lab: Lab, any_ztun: Ztun) -> None:
    text = any_ztun.command("status", "--config", str(any_ztun.config_path)).stdout

    assert "running" in text
    assert "socks" in text


def test_commands_without_an_instance_fail_with_one_line(lab: Lab) -> None:
    nobody = lab.prepare()
    for command in ("status", "routes", "down"):
        done = nobody.command(command, "--socket", str(nobody.socket_path), check=False)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "not running" in done.stderr


def test_check_accepts_what_up_accepts_and_changes_nothing(lab: Lab) -> None:
    instance = lab.prepare()
    instance.write(complete(BASE, instance.directory))

    assert instance.command("check", str(instance.config_path)).returncode == 0
    assert json.loads(instance.command("check", "--json", str(instance.config_path)).stdout)


@pytest.mark.parametrize(
    "proxy",
    [
        f"socks5://{plan.UPSTREAM4}:{plan.SOCKS_PORT}",
        f"socks5://{plan.PROXY_USER}:{plan.PROXY_PASSWORD}@{plan.UPSTREAM4}:{plan.SOCKS_AUTH_PORT}",
        f"http://{plan.PROXY_USER}:{plan.PROXY_PASSWORD}@{plan.UPSTREAM4}:{plan.HTTP_PROXY_AUTH_PORT}",
    ],
    ids=["socks5", "socks5-auth", "http-auth"],
)
def test_up_without_a_file_proxies_everything(lab: Lab, proxy: str) -> None:
    lab.stop()
    instance = lab.prepare()
    env = {**os.environ, "ZTUN_DNS__FAKE_IP__STORE": str(instance.directory / "fake-ip.db")}
    arguments = ("--proxy", proxy, "--lan", "lan0", "--socket", str(instance.socket_path))
    instance.launch("up", *arguments, env=env)
    try:
        instance.wait_ready()
        # The client asks a resolver that is not there at all; hijacking answers.
        fake = lab.dig("@192.0.2.1", "site.test")
        assert lab.page("http://site.test/", "--resolve", f"site.test:80:{fake}")["client"] in (
            plan.UPSTREAM4,
            plan.UPSTREAM6,
        )
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.UPSTREAM4
    finally:
        assert instance.stop() == 0


def test_environment_overrides_the_file(lab: Lab) -> None:
    lab.stop()
    instance = lab.prepare()
    instance.write(complete({}, instance.directory))
    env = {**os.environ, "ZTUN_TUN__NAME": "fromenv0"}
    instance.launch("up", "--config", str(instance.config_path), env=env)
    try:
        instance.wait_ready()
        assert "fromenv0" in lab.gateway.run("ip", "link").stdout
    finally:
        assert instance.stop() == 0
