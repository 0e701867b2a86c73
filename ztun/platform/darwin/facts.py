"""What this system offers, for `ztun doctor`: what macOS tells cheaply. Without BPF, nothing of it is a problem."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

from ztun.platform.darwin import instances as announced
from ztun.platform.shapes import BpfFacts, Diversion, Instance, Route, TunFacts
from ztun.ports import SocketFactory

RULE_PRIORITY = 0
STATE_DIRECTORY = Path("/var/run/ztun")


class _Sockets:
    """Plain non-blocking sockets."""

    def __call__(self, family: int, type: int) -> socket.socket:
        made = socket.socket(family, type)
        made.setblocking(False)
        return made


def kernel() -> str:
    """The release of the kernel."""
    return platform.release()


def bcc_problem() -> str | None:
    """There is no BPF here: nothing is missing."""
    return None


def headers_problem() -> str | None:
    return None


async def probe_bpf() -> BpfFacts:
    return BpfFacts("macOS has no BPF of this kind: packets are classified in Python", None, None)


def jit() -> str | None:
    return None


def probe_tun() -> TunFacts:
    """utun is part of the system."""
    return TunFacts(None, None)


def ipv6_problem() -> str | None:
    return None if socket.has_ipv6 else "this Python has none"


def forwarding() -> dict[str, bool]:
    """Not known."""
    return {}


def rp_filter(ifname: str) -> int | None:
    """macOS has no such setting."""
    return None


def links() -> dict[str, dict[str, Any]]:
    """Interfaces by name. Their state and MTU are not looked at: up, and of the usual size."""
    return {name: {"up": True, "carrier": True, "mtu": 1500, "bridge": ""} for _, name in socket.if_nameindex()}


def routes() -> list[Route]:
    """Not known."""
    return []


def diversions() -> list[Diversion]:
    return []


def attachments() -> tuple[list[dict[str, Any]], list[str]]:
    return [], []


def ingress_qdiscs() -> dict[str, str]:
    return {}


def forward_drops(ifname: str) -> list[str]:
    """Not known: pf is not asked."""
    return []


def accepting(chains: Iterable[str], ifname: str) -> str:
    return ""


def path_mtu(address: str, mark: int) -> tuple[int, str] | None:
    """Not known."""
    return 1500, ""


def instances() -> list[Instance]:
    """Those of this Mac."""
    return announced.others()


def sockets(mark: int) -> SocketFactory:
    return _Sockets()


def dhcp_resolvers(root: Path = Path("/etc")) -> list[tuple[IPv4Address | IPv6Address, str]]:
    return []


def resolved_servers(stub: Iterable[str]) -> list[str]:
    return []
