"""capture.host: programs of the gateway itself, with each way of capturing."""

from __future__ import annotations

import socket

import pytest

from e2e.conftest import BACKENDS
from e2e.host_programs import (
    FAMILIES,
    await_exits,
    counted,
    echoing,
    fetches,
    lookup,
    page,
    start_on_host,
    url_of,
)
from e2e.traffic import ask_udp, download, echo_flow, upload
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot

SERVER_PORT = 7777
by_family = pytest.mark.parametrize(("site", "own"), FAMILIES, ids=["v4", "v6"])


@pytest.fixture(scope="module", params=BACKENDS)
def ztun(lab: Lab, request: pytest.FixtureRequest) -> Ztun:
    return start_on_host(lab, request.param)


@by_family
def test_a_prefix_goes_through_its_proxy(lab: Lab, ztun: Ztun, site: str, own: str) -> None:
    upstream = plan.UPSTREAM6 if ":" in site else plan.UPSTREAM4
    assert page(lab, url_of(site))["client"] == upstream
    if programs := ztun.routes()["programs"]:
        assert ("leave", "wan0") in {(each["name"], each["ifname"]) for each in programs}
        assert counted(ztun, "host_tunnel") > 0
        [rule] = [each for each in ztun.routes()["rules"] if "203.0.113.0/24" in each["conditions"]]
        assert rule["packets"] > 0


@by_family
def test_direct_traffic_does_not(lab: Lab, ztun: Ztun, site: str, own: str) -> None:
    direct = plan.DIRECT6 if ":" in site else plan.DIRECT4
    before = ztun.status()["tcp"]["total"]
    assert page(lab, url_of(direct))["client"] == own
    assert ztun.status()["tcp"]["total"] == before


def test_a_query_to_any_server_is_answered_with_a_fake_ip(lab: Lab, ztun: Ztun) -> None:
    for server in (plan.UPSTREAM4, plan.UPSTREAM6, plan.RESOLVER_ELSEWHERE4, plan.CLIENT4):
        [fake] = lookup(lab, f"@{server}", "www.site.test")
        assert fake.startswith("198.18.")
    [fake6] = lookup(lab, "+tcp", f"@{plan.UPSTREAM4}", "www.site.test", "AAAA")
    assert fake6.startswith("2001:2::")
    assert page(lab, "http://www.site.test/") == {
        "client": plan.UPSTREAM4,
        "host": "www.site.test",
        "server": plan.SITE4,
    }


def test_a_direct_name_has_its_own_address(lab: Lab, ztun: Ztun) -> None:
    assert set(lookup(lab, "direct.test")) == {plan.DIRECT4}
    assert page(lab, "http://direct.test/", "-4")["client"] == plan.GATEWAY_WAN4


def test_the_listener_is_asked_like_any_server(lab: Lab, ztun: Ztun) -> None:
    """It answers itself: the query never leaves the host."""
    [fake] = lookup(lab, f"@{plan.GATEWAY_LAN4}", "www.site.test")
    assert fake.startswith("198.18.")


def test_a_name_answers_pings(lab: Lab, ztun: Ztun) -> None:
    assert " 0% packet loss" in lab.gateway.run("ping", "-4", "-c", "2", "-i", "0.2", "site.test").stdout
    assert " 0% packet loss" in lab.gateway.run("ping", "-6", "-c", "2", "-i", "0.2", "site.test").stdout


def test_pings_of_what_is_direct_go_direct(lab: Lab, ztun: Ztun) -> None:
    for address in (plan.DIRECT4, plan.DIRECT6):
        assert " 0% packet loss" in lab.gateway.run("ping", "-c", "1", "-s", "4000", address).stdout


@by_family
def test_super_segments_both_ways_arrive_whole(lab: Lab, ztun: Ztun, site: str, own: str) -> None:
    with lab.gateway.connect(site, plan.DIGEST_PORT, timeout=30) as up:
        got, expected = upload(up, 8)
        assert got == expected
    size = lab.file(8).stat().st_size
    with lab.gateway.connect(site, plan.HTTP_PORT, timeout=30) as down:
        assert download(down, "/files/8M", "site.test")[0] == size
    with lab.gateway.connect(site, plan.ECHO_PORT, timeout=30) as both:
        assert echo_flow(both, 300_000)


@by_family
@pytest.mark.parametrize("size", [1, 1200, 5000])
def test_datagrams_also_in_fragments(lab: Lab, ztun: Ztun, site: str, own: str, size: int) -> None:
    before = ztun.status()["udp"]["total"]
    question = bytes(n % 251 for n in range(size))
    assert ask_udp(lab.gateway, site, plan.ECHO_PORT, question) == question
    assert ztun.status()["udp"]["total"] > before


@by_family
def test_who_knocks_is_answered_directly(lab: Lab, ztun: Ztun, site: str, own: str) -> None:
    """From an address that is proxied, when the host is the one that begins."""
    family = socket.AF_INET6 if ":" in site else socket.AF_INET
    before = ztun.status()["tcp"]["total"]
    with echoing(lab, family, socket.SOCK_STREAM) as port, lab.upstream.connect(own, port, source=site) as knocking:
        knocking.sendall(b"anybody there?")
        assert knocking.recv(100) == b"anybody there?"
    assert " 0% packet loss" in lab.upstream.run("ping", "-c", "1", "-s", "4000", "-I", site, own).stdout
    assert ztun.status()["tcp"]["total"] == before


@by_family
def test_a_datagram_from_outside_is_answered_directly(lab: Lab, ztun: Ztun, site: str, own: str) -> None:
    family = socket.AF_INET6 if ":" in site else socket.AF_INET
    # Routes know a server that binds no address by its port alone, which is none that clients are given.
    ports = [0, SERVER_PORT] if ztun.routes()["programs"] else [SERVER_PORT]
    for wanted in ports:
        with (
            echoing(lab, family, socket.SOCK_DGRAM, wanted) as port,
            lab.upstream.socket(family, socket.SOCK_DGRAM) as knocking,
        ):
            knocking.bind((site, 0))
            knocking.settimeout(5)
            for question in (b"anybody there?", b"x" * 4000):
                knocking.sendto(question, (own, port))
                answer, peer = knocking.recvfrom(5000)
                assert (answer, peer[:2]) == (question, (own, port))


def test_clients_of_the_lan_are_served_as_ever(lab: Lab, ztun: Ztun) -> None:
    assert lab.page(url_of(plan.SITE4))["client"] == plan.UPSTREAM4
    assert lab.page("http://www.site.test/")["client"] == plan.UPSTREAM4
    assert lab.page(url_of(plan.DIRECT4))["client"] == plan.CLIENT4


def test_what_is_blocked_gets_nowhere(lab: Lab, ztun: Ztun) -> None:
    with lab.watching(lab.gateway, "wan0") as packets:
        assert not fetches(lab, url_of(plan.BLOCKED4), "--max-time", "1")
    assert not [packet for packet in packets if packet[16:20] == socket.inet_aton(plan.BLOCKED4)]


def test_nothing_proxied_leaves_by_itself(lab: Lab, ztun: Ztun) -> None:
    """What goes out is between ztun and its proxies."""
    site = socket.inet_aton(plan.SITE4)
    with lab.watching(lab.gateway, "wan0") as packets:
        page(lab, url_of(plan.SITE4))
        ask_udp(lab.gateway, plan.SITE4, plan.ECHO_PORT, b"x" * 3000)
    outward = [packet for packet in packets if packet[0] >> 4 == 4 and packet[16:20] == site]
    assert outward == []


def test_the_network_is_as_before_at_the_end(lab: Lab, ztun: Ztun) -> None:
    backend, rules = ztun.routes()["backend"], ztun.config["capture"]
    lab.stop()
    before = snapshot(lab.gateway)
    instance = start_on_host(lab, backend, capture=rules)
    await_exits(instance, {"wan0": [4, 6]})
    page(lab, url_of(plan.SITE4))
    assert instance.stop() == 0
    assert wait_until(lambda: differences(before, snapshot(lab.gateway)) == []), differences(
        before, snapshot(lab.gateway)
    )
    assert page(lab, url_of(plan.SITE4))["client"] == plan.GATEWAY_WAN4
