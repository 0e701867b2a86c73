"""packaging/ztun.service under a real systemd: all its restrictions hold, and ztun lives with them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import BASE
from e2e.systemd_world import ROOT, UNIT, Systemd, booted
from ztun.lab import Lab, plan
from ztun.lab.namespace import run, wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import PROXIES

# systemd-analyze(1): 0 is no exposure, 10 all; below 2.5 is what may change the network and take port 53 at least.
MOST_EXPOSURE = 2.5
KEPT = {"CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE"}
CONFIG: dict[str, Any] = {
    "capture": {"lan": ["lan0"]},
    "dns": {"listen": [f"{plan.GATEWAY_LAN4}:53"], "servers": [f"udp://{plan.UPSTREAM4}:53"]},
    "outbounds": PROXIES,
    "route": BASE["route"] | {"rules": [rule for rule in BASE["route"]["rules"] if "bulk" not in str(rule)]},
    "timeouts": {"drain": 0.2},
    "log": {"file": "/var/log/ztun/ztun.log"},
}


@pytest.fixture(scope="module")
def systemd(lab: Lab) -> Iterator[Systemd]:
    """The unit as it is, but for a watchdog that does not take long, and for its results being written down."""
    settings = ["WatchdogSec=3", "RestartSec=0.1", "ExecStopPost=/bin/sh -c 'echo result $SERVICE_RESULT'"]
    with booted(lab, "systemd", json.dumps(CONFIG), settings) as world:
        yield world


@pytest.fixture
def service(systemd: Systemd) -> Systemd:
    """It runs."""
    systemd.systemctl("start", "ztun")
    return systemd


def status(systemd: Systemd) -> dict[str, Any]:
    done = systemd.run("ztun", "status", "--json", check=False)
    answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"state": done.stderr}
    return answer


def seen_as(lab: Lab, address: str = plan.SITE4) -> str | None:
    done = lab.curl(f"http://{address}/", check=False, timeout=2)
    return None if done.returncode else str(json.loads(done.stdout)["client"])


def of_process(pid: int, key: str) -> str:
    text = Path(f"/proc/{pid}/status").read_text()
    return re.search(rf"^{key}:\s*(.*)$", text, re.MULTILINE).group(1)  # type: ignore[union-attr]


def test_the_unit_is_well_formed(tmp_path: Path) -> None:
    """But for the program, which is not installed where the tests run."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("/usr/local/bin/ztun", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_exposes_little() -> None:
    told = run(["systemd-analyze", "security", "--offline=true", "--no-pager", str(UNIT)]).stdout
    found = re.search(r"exposure level for ztun.service: ([\d.]+)", told)
    assert found is not None
    assert float(found.group(1)) < MOST_EXPOSURE, told


def test_it_carries_traffic_within_its_restrictions(lab: Lab, service: Systemd) -> None:
    pid = service.pid()
    assert service.show("ActiveState") == "active"
    now = status(service)
    assert now["backend"] == "tcx"
    assert set(now["privileges"]["capabilities"]) == KEPT
    assert now["privileges"]["no_new_privileges"]
    uids = set(of_process(pid, "Uid").split())
    assert len(uids) == 1
    assert now["privileges"]["user"] == int(uids.pop()) > 0
    assert of_process(pid, "Seccomp") == "2"
    assert of_process(pid, "NoNewPrivs") == "1"
    assert of_process(pid, "CapAmb") == "0" * 16
    assert os.getpriority(os.PRIO_PROCESS, pid) == -5

    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert seen_as(lab, plan.DIRECT4) == plan.CLIENT4
    assert seen_as(lab, f"[{plan.SITE6}]") == plan.UPSTREAM6
    assert wait_until(lambda: "captures lan0 by tcx; " in service.show("StatusText"))


def test_it_makes_the_tun_again_and_captures_from_a_new_interface(lab: Lab, service: Systemd) -> None:
    """With what was not given up."""
    lab.gateway.ip("link del ztun0")
    assert wait_until(lambda: seen_as(lab) == plan.UPSTREAM4)
    lab.gateway.ip("link set lan0 name lan9", "link set lan9 name lan0")
    assert wait_until(lambda: status(service)["network"]["lan"] == [{"name": "lan0", "state": "up"}])
    assert wait_until(lambda: seen_as(lab) == plan.UPSTREAM4)
    assert service.show("NRestarts") == "0"


def test_reload_opens_the_log_anew(service: Systemd) -> None:
    pid = service.show("MainPID")
    service.run("mv", "/var/log/ztun/ztun.log", "/var/log/ztun/ztun.log.1")
    service.systemctl("reload", "ztun")
    assert wait_until(lambda: service.run("test", "-e", "/var/log/ztun/ztun.log", check=False).returncode == 0)
    assert wait_until(lambda: service.show("ActiveState") == "active")
    assert service.show("MainPID") == pid


def test_one_that_hangs_is_ended_and_started_again(lab: Lab, service: Systemd) -> None:
    """Nothing is pinged while the process stands still; clients go direct meanwhile (`fail: open`)."""
    before = service.show("MainPID")
    os.kill(service.pid(), signal.SIGSTOP)
    assert wait_until(lambda: seen_as(lab) == plan.CLIENT4)
    assert wait_until(lambda: service.show("MainPID") not in (before, "0"), 20)
    assert wait_until(lambda: status(service)["state"] == "running", 20)
    assert seen_as(lab) == plan.UPSTREAM4
    assert "result watchdog" in service.output


def test_one_that_is_killed_is_started_again(lab: Lab, service: Systemd) -> None:
    before = service.show("MainPID")
    os.kill(service.pid(), signal.SIGKILL)
    assert wait_until(lambda: service.show("MainPID") not in (before, "0"), 20)
    assert wait_until(lambda: status(service)["state"] == "running", 20)
    assert seen_as(lab) == plan.UPSTREAM4


def test_stopped_it_leaves_nothing(lab: Lab, service: Systemd) -> None:
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT) as sock:
        assert sock.recv(100)
        service.systemctl("stop", "ztun")
        assert end_of(sock) in (b"", None)
    assert service.show("Result") == "success"
    assert [line for line in differences({}, snapshot(lab.gateway)) if "ztun0" in line or "proto 122" in line] == []
    assert seen_as(lab) == plan.CLIENT4
    left = service.run("ls", "-A", "/run/ztun/", check=False)
    assert left.returncode or not left.stdout


def end_of(sock: socket.socket) -> bytes | None:
    """What the flow ends with; None for a reset."""
    try:
        return sock.recv(100)
    except ConnectionResetError:
        return None


def test_what_a_killed_one_left_is_removed(lab: Lab) -> None:
    """Filters of clsact outlive a process; `ztun down` after its end needs no more rights than it had."""
    config = json.dumps(CONFIG | {"capture": {"lan": ["lan0"], "backend": "clsact"}})
    with booted(lab, "killed", config, ["Restart=no"]) as systemd:
        before = snapshot(lab.gateway)
        systemd.systemctl("start", "ztun")
        assert "ztun:ztun0:" in lab.gateway.run("tc", "filter", "show", "dev", "lan0", "ingress").stdout
        os.kill(systemd.pid(), signal.SIGKILL)
        assert wait_until(lambda: systemd.show("ActiveState") == "failed", 30)
        assert differences(before, snapshot(lab.gateway)) == [], systemd.output


def test_wrong_configuration_is_not_tried_again(lab: Lab) -> None:
    with booted(lab, "wrong", '{"tun": {"mtuu": 1500}}', ["RestartSec=0.1"]) as systemd:
        systemd.systemctl("start", "ztun", check=False)
        assert systemd.show("ActiveState") == "failed"
        assert systemd.show("ExecMainStatus") == "2"
        assert systemd.show("NRestarts") == "0"
        assert "tun.mtuu" in systemd.output


def test_the_documents_name_every_setting() -> None:
    """docs/privileges.md says what each part of the unit is for."""
    text = (ROOT / "docs" / "privileges.md").read_text()
    section = UNIT.read_text().partition("[Service]")[2].partition("[Install]")[0]
    keys = re.findall(r"^(\w+)=", section, re.MULTILINE)
    assert [key for key in dict.fromkeys(keys) if f"`{key}" not in text] == []
