"""What can be told of the virtual machines without starting one: scripts, addresses, and the world they live in.

tests/vm is what runs in them: `make vm-smoke`, `make vm-test`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from documented import ROOT

from ztun.lab import plan
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import PROXIES

VAGRANT = ROOT / "vagrant"
MACHINES: dict[str, Any] = json.loads((VAGRANT / "machines.json").read_text())
CONFIG = VAGRANT / "provision" / "config.json"


def _scripts() -> Iterator[Path]:
    """Shell scripts of vagrant/ and packaging/, known by their first line."""
    for path in sorted([*VAGRANT.rglob("*"), *(ROOT / "packaging").iterdir()]):
        if path.is_file() and path.read_bytes().startswith((b"#!/bin/sh\n", b"#!/usr/bin/env bash\n")):
            yield path


@pytest.fixture(scope="module")
def network() -> ModuleType:
    """vagrant/provision/network.py, which runs in the guests."""
    path = VAGRANT / "provision" / "network.py"
    spec = importlib.util.spec_from_file_location("vagrant_network", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shell_scripts_are_sound_and_can_be_run() -> None:
    scripts = list(_scripts())
    assert len(scripts) >= 9
    assert [path.name for path in scripts if not os.access(path, os.X_OK)] == []
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_vagrantfile_is_ruby() -> None:
    done = subprocess.run(["ruby", "-c", VAGRANT / "Vagrantfile"], capture_output=True, text=True, check=False)
    assert done.stdout == "Syntax OK\n", done.stderr


def test_machines_are_where_the_laboratory_has_them() -> None:
    links = {(name, link["name"]): link for name, machine in MACHINES.items() for link in machine["links"]}
    assert {place: (link["network"], link["address"]) for place, link in links.items()} == {
        ("client", "lan0"): ("ztun-lan", plan.CLIENT4),
        ("gateway", "lan0"): ("ztun-lan", plan.GATEWAY_LAN4),
        ("gateway", "wan0"): ("ztun-wan", plan.GATEWAY_WAN4),
        ("upstream", "wan0"): ("ztun-wan", plan.UPSTREAM4),
    }
    assert len({link["mac"] for link in links.values()}) == len(links)


@pytest.mark.parametrize("name", MACHINES)
def test_the_network_inside_is_that_of_the_plan(network: ModuleType, name: str) -> None:
    role = network.ROLES[name]
    for link in MACHINES[name]["links"]:
        text = network.network_file(role, link["name"])
        assert f"Address={link['address']}/24\n" in text
        assert f"Name={link['name']}\n" in text
    assert role.links.keys() == {link["name"] for link in MACHINES[name]["links"]}
    assert role.routes.keys() <= role.links.keys()


def test_routes_lead_from_the_client_to_upstream_and_back(network: ModuleType) -> None:
    client = network.network_file(network.ROLES["client"], "lan0")
    assert f"[Route]\nDestination=0.0.0.0/0\nGateway={plan.GATEWAY_LAN4}\nPreferredSource={plan.CLIENT4}\n" in client
    upstream = network.network_file(network.ROLES["upstream"], "wan0")
    assert f"[Route]\nDestination=fd10:10::/32\nGateway={plan.GATEWAY_WAN6}\n" in upstream


def test_the_gateways_configuration_is_good_and_about_this_network() -> None:
    command = [sys.executable, "-c", "import sys; from ztun.cli import main; sys.exit(main())", "check", str(CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    config = json.loads(CONFIG.read_text())
    assert all(outbound in PROXIES for outbound in config["outbounds"])
    assert config["dns"]["listen"] == [f"{plan.GATEWAY_LAN4}:53", f"[{plan.GATEWAY_LAN6}]:53"]
    assert config["dns"]["servers"] == [f"udp://{plan.UPSTREAM4}:53"]
    blocked = [
        rule["ip_cidr"] for rule in config["route"]["rules"] if rule["outbound"] == "block" and "ip_cidr" in rule
    ]
    assert blocked == [[f"{plan.BLOCKED4}/32", f"{plan.BLOCKED6}/128"]]


def test_what_runs_in_the_machines_can_be_collected() -> None:
    """`make test` leaves it out (norecursedirs), so nothing else would notice a broken import before the night."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "tests/vm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("tests/vm/test_") > 50


class TestWorld:
    """vagrant/world.py: whatever happens in there, nothing of it is left."""

    def test_it_hands_on_the_exit_code_and_sees_nothing_of_the_host(self, tmp_path: Path) -> None:
        done = self._run(tmp_path, 'ls /sys/class/net; ls -d "$ZTUN_VM_RUN"; exit 7')
        seen, place = done.stdout.split()
        assert (done.returncode, seen) == (7, "lo")
        assert not Path(place).exists()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_reaches_the_command_once(self, tmp_path: Path, number: signal.Signals) -> None:
        heard = f"trap 'echo heard; exit 5' {number}; touch ready; for i in $(seq 600); do sleep 0.1; done"
        with self._started(tmp_path, heard) as world:
            assert wait_until(lambda: (tmp_path / "ready").exists(), 30)
            world.send_signal(number)
            assert world.communicate(timeout=30)[0] == "heard\n"
            assert world.returncode == 5

    def test_killed_it_takes_all_with_it_and_the_next_one_removes_its_files(self, tmp_path: Path) -> None:
        mark = f"{time.time_ns() % 10**9 + 10**9}"  # seconds to sleep, and a name to find it by
        with self._started(tmp_path, f"setsid sleep {mark} & touch ready; wait") as world:
            assert wait_until(lambda: (tmp_path / "ready").exists(), 30)
            assert wait_until(lambda: _is_running(mark), 30)
            world.kill()
            assert wait_until(lambda: not _is_running(mark), 30)
        left = [path.name for path in tmp_path.glob("run-*")]
        assert left == [f"run-{world.pid}"]
        self._run(tmp_path, "true")
        assert list(tmp_path.glob("run-*")) == []

    def _run(self, store: Path, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(**self._options(store, script), capture_output=True, check=False)

    def _started(self, store: Path, script: str) -> subprocess.Popen[str]:
        return subprocess.Popen(**self._options(store, script), stdout=subprocess.PIPE)

    def _options(self, store: Path, script: str) -> dict[str, Any]:
        command = [sys.executable, VAGRANT / "world.py", "sh", "-c", script]
        return {"args": command, "env": {**os.environ, "ZTUN_VM_DIR": str(store)}, "cwd": store, "text": True}


def _is_running(argument: str) -> bool:
    return subprocess.run(["pgrep", "--full", f"sleep {argument}"], capture_output=True, check=False).returncode == 0
