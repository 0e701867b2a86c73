"""What a run leaves behind for a person: the logs of the machines, below ZTUN_VM_DIR/logs."""

from __future__ import annotations

import os
import subprocess
from functools import partial
from pathlib import Path

from vm.guest import Guest, Machines, at_once

_COMMANDS = {
    "journal": "journalctl --no-pager --output=short-monotonic",
    "kernel": "dmesg",
    "boot": "systemd-analyze; systemd-analyze blame --no-pager",
    "network": "ip -d address; ip -4 route show table all; ip -6 route show table all; ip rule; ip -6 rule; tc qdisc",
}
_GATEWAY = {
    "ztun": "journalctl --no-pager --unit=ztun --output=short-monotonic; systemctl status --no-pager --full ztun",
    "status": "ztun status",
    "routes": "ztun routes",
    "bpf": "bpftool net; bpftool prog; bpftool map",
    "security": "systemd-analyze security --no-pager ztun",
}


def directory() -> Path:
    return Path(os.environ.get("ZTUN_VM_DIR", "/var/tmp/ztun-vm"), "logs")


def collect(machines: Machines, image: str) -> None:
    """Write what each machine has to say into logs/IMAGE/MACHINE-WHAT.log. Whatever cannot be had is left out."""
    target = directory() / image
    target.mkdir(parents=True, exist_ok=True)
    at_once(*(partial(_collect_from, guest, target) for guest in machines.running()))
    for console in machines.consoles():
        (target / console.name).write_bytes(console.read_bytes())


def _collect_from(guest: Guest, target: Path) -> None:
    if not guest.answers():
        return
    for what, command in {**_COMMANDS, **(_GATEWAY if guest.name == "gateway" else {})}.items():
        (target / f"{guest.name}-{what}.log").write_text(_said(guest, command))


def _said(guest: Guest, command: str) -> str:
    try:
        done = guest.run(command, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return "no answer within a minute\n"
    return done.stdout + done.stderr
