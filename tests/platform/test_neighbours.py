"""Where a client is: as BPF saw it come in, and without BPF by the kernel's routes and neighbour tables."""

from __future__ import annotations

import socket

import pytest
from lan_world import (
    CLIENT4,
    CLIENT6,
    EVERYTHING,
    FAR4,
    FAR6,
    GATEWAY4,
    REDIRECT,
    SERVER4,
    Bench,
    World,
    packed,
    read_packet,
    udp,
)

from ztun.lab.namespace import Namespace, wait_until
from ztun.platform.linux import neighbours
from ztun.ports import Origin

BOTH = [(socket.AF_INET, CLIENT4, GATEWAY4, FAR4), (socket.AF_INET6, CLIENT6, "fd00:9::1", FAR6)]
by_family = pytest.mark.parametrize(("family", "client", "gateway", "far"), BOTH, ids=["v4", "v6"])


def mac_of(namespace: Namespace, ifname: str = "eth0") -> bytes:
    text = namespace.run("cat", f"/sys/class/net/{ifname}/address").stdout
    return bytes.fromhex(text.strip().replace(":", ""))


def speak(namespace: Namespace, family: int, host: str) -> None:
    with namespace.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"?", (host, 9))


@by_family
def test_a_host_of_the_link_is_known_by_its_own_address(
    world: World, family: int, client: str, gateway: str, far: str
) -> None:
    speak(world.client, family, gateway)  # it asks who the gateway is, and the gateway learns who asks
    assert wait_until(lambda: neighbours.find(packed(client)) == Origin("lan0", mac_of(world.client)))


@by_family
def test_a_host_behind_a_router_is_known_by_the_router_s(
    world: World, family: int, client: str, gateway: str, far: str
) -> None:
    speak(world.client, family, gateway)
    network = "172.16.0.0/16" if family == socket.AF_INET else "fd16::/64"
    world.gateway.ip(f"route add {network} via {client}")
    behind = packed("172.16.1.1" if family == socket.AF_INET else "fd16::1")
    assert wait_until(lambda: neighbours.find(behind) == Origin("lan0", mac_of(world.client)))


def test_a_router_of_the_other_family_is_one_too(world: World) -> None:
    speak(world.client, socket.AF_INET6, "fd00:9::1")
    world.gateway.ip(f"route add 172.16.0.0/16 via inet6 {CLIENT6} dev lan0")
    assert wait_until(lambda: neighbours.find(packed("172.16.1.1")) == Origin("lan0", mac_of(world.client)))


def test_what_nobody_asked_for_has_an_interface_only_and_what_has_no_route_nothing(world: World) -> None:
    assert neighbours.find(packed("10.9.0.77")) == Origin("lan0", None)
    assert neighbours.find(packed("192.0.2.1")) is None
    assert neighbours.find(packed("2001:db8::1")) is None
    world.gateway.ip("tuntap add dev bare0 mode tun", "link set bare0 up", "route add 192.0.2.0/24 dev bare0")
    assert neighbours.find(packed("192.0.2.1")) == Origin("bare0", None)


@by_family
def test_each_backend_knows_where_a_client_is(
    world: World, backend: str, family: int, client: str, gateway: str, far: str
) -> None:
    with world.running(backend) as (device, classifier):
        if backend != "routes":
            assert classifier.origin(packed(client)) is None
        speak(world.client, family, far)
        assert read_packet(device) is not None
        assert wait_until(lambda: classifier.origin(packed(client)) == Origin("lan0", mac_of(world.client)))
        assert classifier.origin(packed(SERVER4)) is None  # not behind a captured interface
        assert classifier.origin(packed(GATEWAY4)) is None


def test_a_client_that_moves_is_known_at_its_new_place(world: World, bpf_backend: str) -> None:
    with world.running(bpf_backend) as (device, classifier):
        speak(world.client, socket.AF_INET, FAR4)
        assert read_packet(device) is not None
        world.client.ip("link set eth0 address 52:54:00:12:34:56")
        speak(world.client, socket.AF_INET, FAR4)
        assert read_packet(device) is not None
        assert classifier.origin(packed(CLIENT4)) == Origin("lan0", bytes.fromhex("525400123456"))


def test_without_a_link_layer_there_is_no_mac_address(bench: Bench) -> None:
    bench.classifier.replace_rules(EVERYTHING)
    data = udp(CLIENT4, FAR4, 9)
    sent = bytes(6) + bytes.fromhex("525400123456") + b"\x08\x00" + data
    assert bench.run(sent) == REDIRECT
    assert bench.classifier.origin(packed(CLIENT4)) == Origin("lo", bytes.fromhex("525400123456"))
    assert bench.run(sent, program="capture_l3") == REDIRECT
    assert bench.classifier.origin(packed(CLIENT4)) == Origin("lo", None)
