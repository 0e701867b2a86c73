"""What `ztun routes` says against what the kernel's own tools say of the same things."""

from __future__ import annotations

from typing import Any

import pytest

from vm.guest import Guest
from vm.traffic import page, ping
from ztun.lab import plan
from ztun.platform.linux.routes import PROTOCOL

_UNTOLD = {"is_answering"}  # a note of the program to itself, whether there is anything in "answered"
_LONGEST_NAME = 15  # linux/bpf.h, BPF_OBJ_NAME_LEN less the NUL


@pytest.fixture
def routes(gateway: Guest) -> dict[str, Any]:
    answer: dict[str, Any] = gateway.json("ztun routes --json")
    return answer


@pytest.mark.smoke
def test_programs_are_those_of_bpftool_net(gateway: Guest, routes: dict[str, Any]) -> None:
    (net,) = gateway.json("bpftool -j net show")
    attached = {(hook["devname"], hook.get("id", hook.get("prog_id"))) for kind in ("xdp", "tc") for hook in net[kind]}
    ours = {(program["ifname"], program["id"]) for program in routes["programs"]}

    assert ours
    assert attached == ours, net


def test_programs_have_the_names_and_tags_of_bpftool_prog(gateway: Guest, routes: dict[str, Any]) -> None:
    listing = {program["id"]: program for program in gateway.json("bpftool -j prog show")}
    for program in routes["programs"]:
        shown = listing[program["id"]]
        assert shown["type"] == ("xdp" if program["hook"].startswith("xdp") else "sched_cls")
        assert program["tag"] == shown["tag"]
        assert program["hook"].startswith("xdp") or shown["name"] == program["name"][:_LONGEST_NAME]


def test_maps_hold_what_bpftool_map_dumps(gateway: Guest, routes: dict[str, Any]) -> None:
    (capture,) = (each for each in routes["programs"] if each["name"] == "capture" and each["ifname"] == "lan0")
    ids = gateway.json(f"bpftool -j prog show id {capture['id']}")["map_ids"]
    kernels = {shown["name"]: shown for shown in gateway.json("bpftool -j map show") if shown["id"] in ids}
    ours = {made["name"][:_LONGEST_NAME]: made for made in routes["maps"]}
    assert kernels.keys() - _UNTOLD <= ours.keys(), "a map that the program uses is not told of"
    for name in ("prefixes4", "prefixes6", "own"):
        dumped = gateway.json(f"bpftool -j map dump id {kernels[name]['id']}")
        assert len(dumped) == len(ours[name]["entries"]), name
        assert kernels[name]["type"] == ours[name]["type"]


@pytest.mark.smoke
def test_routes_and_rules_are_those_of_ip(gateway: Guest, routes: dict[str, Any]) -> None:
    assert_ip_agrees(gateway, routes)


def test_the_filter_or_link_on_the_lan_interface_is_the_one_of_tc(gateway: Guest, routes: dict[str, Any]) -> None:
    capture = next(each for each in routes["programs"] if each["name"] == "capture" and each["ifname"] == "lan0")
    filters = gateway.read("tc filter show dev lan0 ingress")
    if routes["backend"] == "clsact":
        assert f"id {capture['id']} " in filters
    else:
        assert filters == ""
        links = gateway.json("bpftool -j link show")
        assert capture["id"] in [link["prog_id"] for link in links if link["type"] == "tcx"]


def test_hits_and_counters_move_with_the_traffic(client: Guest, gateway: Guest, routes: dict[str, Any]) -> None:
    for _ in range(3):
        assert ping(client, plan.DIRECT4)
    page(client, f"http://{plan.SITE4}/")
    after = gateway.json("ztun routes --json")

    assert after["counters"]["direct"]["packets"] >= routes["counters"]["direct"]["packets"] + 3
    assert after["counters"]["tunnel"]["packets"] > routes["counters"]["tunnel"]["packets"]
    assert _hits(after, "203.0.113.0/24") > _hits(routes, "203.0.113.0/24")


def assert_ip_agrees(gateway: Guest, routes: dict[str, Any]) -> None:
    """Routes through the TUN and ip rules, as ztun and as iproute2 tell them."""
    listed = [each for family in "46" for each in gateway.json(f"ip -j -{family} route show table all dev ztun0")]
    kernels = {(each["dst"], each.get("protocol")) for each in listed}
    ours = {(each["destination"], each["protocol"].replace("ztun", str(PROTOCOL))) for each in routes["routes"]}
    assert ours
    assert ours <= kernels, listed
    rules = [each for family in "46" for each in gateway.json(f"ip -j -{family} rule")]
    theirs = sorted(each["priority"] for each in rules if str(each.get("protocol")) == str(PROTOCOL))
    assert theirs == sorted(each["priority"] for each in routes["ip_rules"])


def _hits(routes: dict[str, Any], prefix: str) -> int:
    (made,) = (each for each in routes["maps"] if each["name"] == "prefixes4")
    return sum(int(entry["hits"]) for entry in made["entries"] if entry["prefix"] == prefix)
