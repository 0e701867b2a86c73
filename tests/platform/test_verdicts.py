"""The tries against a naive longest match, thousands of packets at a time."""

from __future__ import annotations

import random
import socket
from collections import Counter

import pytest
from lan_world import GO_ON, REDIRECT, SHOT, Bench, frame, packed, prefix, udp

from ztun.platform.linux.layout import DECISION
from ztun.ports import RULE_DEFAULT, Prefix, Verdict

RETURNS = {Verdict.DIRECT: GO_ON, Verdict.TUNNEL: REDIRECT, Verdict.DROP: SHOT}
CLIENT = {4: "10.9.0.2", 16: "fd00:9::2"}


def longest_match(prefixes: list[Prefix], address: bytes) -> Prefix | None:
    """One bit string after the other."""
    bits = "".join(f"{octet:08b}" for octet in address)
    matching = [
        one
        for one in prefixes
        if len(one.network) == len(address)
        and bits.startswith("".join(f"{octet:08b}" for octet in one.network)[: one.length])
    ]
    return max(matching, key=lambda one: one.length, default=None)


def random_prefixes(random_: random.Random, size: int, count: int) -> list[Prefix]:
    """Nested, crowded prefixes: most are cut out of addresses that share their first bits."""
    found: dict[tuple[bytes, int], Prefix] = {}
    for _ in range(count):
        length = random_.choice([0, *range(1, size * 8 + 1), size * 8])
        network = mask(random_address(random_, size), length)
        found[network, length] = Prefix(network, length, random_.choice(list(Verdict)), random_.randrange(-4, 50))
    return list(found.values())


def random_address(random_: random.Random, size: int) -> bytes:
    """Few different octets, so that prefixes contain each other and addresses hit them."""
    return bytes(random_.choice([0x20, 0x21, 0x60]) for _ in range(size))


def mask(address: bytes, length: int) -> bytes:
    total = len(address) * 8
    kept = int.from_bytes(address, "big") >> (total - length) << (total - length)
    return kept.to_bytes(len(address), "big")


def show(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_every_address_gets_the_verdict_of_its_longest_prefix(bench: Bench, size: int, seed: int) -> None:
    random_ = random.Random(seed)
    prefixes = random_prefixes(random_, size, 150)
    bench.classifier.replace_rules(prefixes)
    rules: Counter[int] = Counter()
    for _ in range(700):
        address = random_address(random_, size)
        match = longest_match(prefixes, address)
        verdict, rule = (match.verdict, match.rule) if match else (Verdict.DIRECT, RULE_DEFAULT)
        rules[rule] += 1
        assert bench.run(frame(udp(CLIENT[size], show(address), 9))) == RETURNS[verdict], show(address)
    counted = {rule: value["packets"] for rule, value in bench.classifier.rule_counters().items() if value["packets"]}
    assert counted == dict(rules)


@pytest.mark.parametrize("seed", range(4))
def test_replacing_the_table_is_the_same_as_starting_with_it(bench: Bench, seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(5):
        prefixes = [*random_prefixes(random_, 4, 60), *random_prefixes(random_, 16, 60)]
        bench.classifier.replace_rules(prefixes)
        described = {
            (entry["prefix"], entry["verdict"], entry["rule"])
            for table in bench.classifier.snapshot()["maps"]
            if table["name"].startswith("prefixes")
            for entry in table["entries"]
        }
        wanted = {(f"{show(one.network)}/{one.length}", one.verdict.name.lower(), one.rule) for one in prefixes}
        assert described == wanted


def test_what_stays_in_the_table_keeps_its_hits(bench: Bench) -> None:
    stays = prefix("192.0.2.0/24", Verdict.TUNNEL, 1)
    bench.classifier.replace_rules([stays, prefix("198.51.100.0/24", Verdict.DROP, 2)])
    assert bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80))) == REDIRECT
    bench.classifier.replace_rules([stays, prefix("203.0.113.0/24", Verdict.DROP, 2)])
    entries = next(one["entries"] for one in bench.classifier.snapshot()["maps"] if one["name"] == "prefixes4")
    assert entries == [
        {"prefix": "192.0.2.0/24", "verdict": "tunnel", "rule": 1, "hits": 1},
        {"prefix": "203.0.113.0/24", "verdict": "drop", "rule": 2, "hits": 0},
    ]


def test_a_table_of_a_country_s_size_is_written_and_read_back_quickly(bench: Bench) -> None:
    prefixes = [Prefix((n << 12).to_bytes(4, "big"), 20, Verdict.DIRECT, n % 7) for n in range(30_000)]
    bench.classifier.replace_rules(prefixes)
    entries = next(one["entries"] for one in bench.classifier.snapshot()["maps"] if one["name"] == "prefixes4")
    assert [entry["rule"] for entry in entries] == [one.rule for one in prefixes]


@pytest.mark.parametrize(("client", "address"), [("10.9.0.2", "192.0.2.7"), ("fd00:9::2", "2001:db8::7")])
def test_a_learned_address_goes_ahead_of_its_prefix_until_forgotten(bench: Bench, client: str, address: str) -> None:
    everything = [prefix("0.0.0.0/0", Verdict.TUNNEL, RULE_DEFAULT), prefix("::/0", Verdict.TUNNEL, RULE_DEFAULT)]
    bench.classifier.replace_rules(everything)
    assert bench.run(frame(udp(client, address, 80))) == REDIRECT
    bench.classifier.learn(packed(address), Verdict.DIRECT, 3)
    assert bench.run(frame(udp(client, address, 80))) == GO_ON
    bench.classifier.learn(packed(address), Verdict.DROP, 4)
    assert bench.run(frame(udp(client, address, 80))) == SHOT
    bench.classifier.forget()
    assert bench.run(frame(udp(client, address, 80))) == REDIRECT


def test_more_is_learned_than_the_map_holds(bench: Bench) -> None:
    for number in range(70_000):
        bench.classifier.learn(number.to_bytes(4, "big"), Verdict.DIRECT, 1)
    entries = next(one["entries"] for one in bench.classifier.snapshot()["maps"] if one["name"] == "learned4")
    assert 0 < len(entries) <= 65_536
    assert "0.1.17.111" in {entry["address"] for entry in entries}  # the newest


def hits_of(bench: Bench, name: str) -> dict[str, int]:
    table = next(one["entries"] for one in bench.classifier.snapshot()["maps"] if one["name"] == name)
    return {entry.get("prefix") or entry["address"]: entry["hits"] for entry in table}


@pytest.mark.parametrize("packets", [1, 2, 63, 64, 65, 200])
def test_a_run_of_packets_to_one_address_is_counted_in_full(bench: Bench, packets: int) -> None:
    """Most of them are decided like the one before them, without a look into the tables."""
    bench.classifier.replace_rules([prefix("192.0.2.0/24", Verdict.DIRECT, 1), prefix("192.0.0.0/16", Verdict.DROP, 2)])
    for _ in range(packets):
        assert bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80))) == GO_ON
    assert hits_of(bench, "prefixes4") == {"192.0.2.0/24": packets, "192.0.0.0/16": 0}
    assert bench.classifier.rule_counters()[1]["packets"] == packets
    assert bench.classifier.counters()["direct"]["packets"] == packets


def test_addresses_that_share_a_place_are_counted_in_full(bench: Bench) -> None:
    bench.classifier.replace_rules(
        [prefix("10.0.0.0/7", Verdict.DIRECT, 1), prefix("2001:db8::/32", Verdict.DIRECT, 2)]
    )
    random_ = random.Random(5)
    sent: Counter[str] = Counter()
    for _ in range(3000):
        last = random_.randrange(1500)  # three times as many as there are places
        if random_.random() < 0.5:
            assert bench.run(frame(udp("10.9.0.2", f"10.1.{last >> 8}.{last & 255}", 80))) == GO_ON
            sent["10.0.0.0/7"] += 1
        else:
            assert bench.run(frame(udp("fd00:9::2", f"2001:db8::{last:x}", 80))) == GO_ON
            sent["2001:db8::/32"] += 1
    assert hits_of(bench, "prefixes4") | hits_of(bench, "prefixes6") == sent


def test_a_recent_address_is_decided_anew_after_every_change(bench: Bench) -> None:
    def seen() -> int:
        return bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80)))

    classifier, direct = bench.classifier, prefix("192.0.2.0/24", Verdict.DIRECT, 1)
    classifier.replace_rules([direct])
    assert [seen(), seen()] == [GO_ON, GO_ON]
    classifier.replace_rules([direct, prefix("192.0.2.1/32", Verdict.TUNNEL, 2)])
    assert [seen(), seen()] == [REDIRECT, REDIRECT]
    classifier.replace_own_addresses([packed("192.0.2.1")])
    assert [seen(), seen()] == [GO_ON, GO_ON]
    classifier.replace_own_addresses([])
    assert [seen(), seen()] == [REDIRECT, REDIRECT]
    classifier.learn(packed("192.0.2.1"), Verdict.DIRECT, 3)
    assert [seen(), seen()] == [GO_ON, GO_ON]
    classifier.learn(packed("192.0.2.1"), Verdict.DROP, 3)
    assert [seen(), seen()] == [SHOT, SHOT]
    classifier.forget()
    classifier.replace_rules([])
    assert [seen(), seen()] == [GO_ON, GO_ON]


def test_of_many_packets_to_a_recent_address_some_use_the_table(bench: Bench) -> None:
    """Or the kernel would take a learned address in use for one that can make room."""
    bench.classifier.learn(packed("192.0.2.1"), Verdict.DIRECT, 3)
    told = []
    for _ in range(130):
        assert bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80))) == GO_ON
        value = bench.classifier._maps["learned4"].lookup(packed("192.0.2.1"))
        told.append(DECISION.unpack(value or b"")[2])
    assert told == [1] * 64 + [65] * 64 + [129] * 2


def test_a_recent_address_that_the_kernel_forgot_is_not_direct_for_ever(bench: Bench) -> None:
    bench.classifier.replace_rules([prefix("0.0.0.0/0", Verdict.TUNNEL, RULE_DEFAULT)])
    bench.classifier.learn(packed("192.0.2.1"), Verdict.DIRECT, 3)
    seen = [bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80))) for _ in range(10)]
    bench.classifier._maps["learned4"].delete(packed("192.0.2.1"))  # as when others need its place
    seen += [bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80))) for _ in range(90)]
    assert seen == [GO_ON] * 64 + [REDIRECT] * 36


def test_ipv6_to_a_mapped_address_does_not_decide_about_ipv4(bench: Bench) -> None:
    bench.classifier.replace_rules(
        [
            prefix("192.0.2.0/24", Verdict.DROP, 1),
            prefix("198.51.100.0/24", Verdict.DIRECT, 2),
            prefix("::/0", Verdict.DIRECT, 3),
        ]
    )
    for _ in range(3):
        assert bench.run(frame(udp("fd00:9::2", "::ffff:192.0.2.1", 80))) == GO_ON
        assert bench.run(frame(udp("10.9.0.2", "192.0.2.1", 80))) == SHOT
        assert bench.run(frame(udp("10.9.0.2", "198.51.100.1", 80))) == GO_ON
        assert bench.run(frame(udp("fd00:9::2", "::ffff:198.51.100.1", 80))) == GO_ON
    assert {rule: values["packets"] for rule, values in bench.classifier.rule_counters().items() if rule > 0} == {
        1: 3, 2: 3, 3: 6,
    }  # fmt: skip


def test_port_53_of_a_recent_address_is_still_taken() -> None:
    bench = Bench(hijack_dns=True, own=["10.9.0.1"])
    try:
        for address, query in (("192.0.2.1", REDIRECT), ("10.9.0.1", GO_ON)):
            for _ in range(3):
                assert bench.run(frame(udp("10.9.0.2", address, 80))) == GO_ON
                assert bench.run(frame(udp("10.9.0.2", address, 53))) == query
    finally:
        bench.close()


def test_recent_addresses_are_shown_with_the_rule_that_still_holds(bench: Bench) -> None:
    def recents() -> list[dict[str, object]]:
        return next(one["entries"] for one in bench.classifier.snapshot()["maps"] if one["name"] == "recents")

    bench.classifier.replace_rules([prefix("192.0.2.0/24", Verdict.DIRECT, 1)])
    for address in ("192.0.2.1", "198.51.100.1"):
        bench.run(frame(udp("10.9.0.2", address, 80)))
    assert recents() == [{"address": "192.0.2.1", "rule": 1}, {"address": "198.51.100.1", "rule": RULE_DEFAULT}]
    bench.classifier.replace_rules([])
    assert recents() == []
