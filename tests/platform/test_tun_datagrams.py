"""Super-datagrams on a real TUN: cut by the kernel, or by the device for a kernel that does not."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from lan_world import TUN, World, packed

from ztun.lab.namespace import wait_until
from ztun.platform.linux import make_routes
from ztun.platform.linux.tun import TunDevice, open_tun
from ztun.stack import DatagramHeader
from ztun.wire import udp, vnet

UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
OWN = {4: "198.18.0.1", 6: "2001:2::1"}
FAR = {4: "198.18.0.7", 6: "2001:2::7"}

both = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


@pytest.fixture
def device(world: World) -> Iterator[TunDevice]:
    made = open_tun(TUN, 1500)
    routes = make_routes(TUN, mtu=1500, address=OWN[4] + "/15", address6=OWN[6] + "/48")
    routes.up()
    # The kernel takes up IPv6 on a new link a moment later, and until then drops what comes.
    assert wait_until(lambda: all(reaches(world, made, family) for family in (4, 6)))
    while made.recv_into(bytearray(70000)):
        pass
    yield made
    routes.down()
    made.close()


def listener(world: World, family: int) -> socket.socket:
    sock = world.gateway.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind((OWN[family], 0))
    sock.settimeout(2)
    return sock


def header_to(sock: socket.socket, family: int) -> DatagramHeader:
    ports = struct.pack("!HH", 53, sock.getsockname()[1])
    return DatagramHeader(packed(FAR[family]) + packed(OWN[family]) + ports)


def reaches(world: World, device: TunDevice, family: int) -> bool:
    with listener(world, family) as sock:
        sock.settimeout(0.05)
        device.send((header_to(sock, family).pack(1), b"?"))
        with contextlib.suppress(TimeoutError):
            return sock.recv(10) == b"?"
    return False


def numbered(sizes: list[int]) -> list[bytes]:
    return [(struct.pack("!I", number) * (size // 4 + 1))[:size] for number, size in enumerate(sizes)]


@both
@pytest.mark.parametrize(
    "sizes", [[100, 100], [100] * 64, [1200] * 54, [1452] * 45, [1, 1, 1], [1200] * 9 + [5]], ids=repr
)
def test_the_kernel_takes_a_super_datagram_whole(
    world: World, device: TunDevice, family: int, sizes: list[int]
) -> None:
    payloads = numbered(sizes)
    with listener(world, family) as sock:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        whole = b"".join(payloads)
        assert device.send((header_to(sock, family).pack_run(len(whole), sizes[0]), whole))
        data, ancillary, _, _ = sock.recvmsg(65536, 64)
    assert data == whole
    assert [struct.unpack("=i", value) for *_, value in ancillary] == [(sizes[0],)]
    assert device.cuts_datagrams
    assert device.send_errors == 0


@both
@pytest.mark.parametrize("cuts", [True, False], ids=["kernel", "simulated by flag: a kernel that does not cut"])
def test_a_socket_gets_single_datagrams(world: World, device: TunDevice, family: int, cuts: bool) -> None:
    device.cuts_datagrams = cuts
    payloads = numbered([1200] * 20 + [7])
    with listener(world, family) as sock:
        whole = b"".join(payloads)
        assert device.send((header_to(sock, family).pack_run(len(whole), 1200), memoryview(whole)))
        assert [sock.recv(2000) for _ in payloads] == payloads
    assert device.send_errors == 0


def test_a_refusal_is_remembered_and_costs_no_datagram(world: World, device: TunDevice) -> None:
    """EINVAL, here for a header length beyond the packet, is what a kernel before 6.2 says to the type itself."""
    payloads = numbered([8] * 30)
    with listener(world, 4) as sock:
        whole = b"".join(payloads)
        front = header_to(sock, 4).pack_run(len(whole), 8)
        refused = vnet.pack(vnet.NEEDS_CSUM, vnet.GSO_UDP_L4, 5000, 8, 20, 6) + front[vnet.LENGTH :]
        for _ in range(2):
            assert device.send((refused, whole))
            assert [sock.recv(100) for _ in payloads] == payloads
            assert not device.cuts_datagrams
    assert device.send_errors == 0


def test_what_is_refused_for_another_reason_is_counted(world: World, device: TunDevice) -> None:
    with listener(world, 4) as sock:
        front = header_to(sock, 4).pack_run(200, 100)
    world.gateway.ip(f"link set {TUN} down")
    assert not device.send((front, bytes(200)))
    assert device.cuts_datagrams
    assert device.send_errors == 1


@both
def test_a_super_datagram_is_read_whole(world: World, device: TunDevice, family: int) -> None:
    payloads = numbered([1200] * 50 + [9])
    buffer = memoryview(bytearray(70000))
    with listener(world, family) as sock:
        how = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 1200))]
        sock.sendmsg([b"".join(payloads)], how, 0, (FAR[family], 53))
    length = device.recv_into(buffer)
    overhead = vnet.LENGTH + (28 if family == 4 else 48)
    assert udp.segment_size(buffer) == 1200
    assert bytes(buffer[overhead:length]) == b"".join(payloads)
    assert device.recv_into(buffer) == 0
