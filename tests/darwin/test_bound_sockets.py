"""ztun's own sockets on macOS leave by the interface of the route that is not ours, and follow it. On a stand-in for
macOS: where IP_BOUND_IF would bind, SO_BINDTODEVICE does.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Iterator

import pytest
from contracts.systems import DARWIN
from contracts.worlds import Host

from darwin.kqueue_stand_in import EpollQueue
from ztun.lab.namespace import wait_until
from ztun.outbound.tcp import begin, progress
from ztun.platform import darwin
from ztun.platform.darwin.sockets import BoundSockets
from ztun.platform.darwin.strays import reset_stranded


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host(DARWIN)
    try:
        made.create()
        with made.near.entered():
            yield made
    finally:
        made.delete()


def device_of(sock: socket.socket) -> str:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0").decode()


def connect(factory: BoundSockets, address: str) -> socket.socket:
    """A datagram socket that would send there."""
    sock = factory(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect_ex((address, 9))
    return sock


def test_each_destination_has_its_interface(host: Host) -> None:
    factory = host.make_sockets()
    ways = {"9.9.9.9": "a0", "2620:fe::9": "a0", "10.7.2.2": "b0", "127.0.0.1": "", "10.7.1.1": "", "::1": ""}
    for address, name in ways.items():
        with connect(factory, address) as sock:
            assert device_of(sock) == name, address


def test_routes_into_the_utun_are_not_for_us(host: Host) -> None:
    device = darwin.open_device("utun7", 1500)
    routes = host.make_routes(device.name, ["0.0.0.0/1", "128.0.0.0/1", "203.0.113.5/32"])
    try:
        routes.up()
        assert "utun7" in host.near.run("ip", "route", "get", "203.0.113.5").stdout
        with connect(host.make_sockets(), "203.0.113.5") as sock:
            assert device_of(sock) == "a0"
        with host.make_sockets()(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for address, name in (("203.0.113.5", "a0"), ("10.7.2.2", "b0"), ("203.0.113.5", "a0")):
                sock.sendto(b"x", (address, 9))
                assert device_of(sock) == name
    finally:
        routes.down()
        device.close()


def test_another_default_route_is_followed_and_connections_on_the_old_one_are_reset(host: Host) -> None:
    factory = host.make_sockets()
    told: list[int] = []
    with host.far.socket() as listener:
        with host.far.entered():
            listener.bind(("0.0.0.0", 7))
            listener.listen()
        near, wide = (factory(socket.AF_INET, socket.SOCK_STREAM) for _ in range(2))
        waiting, _ = begin(factory, "203.0.113.99", 7)
        with near, wide, waiting:
            for sock, address in ((near, "10.7.1.2"), (wide, "203.0.113.5")):
                sock.connect_ex((address, 7))
                assert wait_until(lambda sock=sock, address=address: progress(sock, address, 7) == 0)
                assert device_of(sock) == "a0"
            host.near.ip("route replace default via 10.7.2.2")
            factory.refresh()
            wide_number, waiting_number = wide.fileno(), waiting.fileno()
            assert reset_stranded(factory, told.append) == 2
            assert sorted(told) == sorted([wide_number, waiting_number])
            with pytest.raises(OSError):
                wide.recv(1)
            with pytest.raises(BlockingIOError):
                near.recv(1)
            assert progress(waiting, "203.0.113.99", 7) not in (0, errno.EALREADY)
            with connect(factory, "9.9.9.9") as sock:
                assert device_of(sock) == "b0"


def test_what_became_of_a_connection_is_told_by_asking_again(host: Host) -> None:
    """macOS forgets the error with the next connect(2), so it is asked for before."""
    factory = host.make_sockets()
    sock, number = begin(factory, "203.0.113.5", 7)  # nobody listens
    with sock:
        told = [number]
        assert wait_until(lambda: told[-1] != errno.EALREADY or told.append(progress(sock, "203.0.113.5", 7)))
        assert told[-1] == errno.ECONNREFUSED


async def test_the_owner_of_a_socket_that_was_reset_hears_of_it(host: Host) -> None:
    """kqueue forgets a descriptor whose file is replaced, so the owner is called."""
    loop = darwin.poller.make_event_loop(EpollQueue)
    try:
        poller = darwin.poller_of(loop)
        near, far = socket.socketpair()
        told: list[int] = []
        with near, far:
            poller.watch(near.fileno(), told.append)
            poller.disturb(near.fileno())  # type: ignore[attr-defined]
            assert told
            assert told[0] & 0x201A  # ztun.ports.ENDED
            poller.disturb(far.fileno())  # type: ignore[attr-defined]
            assert len(told) == 1
    finally:
        await asyncio.to_thread(loop.close)
