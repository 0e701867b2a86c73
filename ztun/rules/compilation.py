"""The address part of the rules as a table of prefixes for longest-prefix match.

An address matches exactly the prefixes that are ancestors of its longest match. So the verdict of a prefix is that of
the best-ranked rule among those filed at it and at its ancestors, and one sweep over the sorted prefixes with the
ancestors on a stack gives all of them.

Over the rules stand, best first:
- the Fake-IP ranges, always TUNNEL;
- the built-in direct prefixes, always DIRECT;
- the gateway's own networks: DIRECT, unless a rule names them. A rule names an address of an own network when the
  `ip_cidr` that covers it is that network or a part of it. A wider one (10.0.0.0/8 for a far site, while the LAN is
  10.0.0.0/24) does not, nor does one without `ip_cidr`, nor `geoip`: nobody means his own LAN by those. Of nested own
  networks the innermost counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, RULE_FAKE_IP, Prefix, Verdict
from ztun.rules.matching import RankedRule, Rules
from ztun.rules.model import Network, verdict_of

CountryPrefixes = Callable[[str], Iterable[Network]]

_FAKE_RANK = -2
_BUILTIN_RANK = -1
_NEVER = 1 << 62

_Key = tuple[int, int]  # first address as an int, prefix length


class _Standing(NamedTuple):
    """What the candidates of a prefix come to: the best rank of the unconditional ones and, by verdict, of the others.

    This is all the law of compilation needs, and it is inherited by taking minima.
    """

    settled: int
    direct: int
    tunnel: int
    drop: int

    def joined_by(self, other: _Standing) -> _Standing:
        return _Standing(
            min(self.settled, other.settled),
            min(self.direct, other.direct),
            min(self.tunnel, other.tunnel),
            min(self.drop, other.drop),
        )


_NOBODY = _Standing(_NEVER, _NEVER, _NEVER, _NEVER)


class _Entries:
    """What is filed at one prefix. `named` is the part that counts inside an own network."""

    __slots__ = ("is_own", "named", "standing")

    def __init__(self) -> None:
        self.standing = _NOBODY
        self.named = _NOBODY
        self.is_own = False


class _Node(NamedTuple):
    last: int  # last address of the prefix, as an int
    standing: _Standing
    in_own: bool
    result: tuple[Verdict, int]


def compile_prefixes(
    rules: Rules,
    builtin_direct: Iterable[Network],
    own_networks: Iterable[Network],
    fake_ranges: Iterable[Network],
    country_prefixes: CountryPrefixes | None = None,
) -> list[Prefix]:
    """Compile the rules for longest-prefix match; 0.0.0.0/0 and ::/0 are always among the prefixes.

    Prefixes that say the same as the next one around them are left out. country_prefixes: the networks of a country
    code; without it, `geoip` is taken for something that only a flow can decide.
    """
    table = _Table(len(rules.ranked))
    for network in builtin_direct:
        table.file(network, _Standing(_BUILTIN_RANK, _NEVER, _NEVER, _NEVER))
    for network in fake_ranges:
        table.file(network, _Standing(_FAKE_RANK, _NEVER, _NEVER, _NEVER))
    for network in own_networks:
        table.file_own(network)
    for ranked in rules.ranked:
        if not ranked.rule.asks_name:
            _file_rule(table, ranked, country_prefixes)
    results = _Results(rules)
    return [*_sweep(table.entries[4], 4, results), *_sweep(table.entries[6], 16, results)]


class _Table:
    def __init__(self, rule_count: int) -> None:
        default = _Standing(rule_count + 1, _NEVER, _NEVER, _NEVER)
        self.entries: dict[int, dict[_Key, _Entries]] = {4: {(0, 0): _Entries()}, 6: {(0, 0): _Entries()}}
        self.file_everywhere(default)

    def _at(self, network: Network) -> _Entries:
        return self.entries[network.version].setdefault((int(network.network_address), network.prefixlen), _Entries())

    def file(self, network: Network, standing: _Standing, names: bool = True) -> None:
        entries = self._at(network)
        entries.standing = entries.standing.joined_by(standing)
        if names:
            entries.named = entries.named.joined_by(standing)

    def file_own(self, network: Network) -> None:
        self._at(network).is_own = True

    def file_everywhere(self, standing: _Standing) -> None:
        for family in self.entries.values():
            family[0, 0].standing = family[0, 0].standing.joined_by(standing)


def _file_rule(table: _Table, ranked: RankedRule, country_prefixes: CountryPrefixes | None) -> None:
    rule = ranked.rule
    undecidable = bool(rule.geoip) and country_prefixes is None
    standing = _standing_of(ranked, ranked.is_conditional or undecidable)
    if rule.geoip and country_prefixes is not None:
        countries = [network for code in rule.geoip for network in country_prefixes(code.lower())]
        for network in _intersection(rule.ip_cidr, countries) if rule.ip_cidr else countries:
            table.file(network, standing, names=False)
    elif rule.ip_cidr:
        for network in rule.ip_cidr:
            table.file(network, standing, names=not rule.geoip)
    else:
        table.file_everywhere(standing)


def _standing_of(ranked: RankedRule, is_conditional: bool) -> _Standing:
    if not is_conditional:
        return _Standing(ranked.rank, _NEVER, _NEVER, _NEVER)
    by_verdict = {verdict: ranked.rank if verdict is ranked.verdict else _NEVER for verdict in Verdict}
    return _Standing(_NEVER, by_verdict[Verdict.DIRECT], by_verdict[Verdict.TUNNEL], by_verdict[Verdict.DROP])


def _span(network: Network) -> tuple[int, int, int]:
    first = int(network.network_address)
    return network.version, first, first + network.num_addresses - 1


def _intersection(left: Iterable[Network], right: Iterable[Network]) -> Iterator[Network]:
    """The networks of each side that lie in one of the other: two prefixes are nested or have nothing in common."""
    sides = (set(left), set(right))
    reach: list[tuple[int, int]] = [(0, -1), (0, -1)]  # version and last address that each side covers so far
    for network in sorted(
        sides[0] | sides[1], key=lambda network: (network.version, _span(network)[1], network.prefixlen)
    ):
        version, first, last = _span(network)
        for side, networks in enumerate(sides):
            if network in networks and (reach[side][0] != version or reach[side][1] < first):
                reach[side] = version, last
        if all(covered == version and end >= last for covered, end in reach):
            yield network


class _Results:
    """Turns a standing into a verdict and the rule that gave it."""

    def __init__(self, rules: Rules) -> None:
        self._by_rank = [(ranked.verdict, ranked.index) for ranked in rules.ranked]
        self._by_rank.append((Verdict.DIRECT, RULE_BUILTIN))  # own networks
        self._by_rank.append((verdict_of(rules.default), RULE_DEFAULT))
        self._by_rank.append((Verdict.TUNNEL, RULE_FAKE_IP))  # rank -2
        self._by_rank.append((Verdict.DIRECT, RULE_BUILTIN))  # rank -1

    def of(self, standing: _Standing) -> tuple[Verdict, int]:
        settled, *conditional = standing
        verdict, rule = self._by_rank[settled]
        if verdict is not Verdict.TUNNEL:
            against = min(rank for other, rank in zip(Verdict, conditional, strict=True) if other is not verdict)
            if against < settled:
                return Verdict.TUNNEL, self._by_rank[against][1]
        return verdict, rule

    @property
    def own(self) -> _Standing:
        return _Standing(len(self._by_rank) - 4, _NEVER, _NEVER, _NEVER)


def _sweep(entries: dict[_Key, _Entries], size: int, results: _Results) -> Iterator[Prefix]:
    """Every prefix after all its ancestors; those still open are on the stack."""
    bits = size * 8
    stack: list[_Node] = []
    for first, length in sorted(entries):
        while stack and stack[-1].last < first:
            stack.pop()
        around = stack[-1] if stack else None
        node = _descend(around, entries[first, length], first + (1 << bits - length) - 1, results)
        stack.append(node)
        if around is None or node.result != around.result:
            yield Prefix(first.to_bytes(size), length, *node.result)


def _descend(around: _Node | None, here: _Entries, last: int, results: _Results) -> _Node:
    in_own = here.is_own or (around is not None and around.in_own)
    inherited = around.standing if around is not None else _NOBODY
    if here.is_own and inherited.settled >= 0:  # what is built in stays above an own network
        inherited = results.own
    standing = inherited.joined_by(here.named if in_own else here.standing)
    return _Node(last, standing, in_own, results.of(standing))
