"""The TUN device, its addresses and routes, and sockets that nothing captures."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
from lan_world import MARK, TUN, World, udp

from ztun.errors import ZtunError
from ztun.platform.linux import interface_addresses, make_routes, make_socket_factory, open_device, sysctl
from ztun.ports import PacketDevice, Routes, SocketFactory
from ztun.wire import vnet


def shown(world: World, *argv: str) -> str:
    return world.gateway.run(*argv).stdout


def test_the_device_is_up_with_addresses_routes_and_a_long_queue(world: World) -> None:
    device: PacketDevice = open_device(TUN, 1400)
    routes: Routes = make_routes(
        TUN,
        mtu=1400,
        address="198.18.0.1/15",
        address6="2001:2::1/48",
        ranges=["198.18.0.0/15", "100.64.0.0/16", "2001:2::/48", "2001:db8:5::/64"],
    )
    routes.up()
    link = shown(world, "ip", "link", "show", TUN)
    assert "mtu 1400" in link
    assert "qlen 4000" in link
    addresses = shown(world, "ip", "-brief", "address", "show", TUN)
    assert addresses.split()[2:] == ["198.18.0.1/15", "2001:2::1/48"]  # no link-local one
    for destination in ("198.19.255.254", "100.64.3.4", "2001:2::99", "2001:db8:5::1"):
        assert f"dev {TUN}" in shown(world, "ip", "route", "get", destination)
    assert [(route["destination"], route["protocol"]) for route in routes.snapshot()["routes"]] == [
        ("100.64.0.0/16", "ztun"),
        ("198.18.0.0/15", "kernel"),
        ("2001:2::/48", "kernel"),
        ("2001:db8:5::/64", "ztun"),
    ]
    routes.down()
    assert shown(world, "ip", "-brief", "address", "show", TUN).split()[1:] == ["DOWN"]
    device.close()
    assert TUN not in shown(world, "ip", "link")


@pytest.mark.parametrize("forwarding", ["0", "1"])
def test_the_device_is_quiet_by_itself(world: World, forwarding: str) -> None:
    everywhere = Path("/proc/sys/net/ipv6/conf/all/forwarding")
    everywhere.write_text(forwarding)
    device = open_device(TUN, 1500)
    make_routes(TUN, mtu=1500, address="198.18.0.1/15", address6="2001:2::1/48").up()
    assert sysctl.read(f"ipv6/conf/{TUN}/forwarding") == forwarding
    # As the routes backend does once the link is up.
    everywhere.write_text("1")
    time.sleep(1.2)  # a report is sent within a second (RFC 3810, section 9.11)
    assert device.recv_into(bytearray(70000)) == 0
    device.close()


def test_reading_and_writing(world: World) -> None:
    device = open_device(TUN, 1500)
    routes = make_routes(TUN, mtu=1500, address="198.18.0.1/15")
    routes.up()
    with world.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("198.18.0.1", 9))
        listener.settimeout(2)
        packet = udp("198.18.0.7", "198.18.0.1", 9, b"in three pieces")
        assert device.send([vnet.EMPTY, memoryview(packet)[:20], bytearray(packet[20:])])
        assert listener.recvfrom(100)[0] == b"in three pieces"
    assert not device.send([vnet.EMPTY, b"\x00not an ip packet"])
    assert device.send_errors == 1
    routes.down()
    device.close()


@pytest.mark.parametrize("strict", ["0", "1"])
def test_a_strict_reverse_path_filter_of_the_host_does_not_eat_our_packets(world: World, strict: str) -> None:
    Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text(strict)
    world.gateway.ip("route add default via 10.8.0.2")
    device = open_device(TUN, 1500)
    make_routes(TUN, mtu=1500, address="198.18.0.1/15").up()
    with world.gateway.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("10.9.0.1", 9))
        listener.settimeout(2)
        assert device.send([vnet.EMPTY, udp("203.0.113.5", "10.9.0.1", 9, b"from afar")])
        assert listener.recvfrom(100)[0] == b"from afar"
    assert sysctl.read("ipv4/conf/all/rp_filter") == strict
    device.close()


def test_a_host_without_ipv6_goes_on_with_ipv4(world: World) -> None:
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
    device = open_device(TUN, 1500)
    routes = make_routes(TUN, mtu=1500, address="198.18.0.1/15", address6="2001:2::1/48", ranges=["2001:2::/48"])
    routes.up()
    # disable_ipv6 of our own interface is ours to set: other interfaces stay without.
    assert sysctl.read("ipv6/conf/lan0/disable_ipv6") == "1"
    assert "198.18.0.1/15" in shown(world, "ip", "-brief", "address", "show", TUN)
    routes.down()
    device.close()


@pytest.mark.parametrize("name", ["", "a-name-of-16-chars", "a/b", "."])
def test_an_impossible_name_is_said_in_one_line(world: World, name: str) -> None:
    with pytest.raises(ZtunError) as caught:
        open_device(name, 1500)
    assert "\n" not in str(caught.value)
    assert "name" in str(caught.value)


def test_addresses_of_all_interfaces(world: World) -> None:
    found = interface_addresses()
    assert ("lan0", socket.inet_aton("10.9.0.1"), 24) in found
    assert ("wan0", socket.inet_pton(socket.AF_INET6, "fd00:8::1"), 64) in found
    assert ("lo", b"\x7f\0\0\1", 8) in found


def test_the_own_end_of_a_point_to_point_link_counts(world: World) -> None:
    world.gateway.ip("address add 10.7.0.1 peer 10.7.0.2 dev wan0")
    assert ("wan0", socket.inet_aton("10.7.0.1"), 32) in interface_addresses()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("type_", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_our_sockets_are_marked_and_do_not_block(family: int, type_: int) -> None:
    factory: SocketFactory = make_socket_factory(MARK)
    with factory(family, type_) as made:
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK
        assert made.gettimeout() == 0
        assert not made.get_inheritable()
