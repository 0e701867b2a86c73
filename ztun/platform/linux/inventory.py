"""What is on the interfaces of this network namespace, read from the kernel: for `ztun routes`. Nothing is changed.

It works without an instance, and without privilege: what could not be seen is said.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any

from ztun.platform.linux import journal, netlink, orphans
from ztun.platform.linux.attachments import Sight, list_attachments
from ztun.platform.linux.routes import PROTOCOL, list_rules
from ztun.platform.linux.sweep import find_leftovers

_IFF_UP = 0x1
_IFF_RUNNING = 0x40
_MAIN = 254
_ROUTE_TYPES = {1: "unicast", 6: "blackhole", 9: "throw"}  # RTN_*, linux/rtnetlink.h


def describe_interfaces(
    device: str, captured: Mapping[str, str], own: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """{"interfaces": […], "unseen": what could not be seen}: the LAN's, the TUN, and all that programs hang on.

    captured: LAN interface -> "captured", "absent" or why it is not captured; own: our BPF programs by their ids.
    Each has "ifname", "role" ("lan", "tun" or "other"), "state" (as in `captured`, None for the others), "link" ("up",
    "down", "no carrier" or "absent"), "mtu" and "attached" (see `attachments`, without the name of the interface).
    Raises OSError when the kernel does not answer.
    """
    sight = Sight()
    try:
        links, attached = netlink.run(lambda ip: (_links(ip), list_attachments(ip, sight, own)))
    except netlink.NetlinkError as error:
        raise OSError(max(error.code, 0), f"rtnetlink: {netlink.explain(error)}") from error
    names = dict.fromkeys([*captured, device, *(each["ifname"] for each in attached)])
    return {
        "interfaces": [_describe(name, device, captured, links, attached) for name in names],
        "unseen": sight.unseen,
    }


def look(device: str, lan: Iterable[str] = ()) -> dict[str, Any]:
    """The body of `ztun routes --json` where no instance answers: what carries our tag in the kernel.

    device: the TUN's name; lan: interfaces that would be captured. Raises OSError when the kernel does not answer.
    """
    about = describe_interfaces(device, dict.fromkeys(lan, "not captured"), {})
    if any(not os.access(path, os.R_OK) for path in journal.DIRECTORY.glob(f"*{journal.SUFFIX}")):
        about["unseen"].append(f"state files in {journal.DIRECTORY} (needs root)")
    programs = [
        {"ifname": entry["ifname"], **attached}
        for entry in about["interfaces"]
        for attached in entry["attached"]
        if attached["owner"] == "ztun"
    ]
    routes, rules = netlink.run(lambda ip: (_tagged_routes(ip), list_rules(ip)))
    return {
        "device": device,
        "backend": None,
        "fallback_reason": None,
        "routes": routes,
        "ip_rules": rules,
        "programs": programs,
        **orphans.read_maps([each["id"] for each in programs if each["id"] is not None]),
        "sysctls": [],
        "rules": [],
        "waiting": [],
        "leftovers": find_leftovers(),
        **about,
    }


def _links(ip: Any) -> dict[str, dict[str, Any]]:
    found = {}
    for link in ip.get_links():
        flags = link["flags"]
        state = "down" if not flags & _IFF_UP else "up" if flags & _IFF_RUNNING else "no carrier"
        about = {"ifindex": link["index"], "link": state, "mtu": netlink.attribute(link, "IFLA_MTU")}
        found[netlink.attribute(link, "IFLA_IFNAME")] = about
    return found


def _describe(
    name: str,
    device: str,
    captured: Mapping[str, str],
    links: Mapping[str, dict[str, Any]],
    attached: Iterable[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "ifname": name,
        "role": "lan" if name in captured else "tun" if name == device else "other",
        "state": captured.get(name),
        **links.get(name, {"ifindex": None, "link": "absent", "mtu": None}),
        "attached": [
            {key: value for key, value in each.items() if key != "ifname"}
            for each in attached
            if each["ifname"] == name
        ],
    }


def _tagged_routes(ip: Any) -> list[dict[str, Any]]:
    """Every route of our protocol number, in any table."""
    names = dict(socket.if_nameindex())
    found = []
    for route in ip.get_routes():
        if route["proto"] != PROTOCOL:
            continue
        family = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
        where = f"{netlink.attribute(route, 'RTA_DST') or family}/{route['dst_len']}"
        index, table = netlink.attribute(route, "RTA_OIF"), netlink.attribute(route, "RTA_TABLE") or route["table"]
        about = {"destination": where, "device": names.get(index), "protocol": "ztun"}
        about |= {"table": None if table == _MAIN else table, "type": _ROUTE_TYPES.get(route["type"], route["type"])}
        found.append(about)
    return found
