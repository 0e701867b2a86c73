"""An interface that takes no program of ours: its packets come by routes, those of the others by BPF as ever."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from lan_world import (
    CLIENT4,
    EVERYTHING,
    FAR4,
    MARK,
    SERVER4,
    TUN,
    World,
    answer_udp,
    flow_of,
    make_classifier,
    packed,
    prefix,
    read_packet,
)

from ztun.errors import ZtunError
from ztun.lab.namespace import Namespace
from ztun.platform.linux import bpfcall
from ztun.platform.linux.mixed import MixedClassifier
from ztun.platform.linux.routes import TunRoutes
from ztun.platform.linux.tun import TunDevice, open_tun
from ztun.ports import Verdict

PROG_LOAD, SCHED_CLS = 5, 3


@contextlib.contextmanager
def foreign_programs(ifname: str) -> Iterator[None]:
    """As many of somebody else's programs on an interface as TCX takes: r0 = TCX_NEXT; exit."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    held, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    fds = []
    try:
        with contextlib.suppress(OSError):  # ERANGE, at last
            while True:  # one program is on a hook once
                attr = bpfcall.attributes("=IIQQ", SCHED_CLS, 2, ctypes.addressof(held), ctypes.addressof(licence))
                fds.append(program := bpfcall.bpf(PROG_LOAD, attr))
                fds.append(bpfcall.create_tcx_link(program, socket.if_nametoindex(ifname)))
        assert len(fds) > 100
        yield
    finally:
        for fd in fds:
            os.close(fd)


@contextlib.contextmanager
def capturing(world: World, backend: str, lan: list[str]) -> Iterator[tuple[TunDevice, MixedClassifier]]:
    """Everything into the TUN, but for one blocked prefix."""
    device = open_tun(TUN, 1500)
    routes = TunRoutes(TUN, 1500, ["198.18.0.1/15", "2001:2::1/48"], [])
    routes.up()
    fail = "closed" if backend == "clsact" else "open"  # with which auto takes clsact
    classifier = None
    try:
        own = [packed("10.9.0.1"), packed("10.8.0.1")]
        classifier = make_classifier(
            "auto", TUN, lan, mark=MARK, hijack_dns=False, fail=fail, own_addresses=own, xdp=False
        )
        assert classifier.backend == backend
        classifier.replace_rules([*EVERYTHING, prefix("192.0.2.0/24", Verdict.DROP, 1)])
        yield device, classifier
    finally:
        if classifier is not None:
            classifier.close()
        routes.down()
        device.close()


def converse(device: TunDevice, namespace: Namespace, address: str) -> bool:
    """Whether a datagram of this host reaches the TUN, and its answer the host."""
    with namespace.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.settimeout(2)
        sender.sendto(b"question", (FAR4, 9))
        got = read_packet(device)
        assert got is not None
        source, _, _, _ = flow_of(got[1])
        assert source == packed(address)
        assert device.send([answer_udp(got[1], b"answer")])
        return sender.recvfrom(100)[0] == b"answer"


def program_places(classifier: MixedClassifier) -> set[str]:
    return {one["ifname"] for one in classifier.snapshot()["programs"]}


def test_it_is_captured_by_routes_and_the_other_by_bpf(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with foreign_programs("lan0"), capturing(world, "tcx", ["lan0", "wan0"]) as (device, classifier):
        classifier.attach()
        assert classifier.captured() == {"lan0": "captured", "wan0": "captured"}
        assert program_places(classifier) == {TUN, "wan0"}
        reason = "lan0 by routes, cannot attach to lan0 (tcx): Numerical result out of range"
        assert classifier.fallback_reason == reason
        assert converse(device, world.client, CLIENT4)
        assert converse(device, world.server, SERVER4)
        classifier.attach()
        assert capsys.readouterr().out.count("no BPF on an interface: capturing from it by routes") == 1
    assert "31340" not in world.gateway.run("ip", "rule").stdout


def test_it_drops_what_is_blocked_and_knows_what_is_learned(world: World) -> None:
    with foreign_programs("lan0"), capturing(world, "tcx", ["lan0"]) as (device, classifier):
        classifier.learn(packed("192.0.2.7"), Verdict.TUNNEL, 1)
        classifier.attach()
        classifier.learn(packed("192.0.2.8"), Verdict.TUNNEL, 1)
        with world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for address in ("192.0.2.6", "192.0.2.7", "192.0.2.8"):
                sender.sendto(b"x", (address, 9))
        for address in ("192.0.2.7", "192.0.2.8"):
            got = read_packet(device)
            assert got is not None
            assert flow_of(got[1])[1] == packed(address)
        classifier.forget()
        names = {
            entry["prefix"] for one in classifier.snapshot()["maps"] for entry in one["entries"] if "prefix" in entry
        }
        assert "192.0.2.7/32" not in names


def test_when_it_takes_the_program_again_it_gets_it(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with capturing(world, "tcx", ["lan0"]) as (device, classifier):
        with foreign_programs("lan0"):
            classifier.attach()
            assert program_places(classifier) == {TUN}
        classifier.attach()
        assert program_places(classifier) == {TUN, "lan0"}
        assert classifier.fallback_reason is None
        assert "lan0" not in world.gateway.run("ip", "rule").stdout
        assert converse(device, world.client, CLIENT4)
        assert "BPF on an interface again" in capsys.readouterr().out


def test_one_that_appears_later_and_refuses_is_captured_as_well(world: World) -> None:
    with capturing(world, "tcx", ["lan0", "lan1"]) as (_, classifier):
        classifier.attach()
        assert classifier.captured() == {"lan0": "captured", "lan1": "absent"}
        world.client.ip(f"link add eth1 type veth peer name lan1 netns {world.gateway.name}")
        with foreign_programs("lan1"):
            classifier.attach()
            assert classifier.captured() == {"lan0": "captured", "lan1": "captured"}
            assert program_places(classifier) == {TUN, "lan0"}
            world.client.ip("link del eth1")
        classifier.attach()
        assert classifier.captured() == {"lan0": "captured", "lan1": "absent"}
        assert classifier.fallback_reason is None


def test_a_shared_block_of_filters_takes_none_of_ours(world: World) -> None:
    """The same with clsact filters: tc(8), shared blocks."""
    world.gateway.run("tc", "qdisc", "add", "dev", "lan0", "ingress_block", "22", "clsact")
    before = world.gateway.run("tc", "qdisc", "show", "dev", "lan0").stdout
    with capturing(world, "clsact", ["lan0"]) as (device, classifier):
        classifier.attach()
        assert program_places(classifier) == {TUN}
        assert "lan0 by routes, cannot attach to lan0 (clsact): " in str(classifier.fallback_reason)
        assert converse(device, world.client, CLIENT4)
    assert world.gateway.run("tc", "qdisc", "show", "dev", "lan0").stdout == before


def test_a_qdisc_that_is_only_for_ingress_is_shared(world: World) -> None:
    """`ingress` is clsact's elder brother: filters of several users live there side by side."""
    world.gateway.run("tc", "qdisc", "add", "dev", "lan0", "ingress")
    with capturing(world, "clsact", ["lan0"]) as (device, classifier):
        classifier.attach()
        assert program_places(classifier) == {TUN, "lan0"}
        assert converse(device, world.client, CLIENT4)
    assert "ingress" in world.gateway.run("tc", "qdisc", "show", "dev", "lan0").stdout


def test_asked_for_by_name_it_is_an_error_and_nothing_is_left(world: World) -> None:
    with foreign_programs("lan0"), world.running("tcx", attach=False) as (_, classifier):
        with pytest.raises(ZtunError, match=r"cannot attach to lan0 \(tcx\): Numerical result out of range"):
            classifier.attach()
        assert classifier.snapshot()["programs"] == []
