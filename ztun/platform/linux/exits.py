"""By which interfaces this host sends to the internet: those of the default routes that count."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ztun.platform.linux import netlink
from ztun.ports import Link

# Nothing is sent there. Two of IPv4, since VPNs cover its default route with 0.0.0.0/1 and 128.0.0.0/1.
_PROBES = {4: ("9.9.9.9", "149.112.112.112"), 6: ("2620:fe::9",)}
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# linux/rtnetlink.h: answer with the route itself, all its next hops included, and with the table that it is in.
_RTM_F_FIB_MATCH, _RTM_F_LOOKUP_TABLE = 0x2000, 0x1000
_UNICAST = 1
_LOOPBACK = 1  # the index it has in every network namespace


class _Match(NamedTuple):
    """The route that a packet takes: table and length of its prefix, and the interfaces of its next hops."""

    table: int
    length: int
    indexes: frozenset[int]


def find_exits(
    ip: Any, links: Mapping[int, Link], addresses: Iterable[tuple[str, bytes, int]]
) -> dict[str, tuple[int, ...]]:
    """Interface -> the IP versions that it is a way out for, as packets without a mark see it.

    It is the ways that the kernel would take for addresses of the internet, ip rules included, all next hops of them,
    and what else has a route of the same table to the same prefix (default routes with a higher metric, which sockets
    bound to their interface take). A default route that longer prefixes cover, as VPNs do it, is none of them: what
    leaves by it is the VPN's own. links: by index.
    """
    having: dict[int, set[str]] = {4: set(), 6: set()}
    for ifname, packed, _length in addresses:
        having[4 if len(packed) == 4 else 6].add(ifname)
    exits: dict[str, list[int]] = {}
    for version, probes in _PROBES.items():
        candidates = [link.ifindex for link in links.values() if link.name in having[version] and link.enabled]
        for index in _find_indexes(ip, version, probes, candidates) - {_LOOPBACK}:
            if index in links:
                exits.setdefault(links[index].name, []).append(version)
    return {name: tuple(versions) for name, versions in sorted(exits.items())}


def _find_indexes(ip: Any, version: int, probes: Sequence[str], candidates: Iterable[int]) -> set[int]:
    found: set[int] = set()
    seen = set()
    for probe in probes:
        best = _match(ip, version, probe)
        if best is None:
            continue
        found |= best.indexes
        if (best.table, best.length) in seen:
            continue
        seen.add((best.table, best.length))
        for index in candidates:
            other = _match(ip, version, probe, oif=index) if index not in found else None
            if other is not None and (other.table, other.length) == (best.table, best.length):
                found |= other.indexes
    return found


def _match(ip: Any, version: int, probe: str, **conditions: int) -> _Match | None:
    family = _FAMILIES[version]
    try:
        [route] = ip.route("get", family=family, dst=probe, flags=_RTM_F_FIB_MATCH | _RTM_F_LOOKUP_TABLE, **conditions)
    except netlink.NetlinkDumpInterrupted:
        raise
    except (netlink.NetlinkError, ValueError):
        return None
    if route["type"] != _UNICAST:
        return None
    hops = netlink.attribute(route, "RTA_MULTIPATH") or ()
    indexes = {hop["oif"] for hop in hops} | {netlink.attribute(route, "RTA_OIF")}
    table = netlink.attribute(route, "RTA_TABLE") or route["table"]
    return _Match(table, route["dst_len"], frozenset(index for index in indexes if index is not None))
