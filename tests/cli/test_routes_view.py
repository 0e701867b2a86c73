"""`ztun routes` at 80 columns, whatever there is to show; and what --watch makes of two answers."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from ztun.cli.routes_view import print_routes
from ztun.cli.watch import add_rates
from ztun.control.bodies import cut_maps, encode

IFNAME = "enp0s31f6vlan40"  # 15 letters, the longest
PREFIX6 = "2001:db8:1111:2222:3333:4444:5555:6666/128"
LOCAL6 = "2001:2:0:ffff:ffff:ffff:ffff:ffff/128"
TABLE = 4_294_967_295
LARGE = 18_446_744_073_709_551_615


def program(hook: str, name: str, owner: str) -> dict[str, Any]:
    direction = hook.rpartition("/")[2]
    about = {"hook": hook, "direction": direction, "name": name, "id": 4_294_967, "tag": "0123456789abcdef"}
    return {**about, "filter": f"{name}:{'long' * 20}", "owner": owner}


def counted(**entry: Any) -> dict[str, Any]:
    return {**entry, "hits": LARGE, "packets": LARGE, "bytes": LARGE}


NASTY: dict[str, Any] = {
    "state": "running",
    "pid": 4_194_304,
    "backend": "clsact",
    "fallback_reason": "the verifier said " + "something long " * 20,
    "heartbeat": {"age_ms": 123_456_789, "limit_ms": 1000, "stale": True},
    "firewall": {
        "drops": ["ip filter FORWARD"],
        "remedy": f'nft insert rule ip filter FORWARD iifname "{IFNAME}" accept',
    },
    "waiting": [f"{IFNAME[:-2]}{number:02}" for number in range(12)],
    "interfaces": [
        {
            "ifname": IFNAME,
            "role": "lan",
            "state": f"cannot attach to {IFNAME} (clsact): EPERM: Operation not permitted, and more words than fit",
            "ifindex": 1_000_000,
            "link": "no carrier",
            "mtu": 65535,
            "attached": [
                program("clsact/ingress", "capture", "ztun"),
                program("clsact/egress", "a_name_too_long", "other"),
                {**program("xdp/generic", "x", "other"), "name": None, "tag": None, "id": None},
            ],
        }
    ],
    "routes": [{"destination": PREFIX6, "device": IFNAME, "protocol": "ztun", "table": 2_054_481_031, "type": "throw"}],
    "ip_rules": [
        {"family": "ipv6", "priority": 31339, "iif": IFNAME, "table": TABLE, "ip_protocol": 17, "port": 53},
        {"family": "ipv6", "priority": 31331, "iif": "lo", "table": TABLE, "from": LOCAL6, "ip_protocol": 58},
    ],
    "sysctls": [{"key": f"ipv6.conf.{IFNAME}.force_forwarding", "before": "0", "now": None}],
    "leftovers": [f"tc filter ztun:{IFNAME}:capture_l3:qdisc on {IFNAME}, which nobody has removed for a while"],
    "rules": [
        counted(rule=16383, conditions="domain_suffix " + "very-long-name.example.org " * 9, outbound="o" * 40),
        {"rule": 0, "conditions": "port 80", "outbound": "direct"},
    ],
    "maps": [
        {"name": "prefixes6", "type": "lpm_trie", "entries": [counted(prefix=PREFIX6, verdict="tunnel", rule=-4)]},
        {"name": "clients", "type": "lru_hash", "entries": [{"address": PREFIX6[:-4], "ifname": IFNAME, "mac": None}]},
        {"name": "counters", "type": "percpu_array", "entries": [counted(counter="drop_bad_extension")]},
        {"name": "learned4", "type": "lru_hash", "entries": []},
    ],
    "counters": {"drop_short_transport": {"packets": LARGE, "bytes": LARGE}, "direct": {"packets": 0, "bytes": 0}},
    "unseen": ["names and tags of BPF programs (needs CAP_SYS_ADMIN)"],
}


def render(answer: dict[str, Any], *, width: int = 80, every: bool = False, name: str | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False)
    print_routes(console, answer, every=every, name=name)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def with_rates(answer: dict[str, Any]) -> dict[str, Any]:
    counters = {
        name: {**figures, "packets_per_s": 9e9, "bytes_per_s": 9e9} for name, figures in answer["counters"].items()
    }
    rules = [{**rule, "packets_per_s": 123_456_789.0} for rule in answer["rules"]]
    return {**answer, "counters": counters, "rules": rules}


@pytest.mark.parametrize("every", [False, True], ids=["some", "all"])
@pytest.mark.parametrize("answer", [NASTY, with_rates(NASTY)], ids=["once", "watching"])
def test_no_line_is_longer_than_80_columns(answer: dict[str, Any], every: bool) -> None:
    assert max(map(len, render(answer, every=every))) <= 80


def test_prefixes_and_numbers_are_never_cut() -> None:
    lines = render(NASTY)
    [row] = [line for line in lines if PREFIX6 in line and "tunnel" in line]
    assert "dns hijack" in row
    assert any(line.startswith(f"  {PREFIX6} device {IFNAME}") for line in lines)
    assert f"  31339: ipv6 iif {IFNAME} proto udp port 53 lookup {TABLE}" in lines
    assert f"31331: ipv6 from {LOCAL6} iif lo proto icmpv6 lookup {TABLE}" in " ".join(" ".join(lines).split())


def test_long_conditions_are_cut_on_their_line() -> None:
    rows = [line for line in render(NASTY) if "domain_suffix" in line]
    assert len(rows) == 1
    assert "…" in rows[0]


def test_others_programs_are_told_apart() -> None:
    lines = render(NASTY)
    assert any("capture" in line and "not ours" not in line and "id 4294967" in line for line in lines)
    assert any("a_name_too_long" in line and line.endswith("not ours") for line in lines)


def test_what_is_zero_or_empty_takes_no_room() -> None:
    lines = render(NASTY)
    assert not any(line.startswith("  direct ") for line in lines)
    assert "Empty maps  learned4" in lines
    assert any(line.startswith("  direct ") for line in render(NASTY, every=True))


def large(count: int) -> dict[str, Any]:
    entries = [{"prefix": f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32", "hits": n % 1000} for n in range(count)]
    return {"maps": [{"name": "prefixes4", "type": "lpm_trie", "entries": entries}]}


def test_a_large_map_is_cut_with_a_count() -> None:
    cut = cut_maps(large(100_000), 20)
    lines = render({**cut, "backend": "tcx"})
    assert "Map prefixes4  lpm_trie, 100,000 entries" in lines
    assert "  … 99,980 more with fewer hits; --all shows them" in lines
    assert [entry["hits"] for entry in cut["maps"][0]["entries"]] == [999] * 20
    assert [entry["prefix"] for entry in cut["maps"][0]["entries"]][:2] == ["10.0.3.231/32", "10.0.7.207/32"]


def test_one_map_has_all_its_entries() -> None:
    answer = large(50)
    answer["maps"].append({"name": "own", "type": "hash", "entries": []})
    cut = cut_maps(answer, 20, "prefixes4")
    assert [(table["name"], len(table["entries"])) for table in cut["maps"]] == [("prefixes4", 50)]


def test_encoding_in_pieces_says_the_same() -> None:
    import json

    for answer in (NASTY, large(1501), {"maps": []}, {}):
        assert json.loads(encode(answer)) == answer


def test_rates_are_what_changed_in_a_second() -> None:
    before = {
        "counters": {"direct": {"packets": 10, "bytes": 1000}},
        "rules": [{"rule": 0, "packets": 5, "bytes": 1}],
        "maps": [{"name": "prefixes4", "entries": [{"prefix": "10.0.0.0/8", "hits": 7}]}],
    }
    now = {
        "counters": {"direct": {"packets": 30, "bytes": 5000}, "drop": {"packets": 1, "bytes": 1}},
        "rules": [{"rule": 0, "packets": 5, "bytes": 1}],
        "maps": [
            {"name": "prefixes4", "entries": [{"prefix": "10.0.0.0/8", "hits": 8}, {"prefix": "::/0", "hits": 9}]}
        ],
    }
    added = add_rates(now, before, 2.0)
    assert added["counters"]["direct"] == {"packets": 30, "bytes": 5000, "packets_per_s": 10, "bytes_per_s": 2000}
    assert "packets_per_s" not in added["counters"]["drop"], "there was nothing to compare it with"
    assert added["rules"][0]["packets_per_s"] == 0
    assert added["maps"][0]["entries"] == [
        {"prefix": "10.0.0.0/8", "hits": 8, "hits_per_s": 0.5},
        {"prefix": "::/0", "hits": 9},
    ]


def test_a_counter_that_began_anew_has_no_negative_rate() -> None:
    added = add_rates({"counters": {"a": {"packets": 1}}}, {"counters": {"a": {"packets": 5}}}, 1.0)
    assert added["counters"]["a"]["packets_per_s"] == 0
