"""The ip rules that bring this host's own packets to the tables of `policy`, where there is no BPF.

A program that binds no address gets one by the route to its destination, and is looked up again with that. So what it
begins is known by its having none yet, and by that of the TUN ever after; what answers others, or began before us, has
an address of another interface and is left alone. See ip-rule(8), fib4_rule_match() and fib6_rule_match().
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

from ztun.platform.linux import netlink, sysctl
from ztun.platform.linux.routes import PROTOCOL
from ztun.platform.linux.table_numbers import MAIN

# Ahead of those for the LAN: from the TUN's address, port 53, the routes that are no default ones, the table.
_FROM_TUN, _DNS, _SPECIFIC, _TABLE = 31330, 31331, 31332, 31333
_ANY_MARK = 0xFFFFFFFF  # the mark is to be 0 in all of these bits: that is nobody's packet but the program's
_FIND_SADDR = 0x10000  # FIB_RULE_FIND_SADDR, net/fib_rules.h: match the address that the route would choose
_UNSET = 0xFFFFFFFF
# Not longer than this is a default route, or one that a VPN covers it with: 0.0.0.0/1 and the like.
_DEFAULT_LENGTHS: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 4}
_ICMP: dict[int, int] = {socket.AF_INET: socket.IPPROTO_ICMP, socket.AF_INET6: socket.IPPROTO_ICMPV6}


def list_rules(
    family: int, table: int, all_table: int, tun_addresses: Sequence[bytes], hijack_dns: bool
) -> list[dict[str, Any]]:
    """The rules of one address family, as `describe_rule` reads them back. None where the TUN has no such address.

    table: the prefixes; all_table: everything into the TUN.
    """
    size = 4 if family == socket.AF_INET else 16
    tun = next((socket.inet_ntop(family, packed) for packed in tun_addresses if len(packed) == size), None)
    if tun is None:
        return []
    ours = {"iifname": "lo", "fwmask": _ANY_MARK, "protocol": PROTOCOL}
    unbound = {**ours, "src": "0.0.0.0", "src_len": 32}
    if family == socket.AF_INET6:
        unbound = {**ours, "src": tun, "src_len": 128, "flags": _FIND_SADDR}
    rules = [{**ours, "src": tun, "src_len": size * 8, "table": all_table, "priority": _FROM_TUN}]
    if hijack_dns:
        query = {**unbound, "dport_range": "53:53", "table": all_table, "priority": _DNS}
        rules += [{**query, "ip_proto": number} for number in (socket.IPPROTO_UDP, socket.IPPROTO_TCP)]
    # There is no asking of an IPv6 packet whether it has an address yet; these routes hold for it in either case.
    without = unbound if family == socket.AF_INET else ours
    specific = {"suppress_prefixlen": _DEFAULT_LENGTHS[family], "suppress_ifgroup": table}
    rules.append({**without, **specific, "table": MAIN, "priority": _SPECIFIC})
    rules += [{**unbound, **which, "table": table, "priority": _TABLE} for which in _carried(family)]
    return rules


def _carried(family: int) -> Iterator[dict[str, Any]]:
    """What ztun can carry. A server that answers datagrams without saying from which address would look like a client,
    were it not for its port.
    """
    yield {"ip_proto": socket.IPPROTO_TCP}
    low, high = (sysctl.read("ipv4/ip_local_port_range") or "32768 60999").split()
    yield {"ip_proto": socket.IPPROTO_UDP, "sport_range": f"{low}:{high}"}
    yield {"ip_proto": _ICMP[family]}


def describe_rule(rule: Any) -> dict[str, Any]:
    """The keywords that are only used here, of a rule as rtnetlink tells it."""
    names = {
        "FRA_FWMASK": "fwmask",
        "FRA_SRC": "src",
        "FRA_SPORT_RANGE": "sport_range",
        "FRA_SUPPRESS_IFGROUP": "suppress_ifgroup",
        "FRA_SUPPRESS_PREFIXLEN": "suppress_prefixlen",
    }
    found = {keyword: netlink.attribute(rule, name) for name, keyword in names.items()}
    found["suppress_prefixlen"] = None if found["suppress_prefixlen"] == _UNSET else found["suppress_prefixlen"]
    found["src_len"] = rule["src_len"] or None
    found["flags"] = rule["flags"] & _FIND_SADDR or None
    return {keyword: value for keyword, value in found.items() if value is not None}
