"""The network monitor, in namespaces whose interfaces come and go.

A change is told within BOUND seconds; it is 50 ms on a quiet machine, 400 ms for what comes right after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from lan_world import MARK, SERVER4, SERVER6, World

from ztun.lab.namespace import wait_until
from ztun.platform.linux import make_monitor, make_socket_factory
from ztun.platform.linux.netmon import LinuxNetworkMonitor
from ztun.ports import NetworkEvent

BOUND = 3.0
ANYWHERE4, ANYWHERE6 = "9.9.9.9", "2620:fe::9"


class Watched:
    """A monitor with somebody who listens: `bursts` is what was told."""

    def __init__(self, *destinations: str) -> None:
        self.monitor: LinuxNetworkMonitor = make_monitor(MARK)
        self.monitor.watch(lambda: destinations)
        self.bursts: list[Sequence[NetworkEvent]] = []

    async def listen(self) -> None:
        async for events in self.monitor.events():
            self.bursts.append(events)

    @property
    def told(self) -> list[NetworkEvent]:
        return [event for burst in self.bursts for event in burst]

    async def until(self, condition: Callable[[], object]) -> None:
        assert await asyncio.to_thread(wait_until, condition, BOUND, 0.01)

    async def until_told(self, kind: str, ifname: str, up: bool) -> None:
        await self.until(lambda: NetworkEvent(kind, ifname, up) in self.told)


@contextlib.asynccontextmanager
async def watched(*destinations: str) -> AsyncIterator[Watched]:
    made = Watched(*destinations)
    await made.monitor.read()
    listening = asyncio.create_task(made.listen())
    try:
        await asyncio.sleep(0)
        yield made
    finally:
        listening.cancel()
        await asyncio.wait({listening})
        made.monitor.close()
        assert listening.cancelled()


def detect_duplicates(ifname: str) -> None:
    Path(f"/proc/sys/net/ipv6/conf/{ifname}/accept_dad").write_text("1")


async def ip(world: World, *commands: str) -> None:
    await asyncio.to_thread(world.gateway.ip, *commands)


async def test_a_link_that_is_set_down_and_up(world: World) -> None:
    async with watched() as seen:
        assert seen.monitor.state.links["lan0"].up
        await ip(world, "link set lan0 down")
        await seen.until_told("link", "lan0", False)
        assert not seen.monitor.state.links["lan0"].enabled
        await ip(world, "link set lan0 up")
        await seen.until_told("link", "lan0", True)
        assert seen.monitor.state.links["lan0"].up


async def test_a_carrier_that_is_lost_and_found(world: World) -> None:
    async with watched() as seen:
        await asyncio.to_thread(world.client.ip, "link set eth0 down")
        await seen.until(lambda: not seen.monitor.state.links["lan0"].up)
        assert seen.monitor.state.links["lan0"].enabled
        await asyncio.to_thread(world.client.ip, "link set eth0 up")
        await seen.until(lambda: seen.monitor.state.links["lan0"].up)


async def test_a_link_that_flickers_is_told_both_ways(world: World) -> None:
    """Both readings look alike, but routes and IPv6 addresses went in between."""
    async with watched() as seen:
        await ip(world, "link set wan0 down", "link set wan0 up")
        await seen.until_told("link", "wan0", True)
        assert NetworkEvent("link", "wan0", False) in seen.told


async def test_a_rename_is_the_end_of_one_name_and_the_beginning_of_another(world: World) -> None:
    async with watched() as seen:
        await ip(world, "link set lan0 name lan9")
        await seen.until_told("link", "lan9", True)
        assert NetworkEvent("link", "lan0", False) in seen.told
        assert "lan0" not in seen.monitor.state.links


async def test_an_interface_that_is_made_anew_under_its_name(world: World) -> None:
    async with watched() as seen:
        before = seen.monitor.state.links["lan0"].ifindex
        await ip(
            world,
            "link del lan0",
            f"link add lan0 type veth peer name eth0 netns {world.client.name}",
            "link set lan0 up",
        )
        await seen.until(lambda: seen.monitor.state.links.get("lan0", (0, before))[1] != before)
        assert NetworkEvent("link", "lan0", False) in seen.told


async def test_addresses(world: World) -> None:
    async with watched() as seen:
        await ip(world, "address add 10.9.0.77/24 dev lan0")
        await seen.until_told("address", "lan0", True)
        assert ("lan0", socket.inet_aton("10.9.0.77"), 24) in seen.monitor.state.addresses
        await ip(world, "address del 10.9.0.77/24 dev lan0")
        await seen.until_told("address", "lan0", False)


async def test_an_ipv6_address_counts_once_it_may_be_used(world: World) -> None:
    """While duplicates are looked for (RFC 4862, section 5.4) nothing can be bound to it."""
    entry = ("lan0", socket.inet_pton(socket.AF_INET6, "fd00:9::77"), 64)
    async with watched() as seen:
        detect_duplicates("lan0")
        await ip(world, "address add fd00:9::77/64 dev lan0")
        state = await seen.monitor.read()
        assert entry not in state.addresses
        await seen.until(lambda: entry in seen.monitor.state.addresses)


async def test_the_way_out_moves_from_one_uplink_to_the_other(world: World) -> None:
    async with watched(ANYWHERE4, ANYWHERE6) as seen:
        assert seen.monitor.state.paths == {ANYWHERE4: None, ANYWHERE6: None}
        await ip(world, f"route add default via {SERVER4}", f"route add default via {SERVER6}")
        await seen.until_told("route", "wan0", True)
        paths = seen.monitor.state.paths
        assert paths[ANYWHERE4] == ("wan0", "10.8.0.1", SERVER4, True)
        assert paths[ANYWHERE6] == ("wan0", "fd00:8::1", SERVER6, True)
        await ip(world, "route replace default via 10.9.0.2")
        await seen.until_told("route", "lan0", True)
        assert seen.monitor.state.paths[ANYWHERE4] == ("lan0", "10.9.0.1", "10.9.0.2", True)


async def test_the_way_that_a_rule_gives_our_mark(world: World) -> None:
    async with watched(ANYWHERE4) as seen:
        await ip(world, f"route add default via {SERVER4}", "route add default via 10.9.0.2 table 77")
        await seen.until_told("route", "wan0", True)
        await ip(world, f"rule add fwmark {MARK} lookup 77")
        await seen.until_told("route", "lan0", True)


async def test_routes_that_go_with_their_link_are_missed(world: World) -> None:
    """The kernel tells of none of the IPv4 routes that it removes then."""
    async with watched(ANYWHERE4) as seen:
        await ip(world, f"route add default via {SERVER4}")
        await seen.until_told("route", "wan0", True)
        await ip(world, "link set wan0 down")
        await seen.until_told("route", "wan0", False)
        assert seen.monitor.state.paths[ANYWHERE4] is None


@pytest.mark.parametrize("kind", ["unreachable", "prohibit", "blackhole"])
async def test_a_route_that_says_no_is_no_way(world: World, kind: str) -> None:
    async with watched(ANYWHERE4) as seen:
        await ip(world, f"route add default via {SERVER4}")
        await seen.until_told("route", "wan0", True)
        await ip(world, f"route replace {kind} default")
        await seen.until(lambda: seen.monitor.state.paths[ANYWHERE4] is None)


async def test_what_comes_together_is_told_together(world: World) -> None:
    async with watched() as seen:
        await ip(world, *(f"address add 10.9.1.{number}/32 dev lan0" for number in range(1, 101)))
        await seen.until(lambda: len(seen.told) == 100)
        assert len(seen.bursts) <= 5


async def test_what_does_not_matter_wakes_nobody(world: World) -> None:
    """Our own routes, of which there is one for each learned name."""
    async with watched(ANYWHERE4) as seen:
        await ip(world, *(f"route add 192.0.2.{number}/32 dev wan0 proto 122" for number in range(100)))
        await asyncio.sleep(0.3)
        assert seen.monitor.counts["route"] == 0
        assert seen.bursts == []


async def test_more_than_the_socket_holds_is_no_harm(world: World) -> None:
    async with watched() as seen:
        await ip(world, *(f"link set lan0 mtu {1400 + number % 100}" for number in range(2000)), "link set lan0 down")
        await seen.until_told("link", "lan0", False)
        assert seen.monitor.counts["overflows"] > 0
        await ip(world, "link set lan0 up")
        await seen.until_told("link", "lan0", True)


async def test_a_flapping_link_costs_little(world: World) -> None:
    """200 flaps: a reading takes some 5 ms, and there are as many as time has room for, not as many as flaps."""
    async with watched(ANYWHERE4) as seen:
        flaps = ["link set wan0 down", "link set wan0 up"] * 200
        descriptors = len(os.listdir("/proc/self/fd"))
        spent, started = time.process_time(), time.monotonic()
        await ip(world, *flaps, f"route replace default via {SERVER4}")
        await seen.until(lambda: seen.monitor.state.paths[ANYWHERE4] is not None)
        lasted = time.monotonic() - started
        await asyncio.sleep(1)
        assert seen.monitor.state.links["wan0"].up
        assert len(seen.bursts) <= 5 + lasted / 0.1
        assert time.process_time() - spent < 1 + lasted / 3
        assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_quiet_network_costs_nothing(world: World) -> None:
    async with watched(ANYWHERE4):
        await asyncio.sleep(0.5)
        spent = time.thread_time()
        await asyncio.sleep(1)
        assert time.thread_time() - spent < 0.02


# Connections that a change leaves behind.


class Upstream:
    """A server in the server's namespace that takes connections on every address and keeps them."""

    def __init__(self, world: World, family: int = socket.AF_INET) -> None:
        self._listener = world.server.socket(family)
        self._listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 99))
        self._listener.listen()
        self._kept: list[socket.socket] = []
        self._family = family

    def connect(self, address: str, source: str | None = None, *, marked: bool = True) -> socket.socket:
        made = make_socket_factory(MARK if marked else 0)(self._family, socket.SOCK_STREAM)
        if source:
            made.bind((source, 0))
        made.settimeout(2)
        made.connect((address, 99))
        self._kept.append(self._listener.accept()[0])
        return made

    def close(self) -> None:
        for sock in (self._listener, *self._kept):
            sock.close()


@pytest.fixture
def upstream(world: World) -> Iterator[Upstream]:
    made = Upstream(world)
    yield made
    made.close()


def is_reset(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


async def test_only_connections_whose_address_vanished_are_reset(world: World, upstream: Upstream) -> None:
    await ip(world, "address add 10.8.0.77/24 dev wan0")
    mine, stays = upstream.connect(SERVER4, "10.8.0.77"), upstream.connect(SERVER4)
    somebodys = upstream.connect(SERVER4, "10.8.0.77", marked=False)
    with mine, stays, somebodys:
        async with watched() as seen:
            before = seen.monitor.state
            await ip(world, "address del 10.8.0.77/24 dev wan0")
            await seen.until_told("address", "wan0", False)
            assert await seen.monitor.reset_stranded(before, []) == 1
        assert [is_reset(sock) for sock in (mine, stays, somebodys)] == [True, False, False]


async def test_ipv6_connections_whose_address_vanished_are_reset(world: World) -> None:
    upstream = Upstream(world, socket.AF_INET6)
    with contextlib.closing(upstream), upstream.connect(SERVER6) as mine:
        async with watched() as seen:
            before = seen.monitor.state
            await ip(world, "address del fd00:8::1/64 dev wan0")
            await seen.until_told("address", "wan0", False)
            assert await seen.monitor.reset_stranded(before, []) == 1
        assert is_reset(mine)


async def test_connections_that_leave_by_another_uplink_now_are_reset(world: World, upstream: Upstream) -> None:
    """One to a host on the old uplink's own network, and one with a rule for its source address, still fit."""
    world.server.ip("address add 192.0.2.1/32 dev lo", "address add 192.0.2.2/32 dev lo")
    await ip(world, f"route add default via {SERVER4}")
    astray, near, ruled = upstream.connect("192.0.2.1"), upstream.connect(SERVER4), upstream.connect("192.0.2.2")
    await ip(world, "rule add to 192.0.2.2 from 10.8.0.1 lookup 77", f"route add default via {SERVER4} table 77")
    with astray, near, ruled:
        async with watched(ANYWHERE4) as seen:
            before = seen.monitor.state
            await ip(world, "route replace default via 10.9.0.2")
            await seen.until_told("route", "lan0", True)
            assert await seen.monitor.reset_stranded(before, {"wan0"}) == 1
        assert [is_reset(sock) for sock in (astray, near, ruled)] == [True, False, False]


async def test_connections_wait_for_a_link_that_is_down_for_a_moment(world: World, upstream: Upstream) -> None:
    with upstream.connect(SERVER4) as mine:
        async with watched(SERVER4) as seen:
            before = seen.monitor.state
            await asyncio.to_thread(world.server.ip, "link set eth0 down")
            await seen.until(lambda: not seen.monitor.state.links["wan0"].up)
            assert await seen.monitor.reset_stranded(before, {"wan0"}) == 0
            await asyncio.to_thread(world.server.ip, "link set eth0 up")
        assert not is_reset(mine)


async def test_connections_that_are_being_made_do_not_wait(world: World) -> None:
    world.server.run("nft", "table ip quiet { chain c { type filter hook input priority 0; tcp dport 98 drop; }; }")
    with make_socket_factory(MARK)(socket.AF_INET, socket.SOCK_STREAM) as dialling:
        dialling.connect_ex((SERVER4, 98))
        async with watched(SERVER4) as seen:
            before = seen.monitor.state
            await asyncio.to_thread(world.server.ip, "link set eth0 down")
            await seen.until(lambda: not seen.monitor.state.links["wan0"].up)
            assert await seen.monitor.reset_stranded(before, {"wan0"}) == 1
        assert dialling.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or is_reset(dialling)
