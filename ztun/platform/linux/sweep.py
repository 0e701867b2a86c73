"""Removing what a killed instance left behind. Only what carries our tag is touched."""

from __future__ import annotations

from typing import Any

from ztun.platform.linux import netlink
from ztun.platform.linux.hooks import remove_filters
from ztun.platform.linux.policy import remove_policy


def sweep(device: str) -> list[str]:
    """Remove left-overs of a dead instance whose TUN was `device`; returns a line for each.

    To be called once the device is open: to own its name proves that no other instance lives.
    """
    return netlink.run(lambda ip: _sweep_filters(ip, device) + remove_policy(ip, device))


def _sweep_filters(ip: Any, device: str) -> list[str]:
    removed = []
    for link in ip.get_links():
        ifname = netlink.attribute(link, "IFLA_IFNAME")
        for name in remove_filters(ip, link["index"], device):
            removed.append(f"tc filter {name} on {ifname}")
    return removed
