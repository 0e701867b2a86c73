"""Capturing without BPF: ip rules send what comes from the LAN to a table whose routes are the prefix table.

An address matches the longest prefix of that table, as in the tries: a tunnelled prefix is a route into the TUN, a
direct one `throw` (go on with the next table), a dropped one `blackhole`. See ip-rule(8) and ip-route(8).
"""

from __future__ import annotations

import errno
import socket
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import structlog

from ztun.errors import ZtunError
from ztun.platform.linux import firewall, host_rules, journal, links, neighbours, netlink, route_batches, sysctl
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.route_batches import Route
from ztun.platform.linux.routes import PROTOCOL
from ztun.platform.linux.table_numbers import TABLES, table_of_rule
from ztun.platform.linux.table_numbers import dns_table_of as dns_table_of
from ztun.platform.linux.table_numbers import table_of as table_of
from ztun.platform.linux.tables import show_address
from ztun.ports import Origin, Prefix, Verdict

log = structlog.get_logger("ztun.classifier")

_RULE_PRIORITY = 31340  # before main (32766); port 53 one earlier
MOST_LEARNED = 4096
# Far behind: what holds when the TUN and its routes are gone and nothing may pass ("fail": "closed").
_LAST_METRIC = 0x7FFFFFFF
_KINDS = {
    Verdict.DIRECT: route_batches.THROW,
    Verdict.TUNNEL: route_batches.UNICAST,
    Verdict.DROP: route_batches.BLACKHOLE,
}
_SLICE = 4096  # routes that are changed before others may do something
_DEFAULT_METRIC6 = 1024  # IP6_RT_PRIO_USER, net/ip6_route.h
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_ABSENT = [errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EAFNOSUPPORT]

Key = tuple[bytes, int]
"""(packed network, prefix length)."""


class Entry(NamedTuple):
    verdict: Verdict
    rule: int


class RoutesClassifier:
    """A ztun.ports.Classifier made of routes. It counts only what the TUN took, and cannot see ports but 53.

    fallback_reason: why there is no BPF, None when routes were asked for.
    """

    backend = "routes"

    def __init__(self, capture: Capture) -> None:
        self.fallback_reason: str | None = None
        self._capture = capture
        self._index = links.find_index(capture.device, "tun.name")
        self._prefixes: dict[Key, Entry] = {}
        self._learned: OrderedDict[Key, Entry] = OrderedDict()
        self._installed: dict[Key, Entry] = {}
        self._journal = journal.of(capture.device)
        self._sysctls = sysctl.Sysctls(self._journal)
        self._is_attached = False
        self._exits: dict[str, str] = {}
        self._followed: dict[str, int] = {}  # interface -> its index when it was prepared

    def replace_rules(self, prefixes: Iterable[Prefix]) -> None:
        """Make the table equal to `prefixes`, changing only what differs. Raises ZtunError."""
        for _ in self.replacing_rules(prefixes):
            pass

    def replacing_rules(self, prefixes: Iterable[Prefix]) -> Iterator[None]:
        """The same, some thousand routes at a time: between two of them the caller may do something else."""
        self._prefixes = {(prefix.network, prefix.length): Entry(prefix.verdict, prefix.rule) for prefix in prefixes}
        gone = [key for key in self._installed if key not in self._prefixes and key not in self._learned]
        # New ones first: an address never falls through to a shorter prefix on the way.
        for keys in (list(self._prefixes), gone):
            for start in range(0, len(keys), _SLICE):
                self._synchronise(keys[start : start + _SLICE])
                yield

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        """Give one address its own route. The least recently learned makes room for it."""
        key, entry = (address, len(address) * 8), Entry(verdict, rule)
        self._learned[key] = entry
        self._learned.move_to_end(key)
        changed = {key}
        if len(self._learned) > MOST_LEARNED:
            changed.add(self._learned.popitem(last=False)[0])
        self._synchronise(changed)

    def forget(self) -> None:
        """Forget all that was learned."""
        keys = set(self._learned)
        self._learned.clear()
        self._synchronise(keys)

    def replace_own_addresses(self, addresses: Iterable[bytes]) -> None:
        """Nothing to do: the kernel looks its own addresses up before any of our rules (table local)."""

    def _synchronise(self, keys: Iterable[Key]) -> None:
        sizes = [4, 16] if socket.AF_INET6 in self._families() else [4]
        wanted = {
            key: self._learned.get(key) or self._prefixes.get(key) if len(key[0]) in sizes else None for key in keys
        }
        changes = {key: entry for key, entry in wanted.items() if self._installed.get(key) != entry}
        if not changes:
            return
        added, removed = [], []
        for key, entry in changes.items():
            now = set(self._routes_of(key, entry))
            before = set(self._routes_of(key, self._installed.get(key)))
            added += [route for route in now if route not in before]
            # What takes the place of a route with the same metric is rid of it already.
            removed += [one for one in before - now if not any(one.metric == route.metric for route in now)]
        try:
            route_batches.replace(self._table, added)
            route_batches.delete(self._table, removed)
        except netlink.NetlinkError as error:
            raise ZtunError(f"cannot change routes of {self._capture.device}: {netlink.explain(error)}") from error
        for key, entry in changes.items():
            if entry is None:
                del self._installed[key]
            else:
                self._installed[key] = entry

    @property
    def _table(self) -> route_batches.Table:
        return route_batches.Table(table_of(self._capture.device), PROTOCOL, self._index)

    def _routes_of(self, key: Key, entry: Entry | None) -> list[Route]:
        """The routes of one prefix: into the TUN, and with `fail: closed` the one that holds when the TUN is gone."""
        if entry is None:
            return []
        routes = [Route(*key, _KINDS[entry.verdict])]
        if entry.verdict == Verdict.TUNNEL and self._capture.fail_closed:
            routes.append(Route(*key, route_batches.BLACKHOLE, _LAST_METRIC))
        return routes

    def heartbeat(self) -> None:
        """Nothing to do: routes into the TUN go with the process."""

    def origin(self, address: bytes) -> Origin | None:
        """The captured interface by which packets to this client leave, and the MAC address they are sent to."""
        found = neighbours.find(address)
        return found if found is not None and found.interface in self._capture.lan else None

    def attach(self) -> None:
        """Start to capture: ip rules, which hold for interfaces to come too, and the sysctls that forwarding needs.

        Called again, prepares interfaces that are new. Raises ZtunError, the first time only.
        """
        self._follow()
        if self._is_attached:
            self._put_back_rules()
            return
        self._is_attached = self._journal.has_policy = True
        try:
            netlink.run(self._add_rules)
            netlink.run(self._remove_strangers)
        except netlink.NetlinkError as error:
            self._detach()
            raise ZtunError(f"cannot add ip rules: {netlink.explain(error)}") from error
        log.warning(
            "capturing with routes alone: no counters for each rule, learned names cost a route each",
            sysctls=self._sysctls.changes(),
        )
        drops = firewall.find_forward_drops(self._capture.device)
        if drops:
            log.warning(
                "a firewall drops what is forwarded, as tunnelled packets are without BPF",
                chains=drops,
                remedy=firewall.remedy(drops, self._capture.device),
            )

    def _put_back_rules(self) -> None:
        """networkd, for one, removes what it does not know whenever it starts. Raises ZtunError."""

        def put_back(ip: Any) -> int:
            there = [_same_rule(rule) for family in _FAMILIES for rule in ip.get_rules(family=family)]
            wanted = [{**rule, "family": family} for family in self._families() for rule in self._rules(family)]
            missing = [rule for rule in wanted if rule not in there]
            for rule in missing:
                netlink.ignoring([errno.EEXIST], ip.rule, "add", **rule)
            return len(missing)

        try:
            count = netlink.run(put_back)
        except netlink.NetlinkError as error:
            raise ZtunError(f"cannot add ip rules: {netlink.explain(error)}") from error
        if count:
            log.warning("somebody removed our ip rules, put them back", rules=count)

    def captured(self) -> Mapping[str, str]:
        """LAN interface -> "captured" or "absent"."""
        return {ifname: "captured" if ifname in self._followed else "absent" for ifname in self._capture.lan}

    def replace_exits(self, exits: Mapping[str, Collection[int]]) -> None:
        """Nothing to do: the ip rules for this host's own packets hold wherever they leave."""
        self._exits = dict.fromkeys(exits, "captured") if self._capture.host else {}

    def exits(self) -> Mapping[str, str]:
        """See ztun.ports.Classifier.exits."""
        return dict(self._exits)

    def reinstall(self) -> None:
        """Install the routes into the TUN again, which went when it was down, or with it. Raises ZtunError."""
        self._index = links.find_index(self._capture.device, "tun.name")
        before, self._installed = self._installed, {}
        try:
            self._synchronise(before.keys() | self._prefixes.keys() | self._learned.keys())
            if self._is_attached:
                netlink.run(self._add_rules)
        except netlink.NetlinkError as error:
            raise ZtunError(f"cannot add ip rules: {netlink.explain(error)}") from error
        finally:
            self._installed = {**before, **self._installed}

    def _follow(self) -> None:
        for ifname in (self._capture.device, *self._capture.lan):
            index, before = links.index_of(ifname), self._followed.get(ifname)
            if index == before:
                continue
            if before is not None:
                del self._followed[ifname]
                self._sysctls.let_go(ifname, links.name_of(before))
            if index is not None:
                self._followed[ifname] = index
                self._allow_forwarding(ifname)

    def _allow_forwarding(self, ifname: str) -> None:
        """Replies from the TUN are forwarded by the kernel, here by interface and not for the whole host."""
        self._sysctls.set(f"ipv4/conf/{ifname}/forwarding", "1")
        # Linux 6.17; before, IPv6 has one switch for all interfaces.
        if sysctl.read("ipv6/conf/default/force_forwarding") is not None:
            self._sysctls.set(f"ipv6/conf/{ifname}/force_forwarding", "1")
        else:
            self._allow_forwarding6()

    def _allow_forwarding6(self) -> None:
        if sysctl.read("ipv6/conf/all/forwarding") != "0":
            return
        # A forwarding interface ignores router advertisements, and would lose its default route, unless accept_ra is 2.
        for ifname in ("default", *(name for _, name in socket.if_nameindex())):
            if sysctl.read(f"ipv6/conf/{ifname}/accept_ra") == "1":
                self._sysctls.set(f"ipv6/conf/{ifname}/accept_ra", "2")
            # What is written to `all` is written to each of them.
            self._sysctls.keep(f"ipv6/conf/{ifname}/forwarding", becomes="1")
        self._sysctls.set("ipv6/conf/all/forwarding", "1")

    def _add_rules(self, ip: Any) -> None:
        for family in self._families():
            for rule in self._rules(family):
                netlink.ignoring([errno.EEXIST], ip.rule, "add", family=family, **rule)
            if self._capture.hijack_dns or self._capture.host:
                route = {"family": family, "oif": self._index, "table": dns_table_of(self._capture.device)}
                ip.route("replace", dst="default", proto=PROTOCOL, **route)

    def _remove_strangers(self, ip: Any) -> None:
        """Rules and routes that a dead instance left in our tables, now that ours are there: no moment without."""
        wanted = {route for key, entry in self._installed.items() for route in self._routes_of(key, entry)}
        wanted_rules = [{**rule, "family": family} for family in self._families() for rule in self._rules(family)]
        for table, found in find_policy(ip).items():
            if table not in (table_of(self._capture.device), dns_table_of(self._capture.device)):
                continue
            rules = [rule for rule in found.rules if _same_rule(rule) not in wanted_rules]
            strange = [] if table == dns_table_of(self._capture.device) else found.routes
            strange = [route for route in strange if _usual(route) not in wanted]
            remove_installed(ip, Installed(rules, strange), table)

    def _families(self) -> list[int]:
        has_ipv6 = sysctl.read(f"ipv6/conf/{self._capture.device}/disable_ipv6") == "0"
        return list(_FAMILIES) if has_ipv6 else [socket.AF_INET]

    def _rules(self, family: int) -> list[dict[str, Any]]:
        table, dns_table = table_of(self._capture.device), dns_table_of(self._capture.device)
        rules: list[dict[str, Any]] = []
        if self._capture.host:
            tun = self._capture.tun_addresses
            rules += host_rules.list_rules(family, table, dns_table, tun, self._capture.hijack_dns)
        for ifname in self._capture.lan:
            from_lan = {"iifname": ifname, "protocol": PROTOCOL}
            if self._capture.hijack_dns:
                ports = {**from_lan, "dport_range": "53:53", "table": dns_table, "priority": _RULE_PRIORITY - 1}
                rules += [{**ports, "ip_proto": number} for number in (socket.IPPROTO_UDP, socket.IPPROTO_TCP)]
            rules.append({**from_lan, "table": table, "priority": _RULE_PRIORITY})
        return rules

    def counters(self) -> dict[str, dict[str, int]]:
        """{"tunnel": {"packets", "bytes"}}: what the TUN took, from whoever. Routes count nothing else."""
        statistics = netlink.run(lambda ip: netlink.attribute(ip.get_links(self._index)[0], "IFLA_STATS64"))
        return {"tunnel": {"packets": statistics["tx_packets"], "bytes": statistics["tx_bytes"]}}

    def snapshot(self) -> dict[str, Any]:
        """No programs; one map, the table; the sysctls that were changed. Its ip rules are in TunRoutes.snapshot()."""
        entries = [
            {"prefix": f"{show_address(network)}/{length}", "verdict": entry.verdict.name.lower(), "rule": entry.rule}
            for (network, length), entry in sorted(self._installed.items())
        ]
        table = {"name": f"table {table_of(self._capture.device)}", "type": "routes", "entries": entries}
        shown = {"programs": [], "maps": [table], "sysctls": self._sysctls.describe()}
        drops = firewall.find_forward_drops(self._capture.device)
        if drops:
            shown["firewall"] = {"drops": drops, "remedy": firewall.remedy(drops, self._capture.device)}
        return shown

    def close(self) -> None:
        """Remove rules and routes and put the sysctls back. Idempotent."""
        self._detach()
        netlink.run(lambda ip: remove_policy(ip, self._capture.device))
        self._installed.clear()

    def _detach(self) -> None:
        self._is_attached = self._journal.has_policy = False
        self._followed.clear()
        self._sysctls.restore()


class Installed(NamedTuple):
    """What there is of one of our tables. rules: as rtnetlink messages."""

    rules: list[Any]
    routes: list[Route]

    def describe(self, table: int) -> list[str]:
        lines = [f"ip rule to table {table}"] * len(self.rules)
        return lines + ([f"{len(self.routes)} routes of table {table}"] if self.routes else [])


def find_policy(ip: Any) -> dict[int, Installed]:
    """Table -> what is there of ztun's, whosever it is. Both the protocol and the table's number are our tag."""
    found: dict[int, Installed] = {}
    for family in _FAMILIES:
        for rule in ip.get_rules(family=family):
            table = table_of_rule(rule)
            if table & ~0xFFFF == TABLES and netlink.attribute(rule, "FRA_PROTOCOL") == PROTOCOL:
                found.setdefault(table, Installed([], [])).rules.append(rule)
    for table, route in route_batches.list_all(PROTOCOL):
        if table & ~0xFFFF == TABLES:
            found.setdefault(table, Installed([], [])).routes.append(route)
    return found


def remove_installed(ip: Any, installed: Installed, table: int) -> None:
    """Rules first, so that nothing is looked up in half a table."""
    for rule in installed.rules:
        netlink.ignoring(_ABSENT, ip.rule, "del", **_same_rule(rule))
    route_batches.delete(route_batches.Table(table, PROTOCOL, 0), installed.routes)


def remove_policy(ip: Any, device: str) -> list[str]:
    """Remove the ip rules and routes of the TUN `device`, a living one or a dead one's. Returns what it were."""
    removed = []
    for table, installed in find_policy(ip).items():
        if table in (table_of(device), dns_table_of(device)):
            remove_installed(ip, installed, table)
            removed += installed.describe(table)
    return removed


def _same_rule(rule: Any) -> dict[str, Any]:
    names = {
        "FRA_TABLE": "table",
        "FRA_IIFNAME": "iifname",
        "FRA_PRIORITY": "priority",
        "FRA_PROTOCOL": "protocol",
        "FRA_IP_PROTO": "ip_proto",
        "FRA_DPORT_RANGE": "dport_range",
    }
    found = {keyword: netlink.attribute(rule, name) for name, keyword in names.items()}
    found |= host_rules.describe_rule(rule)
    return {"family": rule["family"], **{keyword: value for keyword, value in found.items() if value is not None}}


def _usual(route: Route) -> Route:
    """A route as the kernel lists it, in the words of `RoutesClassifier._routes_of`."""
    is_usual = len(route.network) == 16 and route.metric == _DEFAULT_METRIC6
    return route._replace(metric=0) if is_usual else route
