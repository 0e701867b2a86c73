"""The rules as a whole: which outbound takes a flow, how a name is answered.

Ranks order the rules by (priority, index in the file); the rule that is tried first has rank 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, Verdict
from ztun.rules.lookup import NameIndex, PrefixIndex
from ztun.rules.model import (
    DIRECT,
    Decision,
    FlowInfo,
    NameDecision,
    NameKind,
    Network,
    Rule,
    Surroundings,
    canonical_name,
    verdict_of,
)

CountryLookup = Callable[[bytes], str | None]

_NAME_KINDS = {Verdict.DIRECT: NameKind.DIRECT, Verdict.TUNNEL: NameKind.FAKE, Verdict.DROP: NameKind.BLOCK}


def _no_country(_address: bytes) -> str | None:
    return None


class RankedRule:
    """A rule in its place, with what it takes to ask its conditions of a flow quickly."""

    def __init__(self, rank: int, index: int, rule: Rule) -> None:
        self.rank = rank
        self.index = index
        self.rule = rule
        self.verdict = verdict_of(rule.outbound)
        self.is_conditional = rule.is_conditional
        self.decision = Decision(rule.outbound, index)
        self._protocols = frozenset(rule.protocols)
        self._ports = _merge_ranges(rule.ports)
        self._port_starts = [first for first, _last in self._ports]
        self._sources = PrefixIndex((network, rank) for network in rule.source_cidr) if rule.source_cidr else None
        self._asks_origin = rule.asks_origin
        self._macs = frozenset(rule.source_mac)
        self._interfaces = frozenset(rule.interface)
        self._name_tests = _name_tests(rule)

    def matches_name(self, name: str) -> bool:
        return all(test.ranks(name) for test in self._name_tests)

    def accepts(self, flow: FlowInfo) -> bool:
        """Whether the conditions other than the destination's name and address hold."""
        if self._protocols and flow.protocol not in self._protocols:
            return False
        if self._ports and not self._has_port(flow):
            return False
        if self._sources is not None and not self._sources.covers(flow.source):
            return False
        return not self._asks_origin or self._has_origin(flow)

    def _has_origin(self, flow: FlowInfo) -> bool:
        origin = flow.origin
        if origin is None or (self._macs and origin.mac not in self._macs):
            return False
        return not self._interfaces or origin.interface in self._interfaces

    def _has_port(self, flow: FlowInfo) -> bool:
        if flow.protocol not in ("tcp", "udp"):
            return False
        place = bisect_right(self._port_starts, flow.port) - 1
        return place >= 0 and flow.port <= self._ports[place][1]


def _merge_ranges(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _name_tests(rule: Rule) -> list[NameIndex]:
    """One index for each name condition that the rule has; a name must be found in all of them."""
    tests = []
    for values, add in (
        (rule.domain, NameIndex.add_exact),
        (rule.domain_suffix, NameIndex.add_suffix),
        (rule.domain_keyword, NameIndex.add_keyword),
    ):
        if values:
            test = NameIndex()
            for value in values:
                add(test, value, 0)
            tests.append(test)
    return tests


class Rules:
    """The ordered rules with their default. Immutable.

    country: the ISO 3166-1 alpha-2 code, in lower case, of a packed address; None where it is not known.
    asks_origin: whether `FlowInfo.origin` matters.
    """

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        default: str = DIRECT,
        country: CountryLookup = _no_country,
        surroundings: Surroundings | None = None,
    ) -> None:
        self.rules = tuple(rules)
        self.default = default
        self.surroundings = surroundings or Surroundings()
        self._country = country
        order = sorted(range(len(self.rules)), key=lambda index: (self.rules[index].priority, index))
        self.ranked = tuple(RankedRule(rank, index, self.rules[index]) for rank, index in enumerate(order))
        self.asks_origin = any(rule.asks_origin for rule in self.rules)
        self._rank_of = {ranked.index: ranked.rank for ranked in self.ranked}
        self._file_rules()
        self._builtin = PrefixIndex((network, 0) for network in self.surroundings.builtin_direct)
        self._own = PrefixIndex((network, 0) for network in self.surroundings.own_networks)
        self._fake = PrefixIndex((network, 0) for network in self.surroundings.fake_ranges)

    def placed_in(self, surroundings: Surroundings) -> Rules:
        """The same rules on a gateway that stands there."""
        return Rules(self.rules, self.default, self._country, surroundings)

    def _file_rules(self) -> None:
        """Put every rule where a lookup finds it: by its names, its prefixes, its countries, or always."""
        self._names = NameIndex()
        self._anywhere: set[int] = set()
        self._by_country: dict[str, set[int]] = {}
        prefixes: list[tuple[Network, int]] = []
        for ranked in self.ranked:
            rule = ranked.rule
            if rule.asks_name:
                if not rule.asks_address:  # one that asks for both can never match: a flow has the one or the other
                    self._file_names(rule, ranked.rank)
            elif rule.ip_cidr:
                prefixes.extend((network, ranked.rank) for network in rule.ip_cidr)
            elif rule.geoip:
                for code in rule.geoip:
                    self._by_country.setdefault(code.lower(), set()).add(ranked.rank)
            else:
                self._anywhere.add(ranked.rank)
        self._prefixes = PrefixIndex(prefixes)
        self._asks_country = any(rule.geoip for rule in self.rules)

    def _file_names(self, rule: Rule, rank: int) -> None:
        """By the most telling condition; the others are asked of the few rules that a lookup finds."""
        if rule.domain:
            for name in rule.domain:
                self._names.add_exact(name, rank)
        elif rule.domain_suffix:
            for name in rule.domain_suffix:
                self._names.add_suffix(name, rank)
        else:
            for keyword in rule.domain_keyword:
                self._names.add_keyword(keyword, rank)

    def decide(self, flow: FlowInfo) -> Decision:
        """The outbound for a new flow: that of the first rule whose conditions all hold.

        A flow with a name is matched by rules on names and never by rules on addresses, and the other way round.
        """
        candidates, last = self._candidates(flow)
        for ranked in candidates:
            if ranked.accepts(flow):
                return ranked.decision
        return last

    def decide_learned(self, flow: FlowInfo, rule: int) -> Decision:
        """The outbound for a flow to the real address of a name that `rule` (or ports.RULE_DEFAULT) sent direct.

        Better-ranked rules on the address go first, as in `learned_verdict`; then the rule that decided the name.
        """
        rank = self._rank_of.get(rule, len(self.ranked))
        candidates, _last = self._candidates(flow)
        for ranked in candidates:
            if ranked.rank < rank and ranked.accepts(flow):
                return ranked.decision
        return self.ranked[rank].decision if rank < len(self.ranked) else Decision(self.default, RULE_DEFAULT)

    def decide_name(self, name: str) -> NameDecision:
        """How to answer a DNS query for the name. What only a flow can decide gets a Fake-IP, so that it comes here."""
        candidates = self._name_candidates(canonical_name(name))
        verdict, rule = settle(candidates, verdict_of(self.default), RULE_DEFAULT)
        return NameDecision(_NAME_KINDS[verdict], rule)

    def learned_verdict(self, address: bytes, rule: int) -> Verdict:
        """The verdict for a real address of a name that `rule` (index or ports.RULE_DEFAULT) sent direct.

        A better-ranked rule that covers the address still wins, and so do the Fake-IP ranges.
        """
        if self._fake.covers(address):
            return Verdict.TUNNEL
        rank = self._rank_of.get(rule, len(self.ranked))
        candidates, _last = self._address_candidates(address)
        return settle((ranked for ranked in candidates if ranked.rank < rank), Verdict.DIRECT, rule)[0]

    def _candidates(self, flow: FlowInfo) -> tuple[list[RankedRule], Decision]:
        if flow.name is not None:
            return self._name_candidates(canonical_name(flow.name)), Decision(self.default, RULE_DEFAULT)
        if flow.address is not None:
            return self._address_candidates(flow.address)
        return self._in_order(self._anywhere), Decision(self.default, RULE_DEFAULT)

    def _name_candidates(self, name: str) -> list[RankedRule]:
        """The rules that match the name, as far as the name goes, in order."""
        found = self._names.ranks(name)
        return self._in_order({rank for rank in found if self.ranked[rank].matches_name(name)} | self._anywhere)

    def _address_candidates(self, address: bytes) -> tuple[list[RankedRule], Decision]:
        """The rules that match the address, as far as the address goes, in order, and what holds if none does."""
        if self._builtin.covers(address):
            return [], Decision(DIRECT, RULE_BUILTIN)
        own = self._own.longest(address)
        if own is not None:
            # Only rules that name this network or a part of it apply inside (see compilation.py).
            found = {rank for rank in self._prefixes.ranks(address, own) if not self.ranked[rank].rule.geoip}
            return self._in_order(found), Decision(DIRECT, RULE_BUILTIN)
        found = self._prefixes.ranks(address)
        if self._asks_country:
            found = self._in_country(found, self._country(address))
        return self._in_order(found | self._anywhere), Decision(self.default, RULE_DEFAULT)

    def _in_country(self, found: set[int], code: str | None) -> set[int]:
        """Of the rules whose prefixes cover an address, those that its country lets match, and those on it alone."""
        code = code.lower() if code else ""
        kept = {rank for rank in found if not (wanted := self.ranked[rank].rule.geoip) or code in wanted}
        return kept | self._by_country.get(code, set())

    def _in_order(self, ranks: set[int]) -> list[RankedRule]:
        return [self.ranked[rank] for rank in sorted(ranks)]


def settle(candidates: Iterable[RankedRule], last: Verdict, last_rule: int) -> tuple[Verdict, int]:
    """The verdict that holds for every flow to a name or an address, and the rule that gives it.

    candidates: the rules that match it, in order; last: what holds if none of them applies. Where conditional rules
    before the first unconditional one would decide otherwise than that one, only the flow can tell: TUNNEL.
    """
    seen: list[RankedRule] = []
    for ranked in candidates:
        if not ranked.is_conditional:
            last, last_rule = ranked.verdict, ranked.index
            break
        seen.append(ranked)
    if last is not Verdict.TUNNEL:
        for ranked in seen:
            if ranked.verdict is not last:
                return Verdict.TUNNEL, ranked.index
    return last, last_rule
