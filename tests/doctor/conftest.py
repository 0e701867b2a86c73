"""A gateway of nothing but interfaces, in which faults are provoked for real."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ztun.config import load
from ztun.doctor import Finding, Scene, examine
from ztun.lab.namespace import Namespace

LAN4, WAN4, FAR4 = "10.77.0.1", "10.78.0.1", "10.78.0.2"


_ROUTER = {
    "ipv4/ip_forward": "1",
    "ipv6/conf/all/forwarding": "1",
    "ipv6/conf/all/accept_dad": "0",
    "ipv6/conf/default/accept_dad": "0",
}


class Patient:
    """The namespace, and the doctor in it."""

    def __init__(self, namespace: Namespace, directory: Path) -> None:
        self.namespace = namespace
        self.directory = directory
        self.mode = 0o600  # of the configuration file

    def write(self, config: dict[str, Any]) -> Path:
        """The configuration file of a healthy gateway, `config` laid over its sections."""
        base: dict[str, Any] = {
            "capture": {"lan": ["lan0"]},
            "dns": {"servers": [f"udp://{FAR4}"], "fake_ip": {"store": str(self.directory / "fake-ip.db")}},
            "control": {"socket": str(self.directory / "control.sock")},
        }
        whole = {
            key: {**base.get(key, {}), **value} if isinstance(value, dict) else value for key, value in config.items()
        }
        path = self.directory / "ztun.json"
        path.write_text(json.dumps({**base, **whole}))
        path.chmod(self.mode)
        return path

    def finding(self, check: str, config: dict[str, Any], *, timeout: float = 0.3) -> Finding:
        """What one check finds on `config`."""
        path = self.write(config)
        with self.namespace.entered():
            [found] = asyncio.run(examine(Scene(load(path, {}), path, timeout), [check]))
        return found


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Patient]:
    namespace = Namespace(f"zdoc-{os.getpid()}")
    try:
        namespace.create(resolver=FAR4, sysctls=_ROUTER)
        namespace.ip(
            "link add lan0 type veth peer name lan0peer",
            "link add wan0 type veth peer name wan0peer",
            f"address add {LAN4}/24 dev lan0",
            f"address add {WAN4}/24 dev wan0",
            *(f"link set {ifname} up" for ifname in ("lan0", "lan0peer", "wan0", "wan0peer")),
        )
        yield Patient(namespace, tmp_path)
    finally:
        namespace.delete()
