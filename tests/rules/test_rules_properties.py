"""Random rules against the naive oracles: the prefix table, decisions about flows and about names."""

from __future__ import annotations

from itertools import pairwise

import rules_oracle as naive
from hypothesis import given, settings
from hypothesis import strategies as st
from rules_cases import NAMES, World, addresses, edges_of, flows, networks_of_few_addresses, worlds

from ztun.ports import Prefix, Verdict
from ztun.rules import NameKind, Rule, Rules, compile_prefixes, verdict_of


def make_rules(world: World) -> Rules:
    def country(address: bytes) -> str | None:
        return naive.country_of(world.countries, address)

    return Rules(world.rules, world.default, country, world.around)


def make_table(world: World, with_countries: bool = True) -> list[Prefix]:
    around = world.around
    countries = world.countries.__getitem__ if with_countries else None
    return compile_prefixes(
        make_rules(world), around.builtin_direct, around.own_networks, around.fake_ranges, countries
    )


@settings(max_examples=300, deadline=None)
@given(worlds(), st.data())
def test_the_longest_match_in_the_table_is_what_first_match_says(world: World, data: st.DataObject) -> None:
    table = make_table(world)
    for address in [*world.edges, data.draw(addresses(world))]:
        expected = naive.verdict_for(world.rules, world.default, address, world.around, world.countries)
        assert naive.longest_match(table, address).verdict is expected


@settings(max_examples=200, deadline=None)
@given(worlds(), st.data())
def test_what_the_kernel_decides_alone_is_what_every_flow_would_get(world: World, data: st.DataObject) -> None:
    rules, table = make_rules(world), make_table(world)
    flow = data.draw(flows(world).filter(lambda flow: flow.address is not None))
    found = naive.longest_match(table, flow.address)
    if found.verdict is not Verdict.TUNNEL:
        assert verdict_of(rules.decide(flow).outbound) is found.verdict


@settings(max_examples=200, deadline=None)
@given(worlds(), st.data())
def test_the_rule_named_in_the_table_is_one_that_covers_the_address(world: World, data: st.DataObject) -> None:
    table = make_table(world)
    address = data.draw(addresses(world))
    found = naive.longest_match(table, address)
    if found.rule >= 0:
        assert naive.address_part(world.rules[found.rule], address, world.around, world.countries)
    if found.verdict is not Verdict.TUNNEL and found.rule >= 0:
        assert verdict_of(world.rules[found.rule].outbound) is found.verdict


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_networks_and_countries_of_a_rule_are_intersected(data: st.DataObject) -> None:
    networks = st.lists(data.draw(networks_of_few_addresses()), min_size=1, max_size=4)
    wanted, country = data.draw(networks), data.draw(networks)
    rules = Rules([Rule("office", ip_cidr=tuple(wanted), geoip=("de",))], "direct")
    table = compile_prefixes(rules, (), (), (), {"de": country}.__getitem__)
    for address in edges_of([*wanted, *country]):
        is_both = naive.covered(address, wanted) and naive.covered(address, country)
        assert (naive.longest_match(table, address).verdict is Verdict.TUNNEL) == is_both


@settings(max_examples=200, deadline=None)
@given(worlds())
def test_the_table_is_well_formed_and_says_nothing_twice(world: World) -> None:
    table = make_table(world)
    keys = [(len(prefix.network), prefix.network, prefix.length) for prefix in table]
    assert all(left < right for left, right in pairwise(keys))
    assert {(4, bytes(4), 0), (16, bytes(16), 0)} <= set(keys)
    for prefix in table:
        bits = len(prefix.network) * 8
        assert int.from_bytes(prefix.network) & ((1 << bits - prefix.length) - 1) == 0
        others = [other for other in table if other.length < prefix.length]
        if prefix.length:
            around = naive.longest_match(others, prefix.network)
            assert (around.verdict, around.rule) != (prefix.verdict, prefix.rule)


@settings(max_examples=200, deadline=None)
@given(worlds(), st.data())
def test_without_the_country_networks_the_table_tunnels_what_it_cannot_know(world: World, data: st.DataObject) -> None:
    rules, table = make_rules(world), make_table(world, with_countries=False)
    flow = data.draw(flows(world).filter(lambda flow: flow.address is not None))
    found = naive.longest_match(table, flow.address)
    if found.verdict is not Verdict.TUNNEL:
        assert verdict_of(rules.decide(flow).outbound) is found.verdict


@settings(max_examples=300, deadline=None)
@given(worlds(), st.data())
def test_a_flow_goes_to_the_first_rule_that_matches_it(world: World, data: st.DataObject) -> None:
    flow = data.draw(flows(world))
    expected = naive.decide(world.rules, world.default, flow, world.around, world.countries)
    assert make_rules(world).decide(flow) == expected


@settings(max_examples=200, deadline=None)
@given(worlds(), NAMES)
def test_a_name_is_answered_as_its_rules_agree(world: World, name: str) -> None:
    candidates = [rule for _, rule in naive.in_order(world.rules) if naive.name_part(rule, name)]
    expected = naive.law(candidates, verdict_of(world.default))
    kinds = {Verdict.DIRECT: NameKind.DIRECT, Verdict.TUNNEL: NameKind.FAKE, Verdict.DROP: NameKind.BLOCK}
    assert make_rules(world).decide_name(name).kind is kinds[expected]


@settings(max_examples=200, deadline=None)
@given(worlds(), st.data())
def test_an_address_of_a_direct_name_is_overruled_by_better_rules_only(world: World, data: st.DataObject) -> None:
    address = data.draw(addresses(world))
    order = [index for index, _ in naive.in_order(world.rules)]
    rule = data.draw(st.sampled_from([-1, *order]))
    better = [world.rules[index] for index in (order if rule < 0 else order[: order.index(rule)])]
    covering = [r for r in better if naive.address_part(r, address, world.around, world.countries)]
    expected = naive.law(covering, Verdict.DIRECT)
    if naive.covered(address, world.around.builtin_direct):
        expected = Verdict.DIRECT
    if naive.covered(address, world.around.fake_ranges):
        expected = Verdict.TUNNEL
    assert make_rules(world).learned_verdict(address, rule) is expected
