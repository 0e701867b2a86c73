"""The kinds of interfaces by which a host sends, and finding them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from lan_world import EVERYTHING, FAR4, FAR6, MARK, SERVERS_DIRECT, TUN, World, answer_udp, flow_of, packed, read_packet
from lan_world import make_classifier as make_any_classifier

from ztun.platform.linux.classifier import BpfClassifier
from ztun.platform.linux.netstate import read_state
from ztun.platform.linux.routes import TunRoutes
from ztun.platform.linux.tun import TunDevice, open_tun

OUT4, OUT6 = "10.6.0.1", "fd00:6::1"
NEAR4 = "10.77.0.5"  # direct by a rule, and behind the default route
NEIGHBOUR = "02:00:00:00:00:02"
SO_BINDTODEVICE = 25
FAMILIES = ((socket.AF_INET, OUT4, FAR4), (socket.AF_INET6, OUT6, FAR6))


@contextlib.contextmanager
def capturing(backend: str, *exits: str, lan: tuple[str, ...] = ()) -> Iterator[tuple[TunDevice, BpfClassifier]]:
    device = open_tun(TUN, 1500)
    routes = TunRoutes(TUN, 1500, ["198.18.0.1/15", "2001:2::1/48"], [])
    own = [packed(OUT4), packed(OUT6)]
    classifier = None
    try:
        routes.up()
        classifier = make_any_classifier(
            backend, TUN, lan, mark=MARK, hijack_dns=False, fail="open", own_addresses=own, host=True
        )
        classifier.replace_rules([*EVERYTHING, *SERVERS_DIRECT])
        classifier.attach()
        classifier.replace_exits(dict.fromkeys(exits, (4, 6)))
        yield device, classifier
    finally:
        if classifier is not None:
            classifier.close()
        routes.down()
        device.close()


def make_way_out(world: World, kind: str) -> str:
    """An interface with the default routes of both families, and a neighbour that need not exist. Its name."""
    name = {"plain": "wan0", "bridge": "br0"}[kind]
    before = {
        "plain": [],
        "bridge": ["link add br0 type bridge", "link set wan0 master br0"],
    }[kind]
    world.gateway.ip(
        *before,
        f"address add {OUT4}/24 dev {name}",
        f"address add {OUT6}/64 dev {name} nodad",
        f"link set {name} up",
        f"neighbour replace 10.6.0.2 lladdr {NEIGHBOUR} dev {name}",
        f"neighbour replace fd00:6::2 lladdr {NEIGHBOUR} dev {name}",
        f"route add default via 10.6.0.2 dev {name} src {OUT4}",
        f"route add default via fd00:6::2 dev {name} src {OUT6}",
    )
    return name


def exchange(device: TunDevice, sender: socket.socket, own: str, far: str) -> None:
    """A datagram of this host comes into the TUN with the address of the way out, and its answer goes back."""
    sender.settimeout(5)
    sender.sendto(b"question", (far, 9))
    got = read_packet(device)
    assert got is not None
    source, destination, _, port = flow_of(got[1])
    assert (source, destination, port) == (packed(own), packed(far), 9)
    assert device.send([answer_udp(got[1], b"answer")])
    data, peer = sender.recvfrom(100)
    assert (data, peer[:2]) == (b"answer", (far, 9))


def exchange_all(device: TunDevice, name: str) -> None:
    """In both families, by a socket that is bound to the interface and one that is not."""
    for family, own, far in FAMILIES:
        with socket.socket(family, socket.SOCK_DGRAM) as sender, socket.socket(family, socket.SOCK_DGRAM) as bound:
            exchange(device, sender, own, far)
            bound.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, name.encode())
            exchange(device, bound, own, far)


@pytest.mark.parametrize("kind", ["plain", "bridge"])
def test_every_kind_of_ethernet(world: World, bpf_backend: str, kind: str) -> None:
    name = make_way_out(world, kind)
    with capturing(bpf_backend, name) as (device, classifier):
        assert classifier.exits() == {name: "captured"}
        exchange_all(device, name)
        assert classifier.counters()["pass_back"]["packets"] == 4
        homes = next(table["entries"] for table in classifier.snapshot()["maps"] if table["name"] == "homes")
        assert {(home["address"], home["ifname"]) for home in homes} == {(OUT4, name), (OUT6, name)}


def test_an_address_that_is_no_longer_ours_is_forgotten(world: World) -> None:
    name = make_way_out(world, "plain")
    with capturing("tcx", name) as (device, classifier):
        exchange_all(device, name)
        classifier.replace_own_addresses([packed(OUT6)])
        homes = next(table["entries"] for table in classifier.snapshot()["maps"] if table["name"] == "homes")
        assert [home["address"] for home in homes] == [OUT6]


def test_a_way_out_that_is_captured_from_as_well(world: World, bpf_backend: str) -> None:
    """One cable for all: its clients, the host and the internet."""
    name = make_way_out(world, "plain")
    with capturing(bpf_backend, name, lan=(name,)) as (device, classifier):
        exchange_all(device, name)
        hooked = sorted(each["name"] for each in classifier.snapshot()["programs"] if each["ifname"] == name)
        assert hooked in (["capture", "leave"], ["capture", "leave", "xdp"])


def test_an_interface_without_link_layer_header(world: World, bpf_backend: str) -> None:
    """A TUN plays WireGuard or PPP."""
    out = open_tun("ppp0", 1400)
    world.gateway.ip(
        f"address add {OUT4}/32 dev ppp0",
        f"address add {OUT6}/128 dev ppp0 nodad",
        "link set ppp0 up",
        f"route add default dev ppp0 src {OUT4}",
        f"route add default dev ppp0 src {OUT6}",
    )
    with contextlib.closing(out), capturing(bpf_backend, "ppp0") as (device, classifier):
        assert {each["name"] for each in classifier.snapshot()["programs"]} == {"reply", "guard", "leave_l3", "arrive"}
        exchange_all(device, "ppp0")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"direct", (NEAR4, 9))
            got = read_packet(out)
            assert got is not None
            assert flow_of(got[1])[:2] == (packed(OUT4), packed(NEAR4))


def test_an_interface_that_does_not_exist_is_waited_for(world: World, bpf_backend: str) -> None:
    with capturing(bpf_backend, "wan9") as (_, classifier):
        assert classifier.exits() == {"wan9": "absent"}
        world.gateway.ip("link set wan0 down", "link set wan0 name wan9")
        classifier.attach()
        assert classifier.exits() == {"wan9": "captured"}
        world.gateway.ip("link set wan9 name wan0")
        classifier.attach()
        assert classifier.exits() == {"wan9": "absent"}
        classifier.replace_exits({"wan0": (4,)})
        assert classifier.exits() == {"wan0": "captured"}
        classifier.replace_exits({})
        assert classifier.exits() == {}
        assert {each["ifname"] for each in classifier.snapshot()["programs"]} == {TUN}


def found() -> dict[str, tuple[int, ...]]:
    return dict(read_state(MARK, ()).exits)


def test_ways_out_are_found_by_the_routes_that_count(world: World) -> None:
    assert found() == {}
    make_way_out(world, "plain")
    assert found() == {"wan0": (4, 6)}
    world.gateway.ip("route replace default nexthop via 10.6.0.2 dev wan0 nexthop via 10.9.0.2 dev lan0")
    assert found() == {"wan0": (4, 6), "lan0": (4,)}
    world.gateway.ip("route replace default via 10.6.0.2 dev wan0", "route add default via 10.9.0.2 metric 600")
    assert found() == {"wan0": (4, 6), "lan0": (4,)}  # a socket that is bound leaves there
    world.gateway.ip("route add 0.0.0.0/1 via 10.9.0.2", "route add 128.0.0.0/1 via 10.9.0.2")
    assert found() == {"wan0": (6,), "lan0": (4,)}  # what leaves by wan0 is the VPN
    world.gateway.ip("route add blackhole default metric 1", "route add unreachable 2000::/3")
    assert found() == {"lan0": (4,)}


def test_ip_rules_decide_about_ways_out(world: World) -> None:
    make_way_out(world, "plain")
    world.gateway.ip(
        "route add default via 10.9.0.2 dev lan0 table 51820",
        "rule add not fwmark 0xca6c table 51820 priority 100",
    )
    assert found() == {"wan0": (6,), "lan0": (4,)}
