"""Oracles: what the rules mean, read off the design one line at a time and as slow as may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_address

from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, Prefix, Verdict
from ztun.rules import Decision, FlowInfo, Network, Rule, Surroundings, verdict_of

Countries = Mapping[str, Sequence[Network]]


def country_of(countries: Countries, address: bytes) -> str | None:
    """The first country with a network around the address; tests give networks that do not overlap."""
    return next((code for code, networks in countries.items() if covered(address, networks)), None)


def covered(address: bytes, networks: Sequence[Network]) -> bool:
    return any(ip_address(address) in network for network in networks)


def in_order(rules: Sequence[Rule]) -> list[tuple[int, Rule]]:
    return sorted(enumerate(rules), key=lambda numbered: (numbered[1].priority, numbered[0]))


def name_part(rule: Rule, name: str) -> bool:
    if rule.ip_cidr or rule.geoip:
        return False
    if rule.domain and name not in rule.domain:
        return False
    if rule.domain_suffix and not any(("." + name).endswith("." + suffix) for suffix in rule.domain_suffix):
        return False
    return not rule.domain_keyword or any(keyword in name for keyword in rule.domain_keyword)


def address_part(rule: Rule, address: bytes, around: Surroundings, countries: Countries) -> bool:
    if rule.domain or rule.domain_suffix or rule.domain_keyword:
        return False
    own = [network for network in around.own_networks if ip_address(address) in network]
    if own:
        innermost = max(own, key=lambda network: network.prefixlen)
        inside = [n for n in rule.ip_cidr if n.version == innermost.version and n.subnet_of(innermost)]
        return not rule.geoip and covered(address, inside)
    if rule.ip_cidr and not covered(address, rule.ip_cidr):
        return False
    return not rule.geoip or country_of(countries, address) in rule.geoip


def other_parts(rule: Rule, flow: FlowInfo) -> bool:
    if rule.protocols and flow.protocol not in rule.protocols:
        return False
    if rule.ports and (flow.protocol == "icmp" or not any(a <= flow.port <= b for a, b in rule.ports)):
        return False
    if rule.source_mac and (flow.origin is None or flow.origin.mac not in rule.source_mac):
        return False
    if rule.interface and (flow.origin is None or flow.origin.interface not in rule.interface):
        return False
    return not rule.source_cidr or covered(flow.source, rule.source_cidr)


def decide(rules: Sequence[Rule], default: str, flow: FlowInfo, around: Surroundings, countries: Countries) -> Decision:
    for index, rule in in_order(rules):
        if flow.name is not None:
            matches = name_part(rule, flow.name)
        else:
            assert flow.address is not None
            matches = not covered(flow.address, around.builtin_direct) and address_part(
                rule, flow.address, around, countries
            )
        if matches and other_parts(rule, flow):
            return Decision(rule.outbound, index)
    if flow.name is None and covered(flow.address or b"", (*around.builtin_direct, *around.own_networks)):
        return Decision("direct", RULE_BUILTIN)
    return Decision(default, RULE_DEFAULT)


def law(candidates: Sequence[Rule], last: Verdict) -> Verdict:
    """One verdict if all rules up to the first unconditional one agree, else TUNNEL."""
    verdicts = []
    for rule in candidates:
        verdicts.append(verdict_of(rule.outbound))
        if not (rule.ports or rule.protocols or rule.source_cidr or rule.source_mac or rule.interface):
            break
    else:
        verdicts.append(last)
    return verdicts[0] if len(set(verdicts)) == 1 else Verdict.TUNNEL


def verdict_for(
    rules: Sequence[Rule], default: str, address: bytes, around: Surroundings, countries: Countries
) -> Verdict:
    if covered(address, around.fake_ranges):
        return Verdict.TUNNEL
    if covered(address, around.builtin_direct):
        return Verdict.DIRECT
    last = Verdict.DIRECT if covered(address, around.own_networks) else verdict_of(default)
    return law([rule for _, rule in in_order(rules) if address_part(rule, address, around, countries)], last)


def longest_match(table: Sequence[Prefix], address: bytes) -> Prefix:
    """What the kernel's LPM trie finds."""
    value, bits = int.from_bytes(address), len(address) * 8
    return max(
        (
            prefix
            for prefix in table
            if len(prefix.network) == len(address)
            and value >> (bits - prefix.length) == int.from_bytes(prefix.network) >> (bits - prefix.length)
        ),
        key=lambda prefix: prefix.length,
    )
