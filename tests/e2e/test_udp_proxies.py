"""Datagrams and proxies: those that carry them and die, those that cannot, and those past which they are sent."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.traffic import ask_udp, start
from ztun.lab import Lab, Ztun, plan, servers, sing_box
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import PROXIES

SING_BOX_PORT = 1083
CARRIERS = {servers.SOCKS_UDP: "dante", "sing-box-too": "sing"}  # server -> outbound
CONFIG: dict[str, Any] = {
    "outbounds": [
        *PROXIES,
        {"tag": "dante", "type": "socks5", "server": f"{plan.UPSTREAM4}:{plan.SOCKS_UDP_PORT}"},
        {"tag": "sing", "type": "socks5", "server": f"{plan.UPSTREAM4}:{SING_BOX_PORT}"},
        {"tag": "past", "type": "http", "server": f"{plan.UPSTREAM4}:{plan.HTTP_PROXY_PORT}", "udp": "direct"},
        {"tag": "tcp-only", "type": "socks5", "server": f"{plan.UPSTREAM4}:{plan.SOCKS_UDP_PORT}", "udp": "reject"},
    ],
    "route": {
        "rules": [
            *({"domain_suffix": [f"{tag}.{plan.BULK_DOMAIN}"], "outbound": tag} for tag in ("dante", "sing", "past")),
            {"domain_suffix": [f"tcp-only.{plan.BULK_DOMAIN}"], "outbound": "tcp-only"},
            {"ip_cidr": [plan.SHARED4, plan.SHARED6], "outbound": "past"},
            {"domain": ["secure.test"], "outbound": "http"},
            {"domain_suffix": ["test"], "outbound": "socks"},
        ]
    },
    "timeouts": {"dial": 3, "drain": 0.2},
}


@pytest.fixture(scope="module")
def gateway(lab: Lab) -> Iterator[Ztun]:
    yield start(lab, CONFIG)
    lab.stop()


@pytest.fixture(scope="module")
def sing(lab: Lab) -> None:
    begin_sing_box(lab)


def begin_sing_box(lab: Lab) -> None:
    directory = lab.directory / "sing-box-too"
    directory.mkdir(exist_ok=True)
    lab.spawn(lab.upstream, "sing-box-too", *sing_box.command(directory, plan.UPSTREAM4, SING_BOX_PORT))

    def listens() -> bool:
        with lab.upstream.socket() as probe:
            return probe.connect_ex((plan.UPSTREAM4, SING_BOX_PORT)) == 0

    assert wait_until(listens, 10)


def udp_of(gateway: Ztun, tag: str) -> dict[str, Any]:
    figures: dict[str, Any] = gateway.status()["outbounds"][tag]["udp"]
    return figures


def refused_after(lab: Lab, address: str) -> float:
    """Seconds until a client's first datagram to port 443 is answered with ICMP port unreachable."""
    with lab.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.connect((address, plan.HTTPS_PORT))
        began = time.monotonic()
        sock.send(b"\xc0\x00\x00\x00\x01 a QUIC Initial, as far as anybody here can tell")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
        return time.monotonic() - began


@pytest.mark.parametrize("type", ["A", "AAAA"])
def test_nc_is_refused_by_an_http_proxy_within_a_second_and_curl_then_takes_tcp(
    lab: Lab, gateway: Ztun, type: str
) -> None:
    address = lab.dig("secure.test", type)
    began = time.monotonic()
    lab.client.run("nc", "-u", "-w", "10", address, str(plan.HTTPS_PORT), input="quic?\n", check=False)
    assert time.monotonic() - began < 1  # nc waits ten seconds for an answer that does not come
    assert refused_after(lab, address) < 1
    assert lab.page("https://secure.test")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert udp_of(gateway, "http")["verdict"] == "reject"
    assert udp_of(gateway, "http")["refused"] >= 2
    assert gateway.status()["outbounds"]["http"]["drops"] == {}


def test_a_socks5_proxy_without_udp_is_asked_once_and_its_answer_remembered(lab: Lab, gateway: Ztun) -> None:
    address = lab.dig("site.test")
    assert refused_after(lab, address) < 1
    asked = gateway.status()["outbounds"]["socks"]["dials"]
    assert [refused_after(lab, address) < 1 for _ in range(5)] == [True] * 5
    assert gateway.status()["outbounds"]["socks"]["dials"] == asked
    assert udp_of(gateway, "socks")["refused"] == 5
    assert "does not support the command" in udp_of(gateway, "socks")["reason"]
    assert lab.page("http://site.test")["host"] == "site.test"


def test_it_is_said_once_in_the_log_for_each_outbound(lab: Lab, gateway: Ztun) -> None:
    for name in ("site.test", "site.test", "secure.test", "secure.test"):
        refused_after(lab, lab.dig(name))
    said = [line for line in gateway.output.splitlines() if "datagrams are refused" in line]
    assert sum("outbound=socks " in line for line in said) == 1
    assert sum("outbound=http " in line for line in said) == 1


def test_udp_reject_keeps_datagrams_from_a_proxy_that_could(lab: Lab, gateway: Ztun) -> None:
    assert refused_after(lab, lab.dig(f"a.tcp-only.{plan.BULK_DOMAIN}")) < 1
    assert udp_of(gateway, "tcp-only")["opened"] == 0


def test_udp_direct_goes_past_the_proxy(lab: Lab, gateway: Ztun) -> None:
    for address in (plan.SHARED4, plan.SHARED6):
        own = plan.GATEWAY_WAN6 if ":" in address else plan.GATEWAY_WAN4
        assert ask_udp(lab.client, address, plan.WHOAMI_PORT, b"?").split()[0].decode() == own
    assert udp_of(gateway, "past")["verdict"] == "direct"


def test_udp_direct_resolves_the_name_of_a_fake_ip_and_answers_from_the_fake_ip(lab: Lab, gateway: Ztun) -> None:
    address = lab.dig(f"who.past.{plan.BULK_DOMAIN}")
    assert address.startswith("198.1")
    with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.sendto(b"?", (address, plan.WHOAMI_PORT))
        answer, sender = sock.recvfrom(100)
    assert sender == (address, plan.WHOAMI_PORT)
    assert answer.split()[0].decode() == plan.GATEWAY_WAN4
    assert any(query.name == f"who.past.{plan.BULK_DOMAIN}" for query in lab.dns_queries())


@pytest.mark.parametrize("server", CARRIERS)
def test_datagrams_flow_again_when_the_proxy_was_restarted(lab: Lab, gateway: Ztun, sing: None, server: str) -> None:
    """One client socket sends every 20 ms; the server is killed for half a second meanwhile."""
    tag = CARRIERS[server]
    address = lab.dig(f"echo.{tag}.{plan.BULK_DOMAIN}")
    before = gateway.status()["udp"]
    with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((address, plan.ECHO_PORT))
        assert answered(sock, b"before", 3)
        lab.end_server(server)
        silence = time.monotonic() + 0.5
        while time.monotonic() < silence:
            assert not answered(sock, b"during", 0.02)
        if server == servers.SOCKS_UDP:
            lab.begin_server(server)
        else:
            begin_sing_box(lab)
        assert wait_until(lambda: answered(sock, b"after", 0.02), 6)
        assert all(answered(sock, b"%d" % number, 3) for number in range(50))
    after = gateway.status()["udp"]
    assert after["total"] == before["total"] + 1  # it is one session all the time
    assert after["rebuilt"] >= before["rebuilt"] + 1
    assert udp_of(gateway, tag)["lost"] >= 1
    assert udp_of(gateway, tag)["reason"] is None


def test_forty_sessions_outlive_a_restart_of_their_proxy(lab: Lab, gateway: Ztun) -> None:
    address = lab.dig(f"crowd.dante.{plan.BULK_DOMAIN}")
    before = gateway.status()["udp"]
    socks = [lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(40)]
    try:
        for sock in socks:
            sock.connect((address, plan.ECHO_PORT))
            assert answered(sock, b"before", 3)
        lab.end_server(servers.SOCKS_UDP)
        for _ in range(5):
            assert not any(answered(sock, b"during", 0.002) for sock in socks)
        lab.begin_server(servers.SOCKS_UDP)
        for sock in socks:
            assert wait_until(lambda each=sock: answered(each, b"after", 0.2), 8)  # type: ignore[misc]
        after = gateway.status()["udp"]
        assert after["total"] == before["total"] + 40
        assert after["rebuilt"] >= before["rebuilt"] + 40
        assert gateway.status()["outbounds"]["dante"]["datagram_links"] >= 40
    finally:
        for sock in socks:
            sock.close()


def answered(sock: socket.socket, payload: bytes, timeout: float) -> bool:
    """Whether the echo of `payload` comes back in time, after whatever comes late."""
    sock.settimeout(timeout)
    try:
        sock.send(payload)
        while sock.recv(100) != payload:
            pass
    except (TimeoutError, OSError):
        return False
    return True


@pytest.mark.parametrize("server", CARRIERS)
def test_one_association_for_each_client_socket_and_answers_from_anybody(
    lab: Lab, gateway: Ztun, sing: None, server: str
) -> None:
    tag = CARRIERS[server]
    opened = udp_of(gateway, tag)["opened"]
    address = lab.dig(f"many.{tag}.{plan.BULK_DOMAIN}")
    with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        ports = (plan.ECHO_PORT, plan.WHOAMI_PORT)
        for port in ports:
            sock.sendto(b"hello", (address, port))
        senders = {sock.recvfrom(100)[1] for _ in ports}
    assert senders == {(address, port) for port in ports}
    assert udp_of(gateway, tag)["opened"] == opened + 1


def test_a_session_that_nobody_uses_ends_with_its_association(lab: Lab) -> None:
    gateway = start(lab, {**CONFIG, "timeouts": {"udp_idle": 0.4}})
    address = lab.dig(f"idle.dante.{plan.BULK_DOMAIN}")
    assert ask_udp(lab.client, address, plan.ECHO_PORT, b"x") == b"x"
    assert gateway.status()["udp"]["active"] == 1
    assert gateway.status()["outbounds"]["dante"]["datagram_links"] == 1
    assert wait_until(lambda: gateway.status()["udp"]["active"] == 0, 5)
    assert gateway.status()["outbounds"]["dante"]["datagram_links"] == 0
    assert gateway.status()["udp"]["total"] == 1
