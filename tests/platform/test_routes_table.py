"""The routes backend's table: many routes at a time, each as the kernel then has it."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from lan_world import TUN, World, prefix
from pyroute2.netlink.exceptions import NetlinkError

from ztun.errors import ZtunError
from ztun.platform.linux import netlink, policy, route_batches
from ztun.platform.linux.policy import RoutesClassifier, table_of
from ztun.platform.linux.route_batches import BLACKHOLE, THROW, UNICAST, Route, Table
from ztun.platform.linux.routes import PROTOCOL
from ztun.ports import Prefix, Verdict

KINDS = {Verdict.DIRECT: "throw", Verdict.TUNNEL: "unicast", Verdict.DROP: "blackhole"}


def many(count: int, shift: int = 0) -> list[Prefix]:
    """Half of them IPv4."""
    v4 = [Prefix((n << 12).to_bytes(4, "big"), 20, Verdict((n + shift) % 3), n % 7) for n in range(count // 2)]
    v6 = [Prefix((0x20010000 + n << 96).to_bytes(16, "big"), 32, one.verdict, 1) for n, one in enumerate(v4)]
    return v4 + v6


def show(world: World) -> set[tuple[str, str, str]]:
    """(type, destination, device) of our table, as ip-route(8) has it: somebody else's eyes."""
    found = set()
    for family in ("-4", "-6"):
        told = world.gateway.run("ip", family, "-d", "route", "show", "table", str(table_of(TUN))).stdout
        for line in told.splitlines():
            words = line.split()
            kind = words.pop(0) if words[0] in ("throw", "blackhole", "unicast") else "unicast"
            device = words[words.index("dev") + 1] if "dev" in words and kind == "unicast" else ""
            found.add((kind, words[0], device))
    return found


def as_shown(prefixes: Iterable[Prefix]) -> set[tuple[str, str, str]]:
    shown = set()
    for one in prefixes:
        family = socket.AF_INET if len(one.network) == 4 else socket.AF_INET6
        text = f"{socket.inet_ntop(family, one.network)}/{one.length}".removesuffix(f"/{len(one.network) * 8}")
        kind = KINDS[one.verdict]
        shown.add((kind, "default" if one.length == 0 else text, TUN if kind == "unicast" else ""))
    return shown


@pytest.mark.parametrize("seed", range(3))
def test_the_table_is_what_was_asked_for_whatever_it_was_before(world: World, seed: int) -> None:
    chance = random.Random(seed)
    with world.running("routes") as (_, classifier):
        for _ in range(4):
            known: dict[tuple[bytes, int], Prefix] = {}
            for _ in range(60):
                size = chance.choice([4, 16])
                length = chance.choice([0, 8, 12, 16, 24, size * 8])
                bits = int.from_bytes(bytes(chance.choice([0x20, 0x21]) for _ in range(size)), "big")
                network = (bits >> (size * 8 - length) << (size * 8 - length)).to_bytes(size, "big")
                known[network, length] = Prefix(network, length, chance.choice(list(Verdict)), 1)
            classifier.replace_rules(known.values())
            assert show(world) == as_shown(known.values())
    assert show(world) == set()


def test_a_hundred_thousand_prefixes_take_little_time_and_short_slices(world: World) -> None:
    with world.running("routes") as (_, classifier):
        assert isinstance(classifier, RoutesClassifier)
        began = time.process_time()
        slices = list(classifier.replacing_rules(many(100_000)))
        assert len(slices) >= 20
        classifier.replace_rules(many(100_000, shift=1))
        counted = [table for table, _ in route_batches.list_all(PROTOCOL)]
        assert counted.count(table_of(TUN)) == 100_000
        # One by one through pyroute2 each of the two took half a minute.
        assert time.process_time() - began < 12
    assert list(route_batches.list_all(PROTOCOL)) == []


def test_a_new_verdict_takes_the_place_of_the_old_one(world: World) -> None:
    """An address never falls through to a shorter prefix on the way: the kernel is never without the longer one."""
    longer = [prefix("203.0.113.0/24", verdict, 1) for verdict in Verdict]
    with world.running("routes", longer[:1]) as (_, classifier):
        watch = world.gateway.spawn("ip", "monitor", "route", stdout=-1, text=True)
        time.sleep(0.2)
        for one in (*longer, *longer):
            classifier.replace_rules([prefix("0.0.0.0/0", Verdict.TUNNEL, 0), one])
        time.sleep(0.2)
        watch.terminate()
        told = [line for line in watch.communicate()[0].splitlines() if "203.0.113.0/24" in line]
        assert told
        assert not any(line.startswith("Deleted") for line in told)


def test_with_fail_closed_a_barrier_stands_behind_each_way_into_the_tun(world: World) -> None:
    table = table_of(TUN)
    tunnelled, direct = prefix("203.0.113.0/24", Verdict.TUNNEL, 1), prefix("203.0.113.0/24", Verdict.DIRECT, 1)
    with world.running("routes", fail="closed") as (_, classifier):
        for asked, kinds in ((tunnelled, {UNICAST, BLACKHOLE}), (direct, {THROW}), (tunnelled, {UNICAST, BLACKHOLE})):
            classifier.replace_rules([asked])
            assert {route.kind for number, route in route_batches.list_all(PROTOCOL) if number == table} == kinds


def test_a_learned_name_has_its_own_route_until_forgotten(world: World) -> None:
    with world.running("routes") as (_, classifier):
        before = show(world)
        classifier.learn(bytes([192, 0, 2, 7]), Verdict.DIRECT, 1)
        assert show(world) - before == {("throw", "192.0.2.7", "")}
        classifier.forget()
        assert show(world) == before


def test_what_the_kernel_refuses_is_told_with_its_reason(world: World) -> None:
    with pytest.raises(NetlinkError) as caught:
        route_batches.replace(Table(table_of(TUN), PROTOCOL, 0x7FFFFFFF), [Route(bytes(4), 0, UNICAST)])
    assert caught.value.code == 19  # ENODEV
    with world.running("routes") as (_, classifier):
        world.gateway.ip(f"link set {TUN} down")
        with pytest.raises(ZtunError, match=f"cannot change routes of {TUN}: ENETDOWN"):
            classifier.replace_rules([prefix("203.0.113.0/24", Verdict.TUNNEL, 1)])


def test_without_ipv6_there_are_no_routes_of_it(world: World) -> None:
    with world.running("routes") as (_, classifier):
        Path("/proc/sys/net/ipv6/conf", TUN, "disable_ipv6").write_text("1")
        both = [prefix("203.0.113.0/24", Verdict.TUNNEL, 1), prefix("2001:db8::/32", Verdict.TUNNEL, 1)]
        classifier.replace_rules(both)
        assert show(world) == {("unicast", "203.0.113.0/24", TUN)}


def test_deleting_what_is_not_there_is_no_error(world: World) -> None:
    route_batches.delete(Table(table_of(TUN), PROTOCOL, 0), [Route(bytes(4), 8, THROW), Route(bytes(16), 8, BLACKHOLE)])


def test_only_what_carries_the_tag_is_found(world: World) -> None:
    world.gateway.ip(f"route add throw 192.0.2.0/24 table {table_of(TUN)}")  # protocol boot: not ours
    world.gateway.ip(f"route add throw 192.0.2.0/24 table 77 proto {PROTOCOL}")  # nor is this table
    assert [table for table, _ in route_batches.list_all(PROTOCOL)] == [77]
    assert netlink.run(policy.find_policy) == {}
