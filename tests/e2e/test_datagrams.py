"""UDP through the tunnel, ICMP, and what cannot be carried."""

from __future__ import annotations

import socket

import pytest

from e2e.traffic import ask_udp
from ztun.lab import Lab, Ztun, plan
from ztun.lab.servers import LARGEST_DATAGRAM, SOCKS_UDP

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])
@pytest.mark.parametrize("size", [0, 1, 1200, 1452, 1473, 8000, LARGEST_DATAGRAM])
def test_datagram_comes_back_whole_through_udp_associate(lab: Lab, ztun: Ztun, address: str, size: int) -> None:
    payload = bytes(number % 251 for number in range(size))

    assert ask_udp(lab.client, address, plan.ECHO_PORT, payload) == payload


def test_datagram_to_a_name_is_sent_by_the_proxy(lab: Lab, any_ztun: Ztun) -> None:
    address = lab.dig("who.udp.bulk.test")

    assert ask_udp(lab.client, address, plan.WHOAMI_PORT, b"?").split()[0].decode() in (plan.UPSTREAM4, plan.UPSTREAM6)


@pytest.mark.parametrize(("type", "site"), [("A", plan.SITE4), ("AAAA", plan.SITE6)])
def test_one_socket_talks_to_many_and_the_answers_come_from_where_they_should(
    lab: Lab, any_ztun: Ztun, type: str, site: str
) -> None:
    # The name first: sing-box resolves no other of an association. And none before IPv6 literals: it stays with the
    # family of the address that it found.
    names = [] if SOCKS_UDP == "sing-box" and type == "AAAA" else [(lab.dig("shared.test", type), 7000)]
    destinations = [*names, (site, plan.ECHO_PORT), (site, plan.WHOAMI_PORT)]
    with lab.client.socket(socket.AF_INET6 if type == "AAAA" else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        for destination in destinations:
            sock.sendto(b"hello", destination)
        senders = {sock.recvfrom(2000)[1][:2] for _ in destinations}

    assert senders == set(destinations)


@pytest.mark.parametrize("type", ["A", "AAAA"])
def test_outbound_that_cannot_carry_datagrams_tells_the_client(lab: Lab, any_ztun: Ztun, type: str) -> None:
    # A connected UDP socket hears of ICMP port unreachable; QUIC clients then go back to TCP at once.
    with pytest.raises(ConnectionRefusedError):
        ask_udp(lab.client, lab.dig("web.test", type), 443, b"quic?")


@pytest.mark.parametrize("address", [plan.SHARED4, plan.SHARED6], ids=["v4", "v6"])
def test_blocked_datagrams_are_answered_with_icmp(lab: Lab, any_ztun: Ztun, address: str) -> None:
    with pytest.raises((ConnectionRefusedError, PermissionError, OSError)) as refused:
        ask_udp(lab.client, address, plan.BANNER_PORT, b"x", tries=1)
    assert not isinstance(refused.value, TimeoutError)


@pytest.mark.parametrize("type", ["A", "AAAA"])
def test_fake_ip_answers_ping(lab: Lab, ztun: Ztun, type: str) -> None:
    answer = lab.client.run("ping", "-c3", "-i0.05", "-W2", "-s1000", lab.dig("site.test", type)).stdout

    assert "3 received" in answer


@pytest.mark.parametrize("address", ["198.19.200.200", "2001:2::7777"])
def test_unmapped_fake_ip_does_not_answer_ping(lab: Lab, any_ztun: Ztun, address: str) -> None:
    assert " 0 received" in lab.client.run("ping", "-c1", "-W1", address, check=False).stdout


def test_dns_like_load_of_datagrams(lab: Lab, any_ztun: Ztun) -> None:
    """200 clients' sockets, one datagram each: one association must not be made to wait for another."""
    socks = [lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(200)]
    try:
        for number, sock in enumerate(socks):
            sock.settimeout(10)
            sock.connect((plan.SHARED4, plan.ECHO_PORT))
            sock.send(b"%d" % number)
        assert [sock.recv(100) for sock in socks] == [b"%d" % number for number in range(200)]
    finally:
        for sock in socks:
            sock.close()
