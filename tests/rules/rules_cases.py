"""Random rules that get in each other's way: networks nest, names share suffixes, addresses lie on the edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from hypothesis import strategies as st

from ztun.ports import Origin
from ztun.rules import FlowInfo, Network, Rule, Surroundings

OUTBOUNDS = st.sampled_from(["direct", "block", "office", "web", "dns"])
NAMES = st.lists(st.sampled_from(["a", "b", "corp", "xcorp", "example", "tele"]), min_size=1, max_size=4).map(".".join)
PROTOCOLS = st.sampled_from(["tcp", "udp", "icmp"])
PORTS = st.sampled_from([1, 22, 53, 80, 81, 443, 8000, 8999, 65535])
COUNTRIES = ("de", "fr")
MACS = st.sampled_from([bytes.fromhex("525400000001"), bytes.fromhex("525400000002")])
INTERFACES = st.sampled_from(["lan0", "lan1", "wg0"])
ORIGINS = st.none() | st.builds(Origin, INTERFACES, st.none() | MACS)
CONDITIONS = ["ports", "protocols", "source_cidr", "source_mac", "interface"]


@dataclass
class World:
    """One case: rules on a gateway, and the addresses at which something may go wrong."""

    rules: list[Rule]
    default: str
    around: Surroundings
    countries: dict[str, list[Network]]
    edges: list[bytes]


def make_network(value: int, length: int, bits: int) -> Network:
    first = value >> (bits - length) << (bits - length)
    return IPv4Network((first, length)) if bits == 32 else IPv6Network((first, length))


@st.composite
def networks_of_few_addresses(draw: st.DrawFn) -> st.SearchStrategy[Network]:
    """Prefixes of any length around a few addresses of each family, so that most are nested or side by side."""
    places = []
    for bits in (32, 128):
        top = (1 << bits) - 1
        value = draw(st.integers(0, top))
        end = value | (1 << draw(st.integers(0, bits))) - 1  # the last address of some network around it
        places += [(address, bits) for address in (value, end, end + 1 & top)]
    return st.sampled_from(places).flatmap(
        lambda place: st.integers(0, place[1]).map(lambda length: make_network(place[0], length, place[1]))
    )


def edges_of(networks: Sequence[Network]) -> list[bytes]:
    """The first and last address of each network, and their neighbours outside."""
    edges = set()
    for network in networks:
        top = (1 << network.max_prefixlen) - 1
        for value in (int(network.network_address), int(network.broadcast_address)):
            edges.update(
                (value + step).to_bytes(network.max_prefixlen // 8) for step in (-1, 0, 1) if 0 <= value + step <= top
            )
    return sorted(edges) or [bytes(4), bytes(16)]


@st.composite
def rule(draw: st.DrawFn, networks: st.SearchStrategy[Network]) -> Rule:
    def some(values: st.SearchStrategy, most: int = 3) -> tuple:
        return tuple(draw(st.lists(values, min_size=1, max_size=most)))

    kind = draw(st.sampled_from(["cidr", "cidr", "cidr", "name", "geoip", "cidr+geoip", "any"]))
    given: dict = {}
    if "cidr" in kind:
        given["ip_cidr"] = some(networks)
    if "geoip" in kind:
        given["geoip"] = some(st.sampled_from(COUNTRIES), 2)
    if kind == "name":
        for condition in draw(
            st.sets(st.sampled_from(["domain", "domain_suffix", "domain_keyword"]), min_size=1, max_size=2)
        ):
            given[condition] = some(NAMES)
    for condition in draw(st.sets(st.sampled_from(CONDITIONS), max_size=2)):
        given[condition] = {
            "ports": lambda: some(st.tuples(PORTS, PORTS).map(sorted).map(tuple)),
            "protocols": lambda: some(PROTOCOLS, 2),
            "source_cidr": lambda: some(networks),
            "source_mac": lambda: some(MACS, 2),
            "interface": lambda: some(INTERFACES, 2),
        }[condition]()
    return Rule(draw(OUTBOUNDS), priority=draw(st.sampled_from([0, 0, 0, -1, 1])), **given)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    networks = draw(networks_of_few_addresses())
    rules = draw(st.lists(rule(networks), max_size=6))
    around = Surroundings(
        builtin_direct=tuple(draw(st.lists(networks, max_size=2))),
        own_networks=tuple(draw(st.lists(networks, max_size=2))),
        fake_ranges=tuple(draw(st.lists(networks, max_size=1))),
    )
    countries: dict[str, list[Network]] = {code: [] for code in COUNTRIES}
    for network in draw(st.lists(networks, max_size=4)):
        taken = [other for others in countries.values() for other in others]
        if not any(other.version == network.version and other.overlaps(network) for other in taken):
            countries[draw(st.sampled_from(COUNTRIES))].append(network)
    named = [network for rule in rules for network in (*rule.ip_cidr, *rule.source_cidr)]
    stand = [*around.builtin_direct, *around.own_networks, *around.fake_ranges]
    edges = edges_of([*named, *stand, *countries["de"], *countries["fr"]])
    return World(rules, draw(OUTBOUNDS), around, countries, edges)


def addresses(world: World) -> st.SearchStrategy[bytes]:
    return st.sampled_from(world.edges) | st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)


@st.composite
def flows(draw: st.DrawFn, world: World) -> FlowInfo:
    protocol = draw(PROTOCOLS)
    by_name = draw(st.booleans())
    return FlowInfo(
        protocol,
        draw(addresses(world)),
        None if by_name else draw(addresses(world)),
        draw(NAMES) if by_name else None,
        0 if protocol == "icmp" else draw(PORTS),
        draw(ORIGINS),
    )
