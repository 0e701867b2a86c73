"""XDP drops what tc would drop by a rule and is plain, nothing else; and it hangs on interfaces only where it may."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lan_world import (
    CLIENT4,
    CLIENT6,
    ETHERTYPE,
    FAR4,
    FAR6,
    MARK,
    SHOT,
    TUN,
    Bench,
    HandmadePeer,
    World,
    frame,
    load_now,
    make_classifier,
    packed,
    packet,
    prefix,
    read_packet,
    udp,
)
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from ztun.lab.namespace import wait_until
from ztun.platform.linux import bpfcall, layout, sweep, xdp
from ztun.platform.linux.classifier import MAPS, BpfClassifier
from ztun.platform.linux.layout import PORT, U32
from ztun.platform.linux.maps import Map
from ztun.platform.linux.tun import open_tun
from ztun.ports import Verdict

DROP, PASS = 1, 2  # enum xdp_action of linux/bpf.h
PROG_LOAD, PROG_TYPE_XDP = 5, 6
LO = 1  # the interface that BPF_PROG_TEST_RUN takes, whose address is 00:00:00:00:00:00
BLOCKED = [prefix("203.0.113.0/24", Verdict.DROP, 1), prefix("2001:db8::/32", Verdict.DROP, 2)]
OWN = ["203.0.113.77", "2001:db8::77"]


@pytest.fixture(params=[False, True], ids=["open", "closed"])
def xdp_bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Port 53 is hijacked; of what is blocked some is ours, some was learned to be direct, some is so by its prefix."""
    made = Bench(hijack_dns=True, fail_closed=request.param, own=OWN)
    more = [prefix("203.0.113.64/28", Verdict.DIRECT, 3), prefix("203.0.113.96/28", Verdict.TUNNEL, 4)]
    more += [prefix("fe80::/16", Verdict.DROP, 5), prefix("::/1", Verdict.TUNNEL, 6)]
    made.classifier.replace_rules([*BLOCKED, *more])
    made.classifier.learn(packed("203.0.113.9"), Verdict.DIRECT, 7)
    made.classifier.learn(packed("198.51.100.9"), Verdict.DROP, 8)
    know_lo(made)
    yield made
    made.close()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of bpf/ to spoil."""
    return Path(shutil.copytree(layout.find_sources(), tmp_path / "bpf"))


def know_lo(bench: Bench, mac: bytes = bytes(6)) -> None:
    Map(bench.objects.maps["ports"], U32.size, PORT.size).update(U32.pack(LO), PORT.pack(mac))


@pytest.mark.parametrize("data", [udp(CLIENT4, FAR4, 9), udp(CLIENT6, FAR6, 9)], ids=["v4", "v6"])
def test_what_is_blocked_is_dropped_and_counted_as_tc_does(xdp_bench: Bench, data: bytes) -> None:
    assert xdp_bench.run(frame(data), program="xdp") == DROP
    assert xdp_bench.counted() == {"drop": 1, "drop_rule": 1, "xdp_drops": 1}
    rule = 1 if data[0] >> 4 == 4 else 2
    assert xdp_bench.classifier.rule_counters()[rule] == {"packets": 1, "bytes": len(data)}
    assert xdp_bench.run(frame(data)) == SHOT
    assert xdp_bench.counted() == {"drop": 2, "drop_rule": 2, "xdp_drops": 1}
    assert xdp_bench.classifier.rule_counters()[rule] == {"packets": 2, "bytes": 2 * len(data)}


EXCEPTIONS = {
    "an own address": udp(CLIENT4, OWN[0], 9),
    "an own address, IPv6": udp(CLIENT6, OWN[1], 9),
    "link-local": udp(CLIENT6, "fe80::5", 9),
    "port 53": udp(CLIENT4, FAR4, 53),
    "port 53, IPv6": udp(CLIENT6, FAR6, 53),
    "a longer prefix": udp(CLIENT4, "203.0.113.65", 9),
    "a longer prefix into the tunnel": udp(CLIENT4, "203.0.113.97", 9),
    "a learned address": udp(CLIENT4, "203.0.113.9", 9),
    "a learned address that is blocked, but no prefix": udp(CLIENT4, "198.51.100.9", 9),
    "nobody's prefix": udp(CLIENT4, "192.0.2.5", 9),
    "extension headers": packet(CLIENT6, FAR6, 60, b"\x11" + bytes(7) + bytes(8)),
    "IPv4 options beyond the end": b"\x4f" + udp(CLIENT4, FAR4, 9)[1:],
    "a length beyond the end": udp(CLIENT4, FAR4, 9)[:-1],
    "no ports": packet(CLIENT4, FAR4, socket.IPPROTO_TCP, b"\x00\x50"),
    "another version": b"\x65" + udp(CLIENT4, FAR4, 9)[1:],
}


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_what_is_not_plainly_blocked_is_left_to_tc(xdp_bench: Bench, name: str) -> None:
    version = 6 if ":" in name or "IPv6" in name or "link-local" in name or "extension" in name else 4
    assert xdp_bench.run(frame(EXCEPTIONS[name], ETHERTYPE[version]), program="xdp") == PASS
    assert xdp_bench.counted() == {}


def test_a_fragment_of_port_53_is_blocked_as_by_tc(xdp_bench: Bench) -> None:
    whole = udp(CLIENT4, FAR4, 53, bytes(8))
    fragment = whole[:6] + b"\x20\x00" + whole[8:]
    assert xdp_bench.run(frame(fragment), program="xdp") == DROP
    assert xdp_bench.run(frame(fragment)) == SHOT


@pytest.mark.parametrize("tag", [b"\x81\x00\x00\x07", b"\x81\x00\x00\x00", b"\x88\xa8\x00\x07"])
def test_tagged_frames_are_left_to_tc(xdp_bench: Bench, tag: bytes) -> None:
    assert xdp_bench.run(bytes(12) + tag + b"\x08\x00" + udp(CLIENT4, FAR4, 9), program="xdp") == PASS


@pytest.mark.parametrize("to", ["ffffffffffff", "01005e000001", "020000000001"])
def test_frames_to_others_are_left_to_tc(xdp_bench: Bench, to: str) -> None:
    data = frame(udp(CLIENT4, FAR4, 9))
    assert xdp_bench.run(bytes.fromhex(to) + data[6:], program="xdp") == PASS
    know_lo(xdp_bench, bytes.fromhex("020000000001"))
    assert xdp_bench.run(data, program="xdp") == PASS
    assert xdp_bench.counted() == {}


def test_when_the_heart_stops_all_is_left_to_tc(xdp_bench: Bench) -> None:
    data = frame(udp(CLIENT4, FAR4, 9))
    assert xdp_bench.run(data, program="xdp") == DROP
    xdp_bench.is_alive = False
    time.sleep(1.1)
    assert xdp_bench.run(data, program="xdp") == PASS


def random_frame(chance: random.Random) -> bytes:
    """Mostly plain ones to interesting addresses, some of them damaged."""
    is_ipv4 = chance.random() < 0.5
    source = CLIENT4 if is_ipv4 else CLIENT6
    if is_ipv4:
        octet = chance.choice([5, 9, 65, 77, 97, 200])
        destination = f"{chance.choice(['203.0.113', '198.51.100', '192.0.2'])}.{octet}"
    else:
        destination = chance.choice(["2001:db8::5", "2001:db8::77", "fe80::5", "2400::1", "8000::1", "ff02::1"])
    protocol = chance.choice([6, 17, 17, 1, 58, 0, 43, 44, 51, 60, 132])
    port = chance.choice([53, 80, 443])
    payload = struct.pack("!HHHH", 4321, port, 8, 0) + bytes(chance.choice([0, 0, 12, 40]))
    data = bytearray(packet(source, destination, protocol, payload))
    if is_ipv4 and chance.random() < 0.3:
        struct.pack_into("!H", data, 6, chance.choice([0x2000, 0x4000, 0x0001, 0x2001]))
    if is_ipv4 and chance.random() < 0.2:
        options = chance.choice([4, 8, 40])
        data[20:20] = bytes(options)
        data[0] = 0x45 + options // 4
        struct.pack_into("!H", data, 2, len(data))
    if chance.random() < 0.3:
        data[chance.randrange(min(len(data), 48))] = chance.randrange(256)
    if chance.random() < 0.15:
        del data[chance.randrange(20 if is_ipv4 else 40, len(data)) :]
    if chance.random() < 0.2:
        data += bytes(chance.randrange(1, 30))  # padding
    ethertype = ETHERTYPE[4 if is_ipv4 else 6]
    if chance.random() < 0.05:
        ethertype = chance.choice([ETHERTYPE[4], ETHERTYPE[6], b"\x08\x06", b"\x81\x00"])
    if ethertype == ETHERTYPE[6]:
        data += bytes(max(40 - len(data), 0))  # tc is not run on less than the header
    to = bytes(6) if chance.random() < 0.9 else chance.choice([b"\xff" * 6, b"\x02" + bytes(5)])
    return to + bytes(6) + ethertype + bytes(data)


@pytest.mark.parametrize("seed", range(2))
def test_xdp_drops_nothing_that_tc_would_not_drop_by_a_rule(xdp_bench: Bench, seed: int) -> None:
    """And counts alike. The other way round, what tc drops by a rule and is plain is dropped by XDP."""
    chance = random.Random(seed)
    dropped = 0
    for _ in range(1500):
        data = random_frame(chance)
        before = observe(xdp_bench)
        by_xdp = xdp_bench.run(data, program="xdp")
        between = observe(xdp_bench)
        by_tc = xdp_bench.run(data)
        after = observe(xdp_bench)
        if by_xdp == DROP:
            dropped += 1
            assert by_tc == SHOT, data.hex()
            counted = difference(before, between)
            assert counted.pop(("counter", "xdp_drops")) == difference(between, after)["counter", "drop_rule"]
            assert counted == difference(between, after), data.hex()
        else:
            assert by_xdp == PASS
            assert between == before, data.hex()
            assert not (difference(between, after).get(("counter", "drop_rule")) and is_plain(data)), data.hex()
    assert dropped > 60


def observe(bench: Bench) -> dict[tuple[str, object], tuple[int, int]]:
    """Everything that counts: counters, rules, and hits of prefixes."""
    classifier = bench.classifier
    found: dict[tuple[str, object], tuple[int, int]] = {}
    for kind, counters in (("counter", classifier.counters()), ("rule", classifier.rule_counters())):
        for name, value in counters.items():
            found[kind, name] = value["packets"], value["bytes"]
    return found


def difference(
    before: dict[tuple[str, object], tuple[int, int]], after: dict[tuple[str, object], tuple[int, int]]
) -> dict[tuple[str, object], tuple[int, int]]:
    changed = {key: value for key, value in after.items() if value != before[key]}
    return {key: (packets - before[key][0], octets - before[key][1]) for key, (packets, octets) in changed.items()}


def is_plain(data: bytes) -> bool:
    """No extension header, and decided by a prefix (a blocked address that was learned is tc's)."""
    return not (data[12:14] == ETHERTYPE[6] and data[20] in (0, 43, 44, 51, 60, 135)) and (
        data[12:14] == ETHERTYPE[6] or data[30:34] != packed("198.51.100.9")
    )


# On interfaces.


def is_on(classifier: BpfClassifier) -> str | None:
    """The form in which the program is on lan0, None when it is not."""
    hooks = [one["hook"] for one in classifier.snapshot()["programs"] if one["name"] == "xdp"]
    assert len(hooks) <= 1
    return hooks[0] if hooks else None


def why_not(classifier: BpfClassifier) -> str | None:
    places = classifier.snapshot()["xdp"]
    return places[0]["reason"] if places else None


def is_there(world: World) -> bool:
    return "prog/xdp" in world.gateway.run("ip", "-d", "link", "show", "lan0").stdout


@pytest.mark.parametrize("form", [True, "native", "generic"])
def test_blocked_datagrams_end_before_tc(world: World, bpf_backend: str, form: bool | str) -> None:
    world.forward()
    with (
        world.running(bpf_backend, BLOCKED, xdp=form) as (device, classifier),
        world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        # A veth is software: generic costs less there.
        assert is_on(classifier) == ("xdp/generic" if form is True else f"xdp/{form}")
        for _ in range(5):
            sender.sendto(b"x", (FAR4, 9))
        assert wait_until(lambda: classifier.counters()["xdp_drops"]["packets"] == 5)
        sender.sendto(b"question", ("192.0.2.5", 9))
        got = read_packet(device)
        assert got is not None
        assert got[1].endswith(b"question")
    assert not is_there(world)


def test_super_segments_go_whole_beside_it(world: World) -> None:
    with world.running("tcx", BLOCKED) as (device, classifier):
        assert is_on(classifier) == "xdp/generic"
        peer = HandmadePeer(device)
        connection = world.client.socket(socket.AF_INET)
        connection.setblocking(False)
        assert connection.connect_ex(("192.0.2.5", 80))
        peer.accept()
        connection.setblocking(True)
        classifier.heartbeat()
        connection.sendall(b"u" * 30_000)
        assert max(peer.receive(30_000)) > 10_000
        assert peer.gso_sizes == {1460}
        connection.close()


def test_it_is_there_only_while_something_is_blocked(world: World) -> None:
    with world.running("tcx") as (_, classifier):
        assert not is_there(world)
        classifier.replace_rules(BLOCKED)
        assert is_there(world)
        classifier.replace_rules([])
        assert not is_there(world)


def test_it_can_be_switched_off(world: World) -> None:
    with world.running("tcx", BLOCKED, xdp=False) as (_, classifier):
        assert classifier.snapshot()["xdp"] == []
        assert not is_there(world)


def load_pass() -> int:
    """Somebody else's program: r0 = XDP_PASS; exit."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, PASS) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    held, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    attr = bpfcall.attributes("=IIQQ", PROG_TYPE_XDP, 2, ctypes.addressof(held), ctypes.addressof(licence))
    return bpfcall.bpf(PROG_LOAD, attr)


@pytest.mark.parametrize("form", list(xdp.FORMS))
def test_somebody_else_s_program_is_left_alone_until_it_goes(world: World, form: str) -> None:
    program = load_pass()
    theirs = xdp.LinkHook(program, socket.if_nametoindex("lan0"), xdp.FORMS[form])
    with world.running("tcx", BLOCKED) as (_, classifier):
        assert is_on(classifier) is None
        assert why_not(classifier) == "there is another XDP program"
        assert f"id {bpfcall.program_id(program)} " in world.gateway.run("ip", "-d", "link", "show", "lan0").stdout
        with world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", (FAR4, 9))
        assert wait_until(lambda: classifier.counters()["drop_rule"]["packets"] == 1)  # by tc
        theirs.close()
        classifier.attach()
        assert is_on(classifier) == "xdp/generic"
    os.close(program)


def test_with_vlans_on_the_interface_tc_drops_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver takes the tags off, and XDP would take their frames for the interface's own.

    Not every kernel can make a VLAN, so one more link is put into what this one lists.
    """
    vlan = ifinfmsg()
    vlan["index"], vlan["ifi_type"] = 0x7FFF, 1
    vlan["attrs"] = [
        ("IFLA_IFNAME", "lan0.7"),
        ("IFLA_LINK", socket.if_nametoindex("lan0")),
        ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "vlan")]}),
    ]
    vlan.encode()
    told = ifinfmsg(vlan.data)
    told.decode()
    with world.running("tcx", BLOCKED) as (_, classifier):
        assert is_there(world)
        with monkeypatch.context() as patch:
            listed = xdp._links
            patch.setattr(xdp, "_links", lambda ip: {**listed(ip), told["index"]: told})
            classifier.attach()
            assert not is_there(world)
            assert why_not(classifier) == "it carries VLANs"
        classifier.attach()
        assert is_there(world)


def test_part_of_a_bridge_it_is_left_to_tc(world: World) -> None:
    world.gateway.ip("link add br0 type bridge", "link set lan0 master br0")
    with world.running("tcx", BLOCKED) as (_, classifier):
        assert why_not(classifier) == "it is part of another interface"
        assert not is_there(world)


def test_a_new_mac_address_is_followed(world: World) -> None:
    with (
        world.running("tcx", BLOCKED) as (_, classifier),
        world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        world.gateway.ip("link set lan0 address 02:00:00:00:00:07")
        classifier.attach()
        world.client.ip("neigh flush all")
        assert wait_until(lambda: sends_one_that_xdp_drops(sender, classifier))


def sends_one_that_xdp_drops(sender: socket.socket, classifier: BpfClassifier) -> bool:
    sender.sendto(b"x", (FAR4, 9))
    return classifier.counters()["xdp_drops"]["packets"] > 0


def test_an_interface_without_ethernet_frames_is_left_to_tc(world: World) -> None:
    lan = open_tun("lan1", 1500)
    device = open_tun(TUN, 1500)
    classifier = make_classifier(
        "tcx", TUN, ["lan1"], mark=MARK, hijack_dns=False, fail="open", own_addresses=[], xdp=True
    )
    classifier.replace_rules(BLOCKED)
    classifier.attach()
    assert why_not(classifier) == "it has no Ethernet frames"
    classifier.close()
    device.close()
    lan.close()


def test_a_driver_that_takes_neither_form_is_said_once(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An mtu that leaves no room for a page's headroom is refused by veth; the other form is not asked for here."""
    world.gateway.ip("link set lan0 mtu 9000")
    world.client.ip("link set eth0 mtu 9000")
    with world.running("tcx", BLOCKED, xdp="native") as (_, classifier):
        assert is_on(classifier) is None
        assert "native: " in str(why_not(classifier))
        classifier.attach()
        assert capsys.readouterr().out.count("no XDP on an interface") == 1


LEAVE_BEHIND = """
import asyncio, os, signal, sys
from ztun.platform.linux import layout, loader, xdp
from ztun.platform.linux.classifier import MAPS
objects = asyncio.run(loader.load(layout.find_sources(), [], {**MAPS, **xdp.MAPS}, {"xdp": xdp.label("ztun0")}))
kept = getattr(xdp, sys.argv[1])(objects.programs["xdp"], int(sys.argv[2]), xdp.FORMS["generic"])
os.kill(os.getpid(), signal.SIGKILL)
"""


def leave_behind(hook: str) -> None:
    """Have a process attach the program to lan0 and be killed."""
    argv = [sys.executable, "-c", LEAVE_BEHIND, hook, str(socket.if_nametoindex("lan0"))]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL


def test_a_link_goes_with_its_process(world: World) -> None:
    leave_behind("LinkHook")
    assert wait_until(lambda: not is_there(world))


def test_what_an_old_kernel_keeps_of_a_dead_gateway_is_found_and_swept(world: World) -> None:
    leave_behind("NetlinkHook")
    assert is_there(world)
    assert sweep.find_leftovers() == ["XDP program on lan0"]
    assert sweep.sweep() == ["XDP program on lan0"]
    assert not is_there(world)
    assert sweep.find_leftovers() == []


def test_the_next_gateway_takes_the_place_of_what_an_old_kernel_kept(world: World) -> None:
    leave_behind("NetlinkHook")
    with world.running("tcx", BLOCKED) as (_, classifier):
        assert is_on(classifier) == "xdp/generic"
    assert not is_there(world)


def test_without_links_it_is_attached_by_netlink_and_detached(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: int, index: int, flags: int) -> None:
        raise OSError(errno.EINVAL, "a kernel before 5.9")

    monkeypatch.setattr(xdp, "LinkHook", refuse)
    with world.running("tcx", BLOCKED) as (_, classifier):
        assert is_on(classifier) == "xdp/generic"
        assert is_there(world)
        with world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            assert wait_until(lambda: sends_one_that_xdp_drops(sender, classifier))
    assert not is_there(world)


def test_a_kernel_that_refuses_the_program_leaves_the_others_loaded(sources: Path) -> None:
    """The verifier sees a read beyond the frame."""
    text = (sources / "classify.c").read_text()
    checked = "if (data + sizeof(struct ethhdr) > end || !parse_frame"
    assert checked in text
    (sources / "classify.c").write_text(text.replace(checked, "if (!parse_frame"))
    objects = load_now(sources, ["capture"], MAPS, {xdp.PROGRAM: xdp.label(TUN)})
    assert list(objects.programs) == ["capture"]
    assert objects.refused == {"xdp": "Permission denied"}
    objects.close()
