"""Datagrams that travel together: clients and servers that send with UDP_SEGMENT, and bursts of single ones."""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from ztun.lab import Lab, Namespace, Ztun, plan

pytestmark = pytest.mark.usefixtures("backend")

UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
PORT = 7009  # of the servers made here

# A SOCKS5 proxy's destinations, and those that are sent to plainly although only the gateway can tell.
destinations = pytest.mark.parametrize(
    "host", [plan.SITE4, plan.SITE6, plan.SHARED4, plan.SHARED6], ids=["socks-v4", "socks-v6", "direct-v4", "direct-v6"]
)


@contextmanager
def udp_socket(namespace: Namespace, host: str) -> Iterator[socket.socket]:
    with namespace.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sock.settimeout(3)
        yield sock


def send_together(sock: socket.socket, payloads: Sequence[bytes], *address: tuple[str, int]) -> None:
    """With one call; the kernel carries them as one packet as far as it can."""
    how = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", len(payloads[0])))]
    sock.sendmsg([b"".join(payloads)], how, 0, *address)


def numbered(sizes: Sequence[int]) -> list[bytes]:
    return [(struct.pack("!I", number) * (size // 4 + 1))[:size] for number, size in enumerate(sizes)]


def hear(sock: socket.socket, count: int) -> list[bytes]:
    return [sock.recv(65535) for _ in range(count)]


def greet(sock: socket.socket, payload: bytes = b"hello") -> None:
    """Until an answer comes: the association is open then."""
    for _ in range(5):
        sock.send(payload)
        try:
            sock.recv(100)
        except TimeoutError:
            continue
        return
    raise AssertionError("no answer")


@destinations
def test_what_a_client_sends_together_arrives_datagram_by_datagram(lab: Lab, ztun: Ztun, host: str) -> None:
    payloads = numbered([1200] * 50 + [77])
    with udp_socket(lab.client, host) as sock:
        sock.connect((host, plan.ECHO_PORT))
        greet(sock)
        before = ztun.status()
        send_together(sock, payloads)
        assert hear(sock, 51) == payloads
        after = ztun.status()
    assert after["udp"]["sent"] - before["udp"]["sent"] == 51
    assert after["device"]["read"] - before["device"]["read"] < 10, "the device brought them one by one"


@destinations
def test_what_a_server_sends_together_reaches_the_client_in_one_piece(lab: Lab, any_ztun: Ztun, host: str) -> None:
    """One packet all the way through: it is read as one, written as one, and the client's socket takes it as one."""
    payloads = numbered([1000] * 40 + [77])
    with udp_socket(lab.upstream, host) as server, udp_socket(lab.client, host) as sock:
        server.bind((host, PORT))
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
        sock.sendto(b"hello", (host, PORT))
        _, client = server.recvfrom(100)
        server.sendto(b"hello", client)
        assert sock.recv(100) == b"hello"
        send_together(server, payloads, client)
        heard = []
        while sum(map(len, heard)) < 40077:
            heard.append(sock.recv(65535))
    assert b"".join(heard) == b"".join(payloads)
    if host in (plan.SHARED4, plan.SHARED6):  # a proxy takes them apart
        assert len(heard) == 1


@destinations
@pytest.mark.parametrize("seed", range(3))
def test_bursts_of_mixed_sizes_keep_content_and_order(lab: Lab, any_ztun: Ztun, host: str, seed: int) -> None:
    sizes = random.Random(seed).choices([0, 1, 100, 100, 100, 1200, 1200, 1200, 1201, 1452, 3000], k=60)
    payloads = numbered(sizes)
    with udp_socket(lab.client, host) as sock:
        sock.connect((host, plan.ECHO_PORT))
        greet(sock)
        for start in range(0, 60, 20):  # no more at once than what a proxy's socket buffer holds
            for payload in payloads[start : start + 20]:
                sock.send(payload)
            assert hear(sock, 20) == payloads[start : start + 20]


@destinations
def test_two_flows_of_one_socket_and_one_of_another_do_not_mix(lab: Lab, any_ztun: Ztun, host: str) -> None:
    with udp_socket(lab.client, host) as one, udp_socket(lab.client, host) as other:
        other.connect((host, plan.ECHO_PORT))
        greet(other)
        for port in (plan.ECHO_PORT, plan.WHOAMI_PORT):
            for _ in range(5):
                one.sendto(b"hello", (host, port))
                if one.recvfrom(200)[1][1] == port:
                    break
        payloads = numbered([500] * 30)
        for payload in payloads:
            one.sendto(payload, (host, plan.ECHO_PORT))
            one.sendto(b"?", (host, plan.WHOAMI_PORT))
            other.send(payload[::-1])
        heard = [one.recvfrom(2000) for _ in range(60)]
        assert [data for data, sender in heard if sender[1] == plan.ECHO_PORT] == payloads
        assert len({data for data, sender in heard if sender[1] == plan.WHOAMI_PORT}) == 1
        assert hear(other, 30) == [payload[::-1] for payload in payloads]


def test_a_flood_towards_a_client_keeps_its_order(lab: Lab, any_ztun: Ztun) -> None:
    """What is lost on the way (UDP promises nothing) leaves a gap and no swap."""
    host = plan.SHARED4
    with udp_socket(lab.upstream, host) as server, udp_socket(lab.client, host) as sock:
        server.bind((host, PORT))
        sock.sendto(b"hello", (host, PORT))
        _, client = server.recvfrom(100)
        server.sendto(b"hello", client)
        assert sock.recv(100) == b"hello"
        for number in range(3000):
            server.sendto(struct.pack("!I", number) + bytes(1196 if number % 100 else 500), client)
            if not number % 200:
                time.sleep(0.005)
        sock.settimeout(0.5)
        numbers = []
        try:
            while True:
                data = sock.recv(2000)
                (number,) = struct.unpack_from("!I", data)
                assert data[4:] == bytes(1196 if number % 100 else 500)
                numbers.append(number)
        except TimeoutError:
            pass
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == len(numbers) > 1000


def is_refused(sock: socket.socket, payloads: Sequence[bytes]) -> bool:
    """Whether sending brings "connection refused" within seconds; kernels limit how often they say so."""
    for _ in range(30):
        try:
            send_together(sock, payloads)
            time.sleep(0.1)
        except ConnectionRefusedError:
            return True
    return False


@pytest.mark.parametrize("host", [plan.SHARED4, plan.SHARED6], ids=["direct-v4", "direct-v6"])
@pytest.mark.parametrize("count", [1, 10])
def test_where_nobody_listens_the_client_hears_of_it(lab: Lab, any_ztun: Ztun, host: str, count: int) -> None:
    with udp_socket(lab.client, host) as sock:
        sock.connect((host, plan.CLOSED_PORT))
        assert is_refused(sock, numbered([100] * count))
