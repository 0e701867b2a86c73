"""`ztun up` on a real gateway: what it says, what it tells the service manager, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ztun.control.claims import holders
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import complete

# The writer of MaxMind DB files lies beside the tests of the configuration.
write_database: Callable[[Path, dict[str, Any]], None] = runpy.run_path(
    str(Path(__file__).parents[1] / "config" / "mmdb.py")
)["write_database"]
PROXY = f"socks5://{plan.UPSTREAM4}:{plan.SOCKS_PORT}"
SITE = {"route": {"rules": [{"domain_suffix": ["site.test"], "outbound": "socks"}]}}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture(autouse=True)
def untouched(lab: Lab) -> Iterator[None]:
    """Every test ends its instance; the gateway's network is then what it was before."""
    before = snapshot(lab.gateway)
    yield
    lab.stop()
    assert differences(before, snapshot(lab.gateway)) == []
    with lab.gateway.entered():
        assert holders() == []


def launch(lab: Lab, config: dict[str, Any], *arguments: str, **environment: str) -> Ztun:
    """`ztun up` on `config` without waiting."""
    instance = lab.prepare()
    instance.write(complete(config, instance.directory))
    instance.launch("up", "--config", str(instance.config_path), *arguments, env=os.environ | environment)
    return instance


def ended(instance: Ztun, timeout: float = 15) -> int:
    assert wait_until(lambda: instance.returncode is not None, timeout), instance.output
    assert instance.returncode is not None
    return instance.returncode


def patched(instance_directory: Path, code: str) -> dict[str, str]:
    """The environment in which `code` runs before ztun does: faults that cannot be had from outside."""
    directory = instance_directory / "patch"
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(directory)}


def test_it_says_in_a_few_lines_what_it_did(lab: Lab) -> None:
    instance = launch(lab, SITE)
    instance.wait_ready()
    assert wait_until(lambda: "control" in instance.output)

    assert instance.output.splitlines() == [
        f"ztun      0.1.0 is up, pid {instance.pid}",
        "tun       ztun0, 198.18.0.1/15, 2001:2::1/48, MTU 1500",
        f"captures  lan0, by {instance.routes()['backend']}",
        f"dns       {plan.GATEWAY_LAN4}:53, [{plan.GATEWAY_LAN6}]:53; queries to other servers are answered too",
        f"asks      udp://{plan.UPSTREAM4}:53",
        "default   direct, after 1 rule in 17 prefixes",
        f"control   {instance.socket_path}",
    ]


def test_what_it_says_as_json(lab: Lab) -> None:
    instance = launch(lab, SITE, "--json")
    instance.wait_ready()
    assert wait_until(lambda: instance.output.endswith("\n"))

    said = json.loads(instance.output)
    assert said["tun"] == {"name": "ztun0", "mtu": 1500, "addresses": ["198.18.0.1/15", "2001:2::1/48"]}
    assert said["lan"] == ["lan0"]
    assert said["default"] == {"tag": "direct", "type": "direct", "server": None}


def test_it_runs_on_when_nobody_reads_what_it_says(lab: Lab) -> None:
    instance = lab.prepare()
    instance.write(complete(SITE, instance.directory))
    code = "import os; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
    instance.launch(
        "up", "--config", str(instance.config_path), env=os.environ | patched(lab.prepare().directory, code)
    )
    instance.wait_ready()
    assert lab.page("http://site.test/")["client"] == plan.UPSTREAM4
    assert instance.stop() == 0


def test_the_service_manager_is_told_once_it_works_and_when_it_ends(lab: Lab) -> None:
    path = lab.directory / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(15)
        instance = launch(lab, SITE, NOTIFY_SOCKET=str(path))
        assert manager.recv(200) == f"READY=1\nMAINPID={instance.pid}".encode()
        assert manager.recv(200).startswith(b"STATUS=running; captures lan0 by ")
        assert lab.page("http://site.test/")["client"] == plan.UPSTREAM4, "ready means that traffic is carried"
        instance.stop()
        assert manager.recv(200) == b"STOPPING=1"


@pytest.mark.parametrize(("begun", "found"), [(0, -5), (3, 3), (-10, -10)])
def test_packets_come_first_unless_somebody_chose_otherwise(lab: Lab, begun: int, found: int) -> None:
    instance = lab.prepare()
    instance.write(complete(SITE, instance.directory))
    code = f"import os; os.setpriority(os.PRIO_PROCESS, 0, {begun})"
    instance.launch(
        "up", "--config", str(instance.config_path), env=os.environ | patched(lab.prepare().directory, code)
    )
    instance.wait_ready()
    assert os.getpriority(os.PRIO_PROCESS, instance.pid) == found


def test_by_default_it_answers_dns_on_the_lan_and_asks_the_resolver_of_the_system(lab: Lab) -> None:
    instance = lab.prepare()
    store = str(instance.directory / "fake-ip.db")
    arguments = ("--proxy", PROXY, "--lan", "lan0", "--socket", str(instance.socket_path), "--json")
    instance.launch("up", *arguments, env={**os.environ, "ZTUN_DNS__FAKE_IP__STORE": store})
    instance.wait_ready()
    assert wait_until(lambda: instance.output.endswith("\n"))

    said = json.loads(instance.output)
    assert said["dns"]["listen"] == [f"{plan.GATEWAY_LAN4}:53", f"[{plan.GATEWAY_LAN6}]:53"]
    assert said["dns"]["servers"] == [f"udp://{plan.UPSTREAM4}:53"], "as in the gateway's resolv.conf"
    assert said["default"]["server"] == f"{plan.UPSTREAM4}:{plan.SOCKS_PORT}"
    for server in (plan.GATEWAY_LAN4, plan.GATEWAY_LAN6):
        assert lab.dig(f"@{server}", "site.test").startswith("198.18.")


def test_a_taken_port_53_does_not_keep_it_from_starting_by_default(lab: Lab) -> None:
    with lab.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((plan.GATEWAY_LAN4, 53))
        instance = lab.prepare()
        store = str(instance.directory / "fake-ip.db")
        arguments = ("--proxy", PROXY, "--lan", "lan0", "--socket", str(instance.socket_path))
        instance.launch("up", *arguments, env={**os.environ, "ZTUN_DNS__FAKE_IP__STORE": store})
        instance.wait_ready()
        assert wait_until(lambda: "control" in instance.output)

        assert f'warning app: not answering DNS there at="{plan.GATEWAY_LAN4}:53: port 53 is' in instance.output
        assert f"note      no DNS on {plan.GATEWAY_LAN4}:53: port 53 is taken by " in instance.output
        assert f"(pid {os.getpid()})" in instance.output
        assert lab.dig(f"@{plan.GATEWAY_LAN6}", "site.test").startswith("198.18.")
        instance.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_starts_ends_it_cleanly(lab: Lab, number: int) -> None:
    instance = launch(lab, SITE)
    assert wait_until(instance.socket_path.exists, 10)
    assert instance.stop(number) == 0, instance.output
    assert "Traceback" not in instance.output


def test_down_while_it_starts_ends_it_cleanly(lab: Lab) -> None:
    instance = launch(lab, SITE)
    assert wait_until(instance.socket_path.exists, 10)
    assert instance.command("down", "--socket", str(instance.socket_path)).returncode == 0
    assert ended(instance) == 0, instance.output


@pytest.mark.parametrize(
    "late",
    ["linux.classifier.BpfClassifier.attach", "linux.routes.TunRoutes.up", "linux.classifier.BpfClassifier.learn"],
)
def test_whatever_fails_midway_is_one_line_and_all_of_it_is_undone(lab: Lab, late: str) -> None:
    """An unexpected error in a late step, one in an early step, and one in a step that is never taken."""
    module, name, method = late.rsplit(".", 2)
    code = f"from ztun.platform.{module} import {name} as c\ndef f(*a): raise KeyError('boom')\nc.{method} = f\n"
    instance = launch(lab, SITE, **patched(lab.prepare().directory, code))
    if method == "learn":
        instance.wait_ready()
        return
    assert ended(instance) == 1
    assert instance.output == "ztun: unexpected KeyError: 'boom'; run it with --log-level debug to see where\n"
    assert not instance.socket_path.exists()


def test_a_step_that_cannot_be_undone_is_told_and_the_others_are(lab: Lab) -> None:
    code = "from ztun.gateway.dns import DnsService as d\nasync def f(self): raise OSError('stuck')\nd.close = f\n"
    instance = launch(lab, SITE, **patched(lab.prepare().directory, code))
    instance.wait_ready()
    assert instance.stop() == 1
    assert instance.output.splitlines()[-1] == (
        "ztun: stopped, but could not undo: the DNS service; the log has the reasons"
    )


def test_when_the_device_is_taken_away_and_its_name_is_too_it_ends_and_says_why(lab: Lab) -> None:
    instance = launch(lab, SITE)
    instance.wait_ready()
    os.kill(instance.pid, signal.SIGSTOP)
    lab.gateway.ip("link del ztun0", "link add ztun0 type veth peer name other0")
    try:
        os.kill(instance.pid, signal.SIGCONT)
        assert ended(instance) == 1
        assert "ztun: lost the interface ztun0" in instance.output.splitlines()[-1]
        assert "cannot make it again: interface ztun0 exists already" in instance.output.splitlines()[-1]
    finally:
        lab.gateway.ip("link del ztun0")


def test_a_loop_that_hangs_lets_traffic_pass_and_takes_over_again(lab: Lab) -> None:
    instance = launch(lab, {"route": {"rules": [{"ip_cidr": [plan.SITE4], "outbound": "socks"}]}})
    instance.wait_ready()
    assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        time.sleep(1.2)
        assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.CLIENT4
    finally:
        os.kill(instance.pid, signal.SIGCONT)
    assert wait_until(lambda: lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4)


def test_the_networks_of_a_country_are_decided_in_the_kernel(lab: Lab) -> None:
    path = lab.directory / "country.mmdb"
    write_database(path, {f"{plan.SITE4}/32": {"country": {"iso_code": "DE"}}})
    rules = [{"geoip": ["de"], "outbound": "socks"}]
    instance = launch(lab, {"route": {"rules": rules, "geoip_database": str(path)}})
    instance.wait_ready()
    assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
    entries = next(table["entries"] for table in instance.routes()["maps"] if table["name"] == "prefixes4")
    assert {"prefix": f"{plan.SITE4}/32", "verdict": "tunnel", "rule": 0}.items() <= next(
        entry for entry in entries if entry["prefix"].startswith(plan.SITE4)
    ).items()


def test_the_log_can_be_a_file_of_json(lab: Lab) -> None:
    path = lab.directory / "ztun.log"
    instance = launch(lab, {**SITE, "log": {"format": "json", "file": str(path), "level": "debug"}})
    instance.wait_ready()
    lab.page("http://site.test/")
    instance.stop()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"level", "event", "logger", "timestamp"} <= events[0].keys()
    assert "stopping" in [event["event"] for event in events]
    assert "stopping" not in instance.output


def test_a_log_file_that_cannot_be_written_is_a_configuration_error(lab: Lab) -> None:
    instance = launch(lab, {**SITE, "log": {"file": "/nonexistent/ztun.log"}})
    assert ended(instance) == 2
    assert instance.output == "ztun: log.file: cannot write /nonexistent/ztun.log: No such file or directory\n"
