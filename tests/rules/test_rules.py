"""Rules as somebody writes them, and what becomes of flows, names and prefixes."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, RULE_FAKE_IP, Origin, Verdict
from ztun.rules import (
    BUILTIN_DIRECT,
    Decision,
    FlowInfo,
    NameDecision,
    NameKind,
    Network,
    Rule,
    Rules,
    Surroundings,
    compile_prefixes,
    make_surroundings,
)

CLIENT = "10.0.0.7"


def nets(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


def packed(address: str) -> bytes:
    return ip_address(address).packed


def to(target: str, port: int = 443, protocol: str = "tcp", source: str = CLIENT) -> FlowInfo:
    """A flow to an address literal or a name."""
    is_address = target[0].isdigit() or ":" in target
    return FlowInfo(
        protocol, packed(source), packed(target) if is_address else None, None if is_address else target, port
    )


def table(rules: Rules, around: Surroundings | None = None, **options: Any) -> dict[str, tuple[str, int]]:
    around = around or Surroundings()
    prefixes = compile_prefixes(rules, around.builtin_direct, around.own_networks, around.fake_ranges, **options)
    return {
        f"{ip_address(prefix.network)}/{prefix.length}": (prefix.verdict.name, prefix.rule)
        for prefix in prefixes
        if prefix.length or len(prefix.network) == 4
    }


def test_the_first_rule_that_matches_takes_the_flow() -> None:
    rules = Rules(
        [
            Rule("office", domain_suffix=("corp.example",)),
            Rule("web", ip_cidr=nets("192.0.2.0/24"), ports=((80, 80), (443, 443)), protocols=("tcp",)),
            Rule("far", ip_cidr=nets("192.0.0.0/8")),
        ],
        "direct",
    )
    assert rules.decide(to("git.corp.example")) == Decision("office", 0)
    assert rules.decide(to("192.0.2.9")) == Decision("web", 1)
    assert rules.decide(to("192.0.2.9", protocol="udp")) == Decision("far", 2)
    assert rules.decide(to("192.0.2.9", port=22)) == Decision("far", 2)
    assert rules.decide(to("198.51.100.1")) == Decision("direct", RULE_DEFAULT)


def test_a_lower_priority_goes_first_and_the_index_stays_that_of_the_file() -> None:
    rules = Rules(
        [
            Rule("office", domain_suffix=("example",)),
            Rule("block", domain_keyword=("tele",), priority=-5),
            Rule("web", domain_keyword=("tele",), priority=-5),
        ]
    )
    assert rules.decide(to("telemetry.example")) == Decision("block", 1)


@pytest.mark.parametrize("name", ["corp.example", "a.b.corp.example", "CORP.Example.", "Git.Corp.Example"])
def test_a_suffix_matches_itself_and_what_is_below_in_any_case(name: str) -> None:
    assert Rules([Rule("office", domain_suffix=("corp.example",))]).decide(to(name)).outbound == "office"


@pytest.mark.parametrize("name", ["xcorp.example", "example", "corp.example.net", "corp-example"])
def test_a_suffix_matches_whole_labels_only(name: str) -> None:
    assert Rules([Rule("office", domain_suffix=("corp.example",))]).decide(to(name)).rule == RULE_DEFAULT


def test_a_domain_matches_that_name_alone() -> None:
    rules = Rules([Rule("office", domain=("corp.example",))])
    assert rules.decide(to("Corp.Example.")).outbound == "office"
    assert rules.decide(to("git.corp.example")).outbound == "direct"


def test_conditions_are_anded_and_values_ored() -> None:
    rules = Rules([Rule("office", domain_suffix=("corp.example", "corp.test"), domain_keyword=("git", "ci"))])
    assert rules.decide(to("git.corp.test")).outbound == "office"
    assert rules.decide(to("ci.corp.example")).outbound == "office"
    assert rules.decide(to("www.corp.example")).outbound == "direct"
    assert rules.decide(to("git.example")).outbound == "direct"


def test_a_flow_with_a_name_is_not_matched_by_its_address() -> None:
    rules = Rules([Rule("office", ip_cidr=nets("0.0.0.0/0"))])
    named = FlowInfo("tcp", packed(CLIENT), packed("198.18.0.9"), "www.example", 443)
    assert rules.decide(named) == Decision("direct", RULE_DEFAULT)


def test_ports_are_of_tcp_and_udp_with_both_ends_of_a_range() -> None:
    rules = Rules([Rule("web", ports=((8000, 8999), (80, 80), (79, 81)))])
    taken = [port for port in (78, 79, 80, 81, 82, 7999, 8000, 8999, 9000) if rules.decide(to("a", port)).rule == 0]
    assert taken == [79, 80, 81, 8000, 8999]
    assert rules.decide(to("a", 80, "udp")).rule == 0
    assert Rules([Rule("web", ports=((0, 65535),))]).decide(to("192.0.2.1", 0, "icmp")).rule == RULE_DEFAULT


def test_the_source_counts_in_its_own_family() -> None:
    rules = Rules([Rule("block", source_cidr=nets("10.0.0.0/29", "2001:db8::/64"))])
    assert rules.decide(to("a", source="10.0.0.7")).outbound == "block"
    assert rules.decide(to("a", source="10.0.0.8")).outbound == "direct"
    assert rules.decide(to("a", source="2001:db8::1")).outbound == "block"


def test_where_a_client_is_counts_where_it_is_known() -> None:
    phone, printer = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
    rules = Rules(
        [
            Rule("block", source_mac=(phone,), interface=("guest",)),
            Rule("office", source_mac=(phone,)),
            Rule("web", interface=("guest", "wg0")),
        ]
    )
    assert rules.asks_origin
    assert not Rules([Rule("web", source_cidr=nets("10.0.0.0/8"))]).asks_origin

    def by(origin: Origin | None) -> str:
        return rules.decide(to("192.0.2.1")._replace(origin=origin)).outbound

    assert by(Origin("guest", phone)) == "block"
    assert by(Origin("lan0", phone)) == "office"
    assert by(Origin("guest", printer)) == "web"
    assert by(Origin("wg0", None)) == "web"  # no link layer, no MAC address
    assert by(Origin("lan0", printer)) == "direct"
    assert by(None) == "direct"


def test_what_only_some_clients_get_is_decided_behind_the_tunnel() -> None:
    rules = Rules(
        [
            Rule("block", ip_cidr=nets("192.0.2.0/24"), interface=("guest",)),
            Rule("direct", ip_cidr=nets("198.51.100.0/24"), source_mac=(bytes(6),)),
        ],
        "direct",
    )
    assert table(rules) == {"0.0.0.0/0": ("DIRECT", RULE_DEFAULT), "192.0.2.0/24": ("TUNNEL", 0)}


def test_a_country_is_looked_up_in_any_case() -> None:
    rules = Rules([Rule("office", geoip=("de",))], country=lambda a: "DE" if a == packed("192.0.2.1") else None)
    assert rules.decide(to("192.0.2.1")).outbound == "office"
    assert rules.decide(to("192.0.2.2")).outbound == "direct"


def test_names_are_answered_by_what_their_rules_say() -> None:
    rules = Rules(
        [
            Rule("direct", domain_suffix=("local.example",)),
            Rule("block", domain_keyword=("telemetry",)),
            Rule("office", ip_cidr=nets("0.0.0.0/0")),
            Rule("dns", domain=("resolver.example",)),
        ],
        "office",
    )
    assert rules.decide_name("A.Local.Example.") == NameDecision(NameKind.DIRECT, 0)
    assert rules.decide_name("telemetry.example") == NameDecision(NameKind.BLOCK, 1)
    assert rules.decide_name("resolver.example") == NameDecision(NameKind.FAKE, 3)
    assert rules.decide_name("www.example") == NameDecision(NameKind.FAKE, RULE_DEFAULT)


def test_a_name_that_only_the_port_decides_gets_a_fake_ip() -> None:
    rules = Rules([Rule("block", ports=((25, 25),)), Rule("direct", domain_suffix=("example",))], "direct")
    assert rules.decide_name("mail.example") == NameDecision(NameKind.FAKE, 0)
    agreed = Rules([Rule("direct", ports=((25, 25),)), Rule("direct", domain_suffix=("example",))], "office")
    assert agreed.decide_name("mail.example") == NameDecision(NameKind.DIRECT, 1)


def test_an_address_of_a_direct_name_yields_to_better_rules_only() -> None:
    rules = Rules(
        [
            Rule("block", ip_cidr=nets("192.0.2.0/24")),
            Rule("direct", domain_suffix=("example",)),
            Rule("office", ip_cidr=nets("198.51.100.0/24")),
        ],
        "office",
    ).placed_in(Surroundings(nets("10.0.0.1/32"), nets("10.0.0.0/24"), nets("198.18.0.0/15")))
    assert rules.learned_verdict(packed("192.0.2.1"), 1) is Verdict.DROP
    assert rules.learned_verdict(packed("198.51.100.1"), 1) is Verdict.DIRECT
    assert rules.learned_verdict(packed("198.51.100.1"), RULE_DEFAULT) is Verdict.TUNNEL
    assert rules.learned_verdict(packed("203.0.113.1"), 1) is Verdict.DIRECT
    assert rules.learned_verdict(packed("198.18.0.9"), 1) is Verdict.TUNNEL
    assert rules.learned_verdict(packed("10.0.0.1"), 1) is Verdict.DIRECT


def test_a_flow_to_an_address_of_a_direct_name_remembers_the_name() -> None:
    rules = Rules(
        [
            Rule("web", ip_cidr=nets("192.0.2.0/24"), ports=((80, 80),)),
            Rule("direct", domain_suffix=("example",)),
            Rule("block", ip_cidr=nets("192.0.2.0/24")),
        ],
        "office",
    )
    assert rules.decide_name("www.example") == NameDecision(NameKind.DIRECT, 1)
    assert rules.learned_verdict(packed("192.0.2.1"), 1) is Verdict.TUNNEL
    assert rules.decide_learned(to("192.0.2.1", 80), 1) == Decision("web", 0)
    assert rules.decide_learned(to("192.0.2.1", 443), 1) == Decision("direct", 1)
    assert rules.decide(to("192.0.2.1", 443)) == Decision("block", 2)
    assert rules.decide_learned(to("203.0.113.1", 443), RULE_DEFAULT) == Decision("office", RULE_DEFAULT)


def test_prefixes_carry_the_verdict_of_the_best_rule_around_them() -> None:
    rules = Rules(
        [
            Rule("block", ip_cidr=nets("10.1.2.0/24")),
            Rule("office", ip_cidr=nets("10.1.0.0/16")),
            Rule("direct", ip_cidr=nets("10.1.2.3/32", "10.1.3.0/24")),
        ],
        "direct",
    )
    assert table(rules) == {
        "0.0.0.0/0": ("DIRECT", RULE_DEFAULT),
        "10.1.0.0/16": ("TUNNEL", 1),
        "10.1.2.0/24": ("DROP", 0),
    }


def test_what_ports_decide_is_tunnelled_unless_all_agree() -> None:
    web = Rule("web", ip_cidr=nets("192.0.2.0/24"), ports=((80, 80),))
    assert table(Rules([web], "direct"))["192.0.2.0/24"] == ("TUNNEL", 0)
    block = Rule("block", ip_cidr=nets("192.0.2.0/24"), protocols=("udp",))
    assert table(Rules([block, Rule("block", ip_cidr=nets("192.0.2.0/25"))], "office")) == {
        "0.0.0.0/0": ("TUNNEL", RULE_DEFAULT),
        "192.0.2.0/25": ("DROP", 1),
    }


def test_a_rule_on_ports_alone_does_not_take_the_blame_for_the_default() -> None:
    assert table(Rules([Rule("block", ports=((25, 25),))], "office")) == {"0.0.0.0/0": ("TUNNEL", RULE_DEFAULT)}
    assert table(Rules([Rule("block", ports=((25, 25),))], "direct")) == {"0.0.0.0/0": ("TUNNEL", 0)}


def test_rules_of_equal_verdict_keep_entries_of_their_own_to_be_counted_apart() -> None:
    rules = Rules([Rule("web", ip_cidr=nets("10.1.0.0/16")), Rule("office", ip_cidr=nets("10.0.0.0/8"))])
    assert table(rules)["10.1.0.0/16"] == ("TUNNEL", 0)
    assert table(rules)["10.0.0.0/8"] == ("TUNNEL", 1)


def test_own_networks_are_direct_unless_a_rule_names_them_or_a_part() -> None:
    around = Surroundings(own_networks=nets("10.0.0.0/24", "10.0.1.0/24", "10.0.2.0/24"))
    rules = Rules(
        [
            Rule("office", ip_cidr=nets("10.0.0.0/8")),
            Rule("web", ip_cidr=nets("10.0.1.0/24")),
            Rule("block", ip_cidr=nets("10.0.2.128/25")),
            Rule("block", ports=((25, 25),)),
            Rule("block", geoip=("de",)),
        ],
        "office",
        country=lambda address: "de",
    )
    compiled = table(rules, around, country_prefixes=lambda code: nets("10.0.0.64/26", "203.0.113.0/24"))
    assert compiled == {
        "0.0.0.0/0": ("TUNNEL", RULE_DEFAULT),
        "10.0.0.0/8": ("TUNNEL", 0),
        "10.0.0.0/24": ("DIRECT", RULE_BUILTIN),
        "10.0.1.0/24": ("TUNNEL", 1),
        "10.0.2.0/24": ("DIRECT", RULE_BUILTIN),
        "10.0.2.128/25": ("DROP", 2),
        "203.0.113.0/24": ("DROP", 4),
    }
    placed = rules.placed_in(around)
    assert placed.decide(to("10.0.0.70", 25)) == Decision("direct", RULE_BUILTIN)
    assert placed.decide(to("10.0.1.70", 25)) == Decision("web", 1)
    assert placed.decide(to("10.0.2.200")) == Decision("block", 2)
    assert placed.decide(to("10.9.0.1")) == Decision("office", 0)


def test_port_by_port_an_own_network_goes_only_where_a_rule_names_it() -> None:
    around = Surroundings(own_networks=nets("10.0.0.0/24"))
    rules = Rules([Rule("web", ip_cidr=nets("10.0.0.5/32"), ports=((80, 80),))], "office")
    assert table(rules, around)["10.0.0.5/32"] == ("TUNNEL", 0)
    assert rules.placed_in(around).decide(to("10.0.0.5", 80)) == Decision("web", 0)
    assert rules.placed_in(around).decide(to("10.0.0.5", 22)) == Decision("direct", RULE_BUILTIN)


def test_built_in_prefixes_stand_above_the_rules_and_fake_ips_above_all() -> None:
    rules = Rules([Rule("block", ip_cidr=nets("0.0.0.0/0", "127.0.0.1/32", "198.18.0.0/16"))], "office")
    around = make_surroundings([(packed("198.18.0.1"), 15), (packed("10.0.0.1"), 24)], nets("198.18.0.0/15"))
    compiled = table(rules, around)
    assert compiled["0.0.0.0/0"] == ("DROP", 0)
    assert compiled["127.0.0.0/8"] == ("DIRECT", RULE_BUILTIN)
    assert compiled["198.18.0.0/15"] == ("TUNNEL", RULE_FAKE_IP)
    assert compiled["10.0.0.0/24"] == ("DIRECT", RULE_BUILTIN)
    assert not any(prefix.startswith(("127.0.0.1", "198.18.0.1")) for prefix in compiled)


def test_countries_and_networks_of_one_rule_are_intersected() -> None:
    rules = Rules([Rule("office", ip_cidr=nets("192.0.2.0/24", "198.51.100.0/25", "::/0"), geoip=("de",))])
    countries = {"de": nets("192.0.0.0/8", "198.51.100.64/26", "198.51.100.128/25", "2001:db8::/32")}
    assert table(rules, country_prefixes=countries.__getitem__) == {
        "0.0.0.0/0": ("DIRECT", RULE_DEFAULT),
        "192.0.2.0/24": ("TUNNEL", 0),
        "198.51.100.64/26": ("TUNNEL", 0),
        "2001:db8::/32": ("TUNNEL", 0),
    }


def test_without_country_networks_a_country_is_left_to_the_flow_but_own_networks_stay_direct() -> None:
    rules = Rules([Rule("office", ip_cidr=nets("10.0.0.0/16"), geoip=("de",))])
    assert table(rules, Surroundings(own_networks=nets("10.0.0.0/16"))) == {
        "0.0.0.0/0": ("DIRECT", RULE_DEFAULT),
        "10.0.0.0/16": ("DIRECT", RULE_BUILTIN),
    }
    assert table(rules)["10.0.0.0/16"] == ("TUNNEL", 0)


def test_surroundings_know_the_gateways_addresses_networks_and_broadcasts() -> None:
    around = make_surroundings(
        [
            (packed("10.0.0.1"), 24),
            (packed("192.0.2.1"), 31),
            (packed("203.0.113.9"), 32),
            (packed("2001:db8::1"), 64),
            (packed("2001:db8:9::1"), 128),
        ]
    )
    assert around.own_networks == nets("10.0.0.0/24", "192.0.2.0/31", "2001:db8::/64")
    added = nets("10.0.0.1", "10.0.0.255", "192.0.2.1", "203.0.113.9", "2001:db8::1", "2001:db8:9::1")
    assert around.builtin_direct == (*BUILTIN_DIRECT, *added)


NEVER_FORWARDED = "127.0.0.1 169.254.1.1 224.0.0.251 239.255.255.250 255.255.255.255 0.0.0.0 ::1 :: fe80::1 ff02::1"


@pytest.mark.parametrize("address", NEVER_FORWARDED.split())
def test_what_no_router_forwards_is_always_direct(address: str) -> None:
    rules = Rules([Rule("block", ip_cidr=nets("0.0.0.0/0", "::/0"))]).placed_in(make_surroundings([]))
    assert rules.decide(to(address)) == Decision("direct", RULE_BUILTIN)


def test_a_hundred_thousand_prefixes_compile_in_a_moment() -> None:
    """Quadratic work would run into the time limit of the test many times over."""
    many = [ip_network((index * 2654435761 % (1 << 32) >> 8 << 8, 24)) for index in range(100_000)]
    rules = [Rule("office", ip_cidr=tuple(many))]
    rules += [Rule("web", ip_cidr=nets(f"10.{index % 256}.0.0/16"), ports=((index, index),)) for index in range(2000)]
    rules += [Rule("block", ip_cidr=tuple(ip_network((0, length)) for length in range(33)))]
    compiled = compile_prefixes(Rules(rules, "direct"), (), (), ())
    assert sum(prefix.rule == 0 for prefix in compiled) == len(set(many))


def test_ten_thousand_suffixes_cost_a_lookup_no_more_than_ten() -> None:
    rules = Rules([Rule("office", domain_suffix=tuple(f"n{index}.example" for index in range(10_000)))])
    assert rules.decide(to("a.b.n9999.example")) == Decision("office", 0)
    assert rules.decide(to("a.b.n10000.example")) == Decision("direct", RULE_DEFAULT)
