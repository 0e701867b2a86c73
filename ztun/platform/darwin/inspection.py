"""Looking at this machine without changing it, for `ztun routes` and `ztun doctor`: what macOS tells cheaply."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from typing import Any

from ztun.platform.darwin import forwarding, resolver

__all__ = ["describe_interfaces", "find_leftovers", "look"]


def describe_interfaces(
    device: str, captured: Mapping[str, str], own: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """As on Linux, with the names and indices of interfaces only. There are no BPF programs on them."""
    indices = {name: index for index, name in socket.if_nameindex()}
    interfaces: list[dict[str, Any]] = [
        {
            "ifname": name,
            "role": "tun" if name == device else "lan",
            "state": captured.get(name),
            "ifindex": indices.get(name),
            "link": None if name in indices else "absent",
            "mtu": None,
            "attached": [],
        }
        for name in dict.fromkeys([*captured, device])
    ]
    return {"interfaces": interfaces, "unseen": []}


def look(device: str, lan: Iterable[str] = ()) -> dict[str, Any]:
    """As on Linux; of a process that was killed there is little to see here."""
    return {
        "device": device,
        "backend": None,
        "fallback_reason": None,
        "routes": [],
        "ip_rules": [],
        "programs": [],
        "maps": [],
        "counters": {},
        "heartbeat": None,
        "sysctls": [],
        "rules": [],
        "waiting": [],
        "leftovers": find_leftovers(),
        **describe_interfaces(device, dict.fromkeys(lan, "not captured"), {}),
    }


def find_leftovers() -> list[str]:
    """What a killed process left behind, a line each. Its utun and the routes into it went with it."""
    lines = [f"resolver file {path}" for path in resolver.left_over()]
    return lines + [f"forwarding switched on, see {path}" for path in forwarding.left_over()]
