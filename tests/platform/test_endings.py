"""However ztun ends, the host is as it was."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from lan_world import CLIENT4, EVERYTHING, FAR4, SERVER4, TUN, World, make_classifier, packed, prefix, read_packet

from ztun.errors import ZtunError
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.platform.linux import make_routes, open_device
from ztun.platform.linux.aftermath import find_leftovers, sweep
from ztun.platform.linux.tun import TunDevice
from ztun.ports import Prefix, Verdict

# What a gateway does before it is killed. It says "ready" and then only keeps the heart beating.
VICTIM = """
import asyncio, sys, time
from ztun.platform.linux import make_classifier, make_routes, open_device
from ztun.platform.linux.aftermath import open_journal
from ztun.ports import Prefix, Verdict
open_journal("ztun0")
device = open_device("ztun0", 1500)
make_routes("ztun0", mtu=1500, address="198.18.0.1/15", address6="2001:2::1/48").up()
capture = {"mark": 1, "hijack_dns": True, "fail": sys.argv[2], "own_addresses": [b"\\x0a\\x09\\0\\1"]}
classifier = asyncio.run(make_classifier(sys.argv[1], "ztun0", ["lan0"], **capture))
everything = [Prefix(bytes(size), 0, Verdict.TUNNEL, -1) for size in (4, 16)]
classifier.replace_rules([*everything, Prefix(b"\\x0a\\x08\\0\\x03", 32, Verdict.DIRECT, 0)])
classifier.attach()
print("ready", flush=True)
while True:
    classifier.heartbeat()
    time.sleep(0.2)
"""


@contextmanager
def victim(world: World, backend: str, fail: str = "open") -> Iterator[subprocess.Popen[str]]:
    process = world.gateway.spawn(sys.executable, "-c", VICTIM, backend, fail, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        # The routes backend warns in the same stream.
        assert any(line.strip() == "ready" for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def reaches_server(world: World, address: str = SERVER4) -> bool:
    with (
        world.server.socket(socket.AF_INET, socket.SOCK_DGRAM) as service,
        world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        service.bind((address, 7))
        service.settimeout(0.1)
        sender.sendto(b"hello", (address, 7))
        try:
            return service.recvfrom(10)[1][0] == CLIENT4
        except TimeoutError:
            return False


@pytest.mark.parametrize("fail", ["open", "closed"])
def test_nothing_is_left_after_close(world: World, backend: str, fail: str) -> None:
    before = snapshot(world.gateway)
    prefixes = [prefix("203.0.113.0/24", Verdict.DROP, 1), prefix("2001:db8::/32", Verdict.DROP, 1)]
    with world.running(backend, prefixes, hijack_dns=True, fail=fail) as (_, classifier):
        classifier.learn(packed(FAR4), Verdict.DIRECT, 1)
        classifier.learn(packed("2001:db8::5"), Verdict.TUNNEL, 1)
        classifier.attach()  # again, which changes nothing
        assert differences(before, snapshot(world.gateway)) != []
        classifier.close()
    assert differences(before, snapshot(world.gateway)) == []


def test_a_killed_gateway_leaves_no_tcx_link(world: World) -> None:
    world.forward()
    before = snapshot(world.gateway)
    with victim(world, "tcx") as process:
        assert not reaches_server(world)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: reaches_server(world), timeout=1)
    assert differences(before, snapshot(world.gateway)) == []


@pytest.mark.parametrize("backend", ["clsact", "routes"])
def test_a_killed_gateway_lets_traffic_pass_and_the_next_one_sweeps(world: World, backend: str) -> None:
    world.forward()
    before = snapshot(world.gateway)
    with victim(world, backend) as process:
        assert not reaches_server(world)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wait_until(lambda: reaches_server(world), timeout=1.3)
    assert differences(before, snapshot(world.gateway)) != []
    assert find_leftovers() != []
    assert sweep() != []
    assert find_leftovers() == sweep() == []
    assert differences(before, snapshot(world.gateway)) == []
    with world.running(backend) as (device, _), world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", (FAR4, 9))
        assert read_packet(device) is not None


@pytest.mark.parametrize("backend", ["auto", "clsact", "routes"])
def test_with_fail_closed_a_killed_gateway_lets_only_direct_traffic_pass(world: World, backend: str) -> None:
    world.forward()
    world.server.ip("address add 10.8.0.3/24 dev eth0")
    with victim(world, backend, "closed") as process:
        assert reaches_server(world, "10.8.0.3")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert reaches_server(world, "10.8.0.3")
        assert not wait_until(lambda: reaches_server(world), timeout=1.5)
        assert sweep() != []
        assert reaches_server(world)


def test_interfaces_that_went_away_do_not_hinder_the_end(world: World, backend: str) -> None:
    with world.running(backend, hijack_dns=True) as (device, classifier):
        world.gateway.ip("link del lan0")
        classifier.snapshot()
        device.close()
        classifier.close()
    assert "proto 122" not in world.gateway.run("ip", "rule").stdout
    assert TUN not in world.gateway.run("ip", "link").stdout


def test_only_our_own_filters_are_swept(world: World) -> None:
    world.gateway.run("tc", "qdisc", "add", "dev", "lan0", "clsact")
    world.gateway.run("tc", "filter", "add", "dev", "lan0", "ingress", "prio", "5", "u32", "match", "u32", "0", "0")
    before = snapshot(world.gateway)
    with victim(world, "clsact") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    swept = sweep("ztun1")  # by one of another name, as in a configuration that was changed since
    assert [line for line in swept if "state file" not in line] == ["tc filter ztun:ztun0:capture on lan0"]
    assert differences(before, snapshot(world.gateway)) == []


def test_a_qdisc_that_somebody_began_to_use_stays(world: World) -> None:
    with world.running("clsact"):
        world.gateway.run("tc", "filter", "add", "dev", "lan0", "egress", "prio", "5", "u32", "match", "u32", "0", "0")
    assert "clsact" in world.gateway.run("tc", "qdisc", "show", "dev", "lan0").stdout
    assert "bpf" not in world.gateway.run("tc", "filter", "show", "dev", "lan0", "ingress").stdout


def test_a_second_gateway_with_the_same_name_is_refused_and_changes_nothing(world: World) -> None:
    with world.running("tcx"):
        before = snapshot(world.gateway)
        with pytest.raises(ZtunError, match="interface ztun0 exists already"):
            open_device(TUN, 1500)
        assert differences(before, snapshot(world.gateway)) == []


def test_two_gateways_with_names_of_their_own_live_side_by_side(world: World, backend: str) -> None:
    with world.running(backend) as (device, classifier):
        other = open_device("ztun1", 1500)
        make_routes("ztun1", mtu=1500, address="198.51.100.1/24").up()
        second = make_classifier(backend, "ztun1", ["wan0"], mark=2, hijack_dns=False, fail="open", own_addresses=[])
        second.replace_rules(EVERYTHING)
        second.attach()
        before = snapshot(world.gateway)
        assert find_leftovers() == sweep("ztun2") == sweep() == []
        assert differences(before, snapshot(world.gateway)) == []
        second.close()
        other.close()
        classifier.heartbeat()
        with world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"hello", (FAR4, 9))
            assert read_packet(device) is not None


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_descriptor_is_left_open(world: World, backend: str) -> None:
    with world.running(backend):
        pass  # the first time imports and caches
    before = open_descriptors()
    with world.running(backend) as (_, classifier):
        classifier.snapshot()
    assert open_descriptors() == before


def test_after_close_the_objects_are_closed_twice_without_harm(world: World, backend: str) -> None:
    device: TunDevice = open_device(TUN, 1500)
    routes = make_routes(TUN, mtu=1500, address="198.18.0.1/15")
    routes.up()
    routes.up()
    classifier = make_classifier(backend, TUN, ["lan0"], mark=1, hijack_dns=True, fail="open", own_addresses=[])
    classifier.replace_rules([Prefix(bytes(4), 0, Verdict.TUNNEL, -1)])
    classifier.close()
    classifier.close()
    routes.down()
    routes.down()
    device.close()
    device.close()
    assert TUN not in dict(map(reversed, socket.if_nameindex()))  # type: ignore[arg-type]
