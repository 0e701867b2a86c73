"""What a rule says, what is asked of the rules, and what they answer.

Addresses are packed bytes in network order, names are A-labels; both cross the seams that way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import NamedTuple

from ztun.ports import Origin, Verdict

Network = IPv4Network | IPv6Network

DIRECT = "direct"
BLOCK = "block"
DNS = "dns"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: the conditions that are given are ANDed, the values of one condition are ORed.

    A condition that is left empty is not asked. ports: closed ranges, both ends included; geoip: ISO 3166-1 alpha-2
    codes in lower case; source_mac: 6 bytes each; interface: names of captured interfaces; priority: lower goes first,
    rules of equal priority go in file order.
    """

    outbound: str
    ip_cidr: tuple[Network, ...] = ()
    domain: tuple[str, ...] = ()
    domain_suffix: tuple[str, ...] = ()
    domain_keyword: tuple[str, ...] = ()
    geoip: tuple[str, ...] = ()
    ports: tuple[tuple[int, int], ...] = ()
    protocols: tuple[str, ...] = ()
    source_cidr: tuple[Network, ...] = ()
    source_mac: tuple[bytes, ...] = ()
    interface: tuple[str, ...] = ()
    priority: int = 0

    @property
    def asks_name(self) -> bool:
        return bool(self.domain or self.domain_suffix or self.domain_keyword)

    @property
    def asks_address(self) -> bool:
        return bool(self.ip_cidr or self.geoip)

    @property
    def is_conditional(self) -> bool:
        """Whether it asks for more than the destination's name or address, which only a flow can answer."""
        return bool(self.ports or self.protocols or self.source_cidr or self.asks_origin)

    @property
    def asks_origin(self) -> bool:
        """Whether it asks where the client is, which no packet behind the TUN tells."""
        return bool(self.source_mac or self.interface)


class FlowInfo(NamedTuple):
    """A new flow. protocol: "tcp", "udp" or "icmp"; name: what the Fake-IP stands for; port: 0 for ICMP.
    origin: None where it is not known; then no rule that asks for it matches.

    A flow with a name is matched on the name alone, whatever its address.
    """

    protocol: str
    source: bytes
    address: bytes | None
    name: str | None
    port: int
    origin: Origin | None = None


class Decision(NamedTuple):
    """Which outbound takes a flow, and the rule that said so: its index in file order, or one of ports.RULE_*."""

    outbound: str
    rule: int


class NameKind(Enum):
    """How a DNS query for a name is answered."""

    DIRECT = "direct"  # with its real addresses
    FAKE = "fake"  # with Fake-IPs
    BLOCK = "block"  # with NXDOMAIN


class NameDecision(NamedTuple):
    kind: NameKind
    rule: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Where the gateway stands; overrides the rules.

    builtin_direct: always direct; own_networks: direct unless a rule names them; fake_ranges: always tunnelled, even
    where they overlap the others. The prefixes and the decisions must be given the same ones.
    """

    builtin_direct: tuple[Network, ...] = ()
    own_networks: tuple[Network, ...] = ()
    fake_ranges: tuple[Network, ...] = ()


# Never forwarded by a router, or not unicast at all.
BUILTIN_DIRECT: tuple[Network, ...] = (
    IPv4Network("0.0.0.0/8"),  # "this network", RFC 1122 section 3.2.1.3; DHCP clients
    IPv4Network("127.0.0.0/8"),  # loopback, RFC 1122 section 3.2.1.3
    IPv4Network("169.254.0.0/16"),  # link-local, RFC 3927
    IPv4Network("224.0.0.0/4"),  # multicast, RFC 5771
    IPv4Network("255.255.255.255/32"),  # limited broadcast, RFC 919
    IPv6Network("::/128"),  # unspecified, RFC 4291 section 2.5.2
    IPv6Network("::1/128"),  # loopback, RFC 4291 section 2.5.3
    IPv6Network("fe80::/10"),  # link-local, RFC 4291 section 2.5.6
    IPv6Network("ff00::/8"),  # multicast, RFC 4291 section 2.7
)


def make_surroundings(
    interface_addresses: Iterable[tuple[bytes, int]], fake_ranges: Iterable[Network] = ()
) -> Surroundings:
    """Surroundings of a gateway whose interfaces have these addresses (packed address, prefix length).

    The addresses and the directed broadcasts of their networks are always direct, the networks are its own.
    """
    builtin: dict[Network, None] = dict.fromkeys(BUILTIN_DIRECT)
    own: dict[Network, None] = {}
    for address, length in interface_addresses:
        network = ip_network(
            (int.from_bytes(address), length) if len(address) == 4 else (address, length), strict=False
        )
        builtin[ip_network(address)] = None
        if network.prefixlen == network.max_prefixlen or network.prefixlen == 0:
            continue  # a host route says nothing about a network, a default route about all of them
        own[network] = None
        if network.version == 4 and network.prefixlen < 31:  # RFC 3021: a /31 has no broadcast address
            builtin[ip_network(network.broadcast_address)] = None
    return Surroundings(tuple(builtin), tuple(own), tuple(fake_ranges))


def verdict_of(outbound: str) -> Verdict:
    """What the classifier does with packets for this outbound; `dns` and the proxies are served behind the TUN."""
    if outbound == DIRECT:
        return Verdict.DIRECT
    return Verdict.DROP if outbound == BLOCK else Verdict.TUNNEL


def canonical_name(name: str) -> str:
    """The form in which names are compared: lower case, without the dot of the root (RFC 4343, RFC 1034 3.1)."""
    return name.lower().removesuffix(".")
