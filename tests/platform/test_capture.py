"""Real traffic from a client through the programs: into the TUN, past it, and back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from lan_world import (
    CLIENT4,
    CLIENT6,
    FAR4,
    FAR6,
    SERVER4,
    SERVER6,
    HandmadePeer,
    World,
    answer_udp,
    flow_of,
    make_classifier,
    packed,
    prefix,
    read_packet,
    udp,
)

from ztun.lab.namespace import Namespace
from ztun.platform.linux import sysctl
from ztun.platform.linux.tun import open_tun
from ztun.ports import Verdict
from ztun.wire import vnet

FAMILIES = [(socket.AF_INET, FAR4, SERVER4, CLIENT4), (socket.AF_INET6, FAR6, SERVER6, CLIENT6)]
by_family = pytest.mark.parametrize(("family", "far", "server", "client"), FAMILIES, ids=["v4", "v6"])


@contextlib.contextmanager
def datagrams(namespace: Namespace, family: int, *, bind: tuple[str, int] | None = None) -> Iterator[socket.socket]:
    made = namespace.socket(family, socket.SOCK_DGRAM)
    made.settimeout(2)
    if bind:
        made.bind(bind)
    with made:
        yield made


@by_family
def test_a_tunnelled_datagram_arrives_bare_and_its_answer_returns(
    world: World, backend: str, family: int, far: str, server: str, client: str
) -> None:
    with world.running(backend) as (device, classifier), datagrams(world.client, family) as sender:
        assert sysctl.read("ipv4/ip_forward") == "0"
        assert sysctl.read("ipv6/conf/all/forwarding") == "0"
        sender.sendto(b"question", (far, 9))
        got = read_packet(device)
        assert got is not None
        header, data = got
        assert header[1] == vnet.GSO_NONE
        source, destination, _, port = flow_of(data)
        assert (source, destination, port) == (packed(client), packed(far), 9)
        assert data.endswith(b"question")
        assert device.send([answer_udp(data, b"answer")])
        assert sender.recvfrom(100)[0] == b"answer"
        assert classifier.counters()["tunnel"]["packets"] >= 1


@by_family
def test_direct_traffic_never_meets_the_tun(
    world: World, backend: str, family: int, far: str, server: str, client: str
) -> None:
    world.forward()
    with (
        world.running(backend) as (device, _),
        datagrams(world.server, family, bind=(server, 7)) as service,
        datagrams(world.client, family) as sender,
    ):
        sender.sendto(b"hello", (server, 7))
        data, peer = service.recvfrom(100)
        assert (data, peer[0]) == (b"hello", client)  # the client's own address
        service.sendto(b"hello yourself", peer)
        assert sender.recvfrom(100)[0] == b"hello yourself"
        assert read_packet(device, timeout=0.2) is None


@by_family
def test_a_dropped_prefix_reaches_nobody(
    world: World, backend: str, family: int, far: str, server: str, client: str
) -> None:
    world.forward()
    blocked = [prefix("10.8.0.0/16", Verdict.DROP, 1), prefix("fd00:8::/32", Verdict.DROP, 1)]
    with (
        world.running(backend, blocked) as (device, _),
        datagrams(world.server, family, bind=(server, 7)) as service,
        datagrams(world.client, family) as sender,
    ):
        service.settimeout(0.3)
        sender.sendto(b"hello", (server, 7))
        with pytest.raises(TimeoutError):
            service.recvfrom(100)
        assert read_packet(device, timeout=0.1) is None


@by_family
def test_super_segments_go_whole_both_ways(
    world: World, backend: str, family: int, far: str, server: str, client: str
) -> None:
    with world.running(backend) as (device, classifier):
        peer = HandmadePeer(device)
        connection = world.client.socket(family)
        connection.settimeout(5)
        thread = threading.Thread(target=connection.connect, args=((far, 80),))
        thread.start()
        peer.accept()
        thread.join()
        classifier.heartbeat()

        connection.sendall(b"u" * 30_000)
        sizes = peer.receive(30_000)
        assert max(sizes) > 10_000
        assert peer.gso_sizes == {1460 - 20 * (family == socket.AF_INET6)}
        assert peer.needs_checksum

        peer.send(b"d" * 40_000, 1448 - 20 * (family == socket.AF_INET6))
        received = b""
        while len(received) < 40_000:
            received += connection.recv(65536)
        assert received == b"d" * 40_000
        connection.close()


def test_replies_need_no_forwarding_and_care_for_no_forward_policy(world: World, bpf_backend: str) -> None:
    world.gateway.run("nft", "add table inet guard")
    world.gateway.run("nft", "add chain inet guard forward { type filter hook forward priority 0; policy drop; }")
    with world.running(bpf_backend) as (device, classifier), datagrams(world.client, socket.AF_INET) as sender:
        sender.sendto(b"question", (FAR4, 9))
        got = read_packet(device)
        assert got is not None
        device.send([answer_udp(got[1], b"answer")])
        assert sender.recvfrom(100)[0] == b"answer"
        assert classifier.counters()["pass_replies"]["packets"] == 1
        clients = next(one["entries"] for one in classifier.snapshot()["maps"] if one["name"] == "clients")
        [address] = world.client.run("cat", "/sys/class/net/eth0/address").stdout.split()
        assert clients == [{"address": CLIENT4, "ifname": "lan0", "mac": address}]


def test_what_ztun_sends_to_no_client_goes_to_the_host(world: World, bpf_backend: str) -> None:
    with world.running(bpf_backend) as (device, classifier), datagrams(world.gateway, socket.AF_INET) as sender:
        sender.sendto(b"question", ("198.18.0.9", 9))  # a Fake-IP, by the TUN's own route
        got = read_packet(device)
        assert got is not None
        device.send([answer_udp(got[1], b"answer")])
        assert sender.recvfrom(100)[0] == b"answer"
        assert classifier.counters()["pass_to_host"]["packets"] >= 1


def test_dns_is_hijacked_from_clients_alone(world: World, backend: str) -> None:
    world.forward()
    with (
        world.running(backend, hijack_dns=True) as (device, _),
        datagrams(world.server, socket.AF_INET, bind=(SERVER4, 53)) as service,
        datagrams(world.gateway, socket.AF_INET, bind=("10.9.0.1", 53)) as listener,
        datagrams(world.client, socket.AF_INET) as sender,
    ):
        sender.sendto(b"to the resolver", (SERVER4, 53))  # direct, but for its port
        got = read_packet(device)
        assert got is not None
        assert got[1].endswith(b"to the resolver")
        sender.sendto(b"to the gateway", ("10.9.0.1", 53))
        assert listener.recvfrom(100)[0] == b"to the gateway"
        listener.sendto(b"from the gateway", (SERVER4, 53))
        assert service.recvfrom(100)[0] == b"from the gateway"


def raw_frames(world: World) -> socket.socket:
    """A packet socket on the client's interface, that sends whole frames."""
    with world.client.entered():
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        made.bind(("eth0", 0))
    return made


def ethernet(world: World, ethertype: bytes, payload: bytes) -> bytes:
    mac = world.gateway.run("cat", "/sys/class/net/lan0/address").stdout.strip().replace(":", "")
    return bytes.fromhex(mac) + bytes.fromhex("020000000002") + ethertype + payload


def test_a_priority_tag_does_not_end_up_in_the_packet(world: World, bpf_backend: str) -> None:
    question = udp(CLIENT4, FAR4, 9, b"question")
    with world.running(bpf_backend) as (device, classifier), raw_frames(world) as sender:
        for vlan, tag in ((0, b"\xa0\x00"), (7, b"\xa0\x07")):
            sender.send(ethernet(world, b"\x81\x00", tag + b"\x08\x00" + question))
            got = read_packet(device, timeout=0.5)
            assert (got is not None and got[1] == question) == (vlan == 0)
        assert classifier.counters()["tunnel"]["packets"] == 1


def test_cut_headers_are_counted_as_truncated(world: World, bpf_backend: str) -> None:
    cut = [(b"\x08\x00", udp(CLIENT4, FAR4, 9)[:19]), (b"\x08\x00", b"\x45"), (b"\x86\xdd", udp(CLIENT6, FAR6, 9)[:39])]
    with world.running(bpf_backend) as (device, classifier), raw_frames(world) as sender:
        for ethertype, data in cut:
            sender.send(ethernet(world, ethertype, data))
        assert read_packet(device, timeout=0.2) is None
        assert classifier.counters()["drop_truncated"]["packets"] == len(cut)


def test_when_the_heart_stops_traffic_takes_the_kernel_s_way(world: World, bpf_backend: str) -> None:
    world.forward()
    prefixes = [prefix("10.8.0.0/16", Verdict.TUNNEL, 1)]
    with (
        world.running(bpf_backend, prefixes) as (device, classifier),
        datagrams(world.server, socket.AF_INET, bind=(SERVER4, 7)) as service,
        datagrams(world.client, socket.AF_INET) as sender,
    ):
        sender.sendto(b"alive", (SERVER4, 7))
        assert read_packet(device) is not None
        time.sleep(1.1)
        sender.sendto(b"dead", (SERVER4, 7))
        assert service.recvfrom(100)[0] == b"dead"
        classifier.heartbeat()
        sender.sendto(b"alive again", (SERVER4, 7))
        got = read_packet(device)
        assert got is not None
        assert got[1].endswith(b"alive again")


def test_an_interface_without_link_layer_header(world: World, bpf_backend: str) -> None:
    """A second TUN plays the LAN, as WireGuard would be one."""
    lan = open_tun("lan1", 1500)
    world.gateway.ip("address add 10.7.0.1/24 dev lan1", "link set lan1 up")
    with world.running(bpf_backend, attach=False) as (device, classifier):
        classifier.close()
        bare = make_classifier(
            bpf_backend, device.name, ["lan1"], mark=0, hijack_dns=False, fail="open", own_addresses=[]
        )
        bare.replace_rules([prefix("0.0.0.0/0", Verdict.TUNNEL, 0)])
        bare.attach()
        assert {one["name"] for one in bare.snapshot()["programs"]} == {"capture_l3", "reply", "guard"}
        question = udp("10.7.0.2", FAR4, 9, b"question")
        assert lan.send([vnet.EMPTY, question])
        got = read_packet(device)
        assert got is not None
        assert got[1] == question
        assert device.send([answer_udp(question, b"answer")])
        back = read_packet(lan)
        assert back is not None
        assert back[1].endswith(b"answer")
        bare.close()
    lan.close()
