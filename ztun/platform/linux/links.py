"""What must be known about an interface before a program is attached to it."""

from __future__ import annotations

import socket
from typing import Any

from ztun.errors import ConfigError
from ztun.platform.linux import netlink
from ztun.platform.linux.netlink import NetlinkError

# Devices whose packets start at the IP header: dev_is_mac_header_xmit() in include/linux/if_arp.h.
_BARE_TYPES = frozenset({512, 519, 768, 769, 776, 778, 823, 0xFFFE, 0xFFFF})


def find_index(ifname: str, key: str) -> int:
    """The index of an interface. Raises ConfigError naming the configuration `key` it came from."""
    try:
        return socket.if_nametoindex(ifname)
    except OSError as error:
        known = ", ".join(name for _, name in socket.if_nameindex() if name != "lo")
        raise ConfigError(f"{key}: there is no interface {ifname}; there are {known}") from error


def index_of(ifname: str) -> int | None:
    """The index of an interface, None when there is none of this name."""
    try:
        return socket.if_nametoindex(ifname)
    except OSError:
        return None


def name_of(index: int) -> str | None:
    """The name that the interface of this index has now, None when it is gone."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return None


def index_towards(address: str, mark: int) -> int | None:
    """The interface by which packets with `mark` leave for an address literal; None where there is no route."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    def ask(ip: Any) -> int | None:
        found = ip.route("get", dst=address, family=family, mark=mark)
        return found[0].get_attr("RTA_OIF") if found else None

    try:
        return netlink.run(ask)
    except (NetlinkError, OSError):
        return None


def has_link_header(index: int) -> bool:
    """Whether packets of this interface have a MAC header (Ethernet, bridges) or none (WireGuard, PPP)."""
    return netlink.run(lambda ip: ip.get_links(index)[0]["ifi_type"]) not in _BARE_TYPES
