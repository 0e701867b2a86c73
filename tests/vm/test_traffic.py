"""A client behind a gateway of its own kernel: what the servers see of it, and what it sees of them."""

from __future__ import annotations

import ipaddress

import pytest

from vm.guest import Guest, wait_for
from vm.traffic import ITSELF, PROXY, REFUSED, UNANSWERED, ask_udp, curl, dig, page, ping, uploads_whole
from ztun.lab import plan

pytestmark = pytest.mark.smoke
FAKE4, FAKE6 = ipaddress.ip_network("198.18.0.0/15"), ipaddress.ip_network("2001:2::/48")
MEGABYTE = 1 << 20


class TestDirect:
    @pytest.mark.parametrize(
        ("host", "client_is"), [(plan.DIRECT4, plan.CLIENT4), (f"[{plan.DIRECT6}]", plan.CLIENT6)], ids=["v4", "v6"]
    )
    def test_page_by_address(self, client: Guest, host: str, client_is: str) -> None:
        assert page(client, f"http://{host}/")["client"] == client_is

    @pytest.mark.parametrize("family", ["-4", "-6"])
    def test_page_by_name(self, client: Guest, family: str) -> None:
        assert page(client, "http://direct.test/", family)["client"] in ITSELF

    @pytest.mark.parametrize(
        ("address", "client_is"), [(plan.DIRECT4, plan.CLIENT4), (plan.DIRECT6, plan.CLIENT6)], ids=["v4", "v6"]
    )
    def test_datagram(self, client: Guest, address: str, client_is: str) -> None:
        assert ask_udp(client, address, plan.WHOAMI_PORT).split()[0] == client_is

    @pytest.mark.parametrize("address", [plan.DIRECT4, plan.DIRECT6], ids=["v4", "v6"])
    def test_ping(self, client: Guest, address: str) -> None:
        assert ping(client, address)


class TestProxied:
    @pytest.mark.parametrize(
        ("host", "proxy"), [(plan.SITE4, plan.UPSTREAM4), (f"[{plan.SITE6}]", plan.UPSTREAM6)], ids=["v4", "v6"]
    )
    def test_page_by_address_through_socks5(self, client: Guest, host: str, proxy: str) -> None:
        assert page(client, f"http://{host}/")["client"] == proxy

    @pytest.mark.parametrize("family", ["-4", "-6"])
    def test_page_by_name_through_socks5(self, client: Guest, family: str) -> None:
        shown = page(client, "http://site.test/", family)
        assert shown["client"] in PROXY
        assert shown["host"] == "site.test"

    def test_page_by_name_through_an_http_proxy(self, client: Guest) -> None:
        assert page(client, "http://web.test/")["client"] in PROXY

    def test_tls_through_socks5_with_a_password(self, client: Guest) -> None:
        assert page(client, "https://secure.test/", "--insecure")["client"] in PROXY

    @pytest.mark.parametrize(
        ("address", "proxy"), [(plan.SITE4, plan.UPSTREAM4), (plan.SITE6, plan.UPSTREAM6)], ids=["v4", "v6"]
    )
    def test_datagram_through_socks5(self, client: Guest, address: str, proxy: str) -> None:
        assert ask_udp(client, address, plan.WHOAMI_PORT).split()[0] == proxy

    def test_large_datagram_comes_back_whole(self, client: Guest) -> None:
        assert ask_udp(client, plan.SITE4, plan.ECHO_PORT, "x" * 4000) == "x" * 4000

    @pytest.mark.parametrize("type", ["A", "AAAA"])
    def test_ping_of_a_fake_ip(self, client: Guest, type: str) -> None:
        assert ping(client, dig(client, "site.test", type), "-s4000")

    def test_refused_there_is_refused_here(self, client: Guest) -> None:
        done = client.run(f"curl -sS --max-time 60 http://site.test:{plan.CLOSED_PORT}/", check=False)
        assert done.returncode == REFUSED, done


@pytest.mark.parametrize("host", [plan.DIRECT4, plan.SITE4, f"[{plan.SITE6}]", "web.test"])
def test_download_comes_whole(client: Guest, upstream: Guest, host: str) -> None:
    expected = upstream.read("sha256sum < /run/lab/files/1M")
    assert client.read(f"curl -sS --max-time 100 http://{host}/files/1M | sha256sum", timeout=200) == expected


@pytest.mark.parametrize("host", [plan.DIRECT4, plan.SITE4, plan.SITE6])
def test_upload_comes_whole(client: Guest, host: str) -> None:
    assert uploads_whole(client, host, MEGABYTE)


class TestNames:
    def test_proxied_ones_have_fake_ips_and_these_have_names(self, client: Guest) -> None:
        fake = dig(client, "site.test")
        assert ipaddress.ip_address(fake) in FAKE4
        assert ipaddress.ip_address(dig(client, "site.test", "AAAA")) in FAKE6
        assert dig(client, "-x", fake) == "site.test."

    @pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
    @pytest.mark.parametrize("server", [plan.GATEWAY_LAN4, plan.GATEWAY_LAN6], ids=["v4", "v6"])
    def test_direct_ones_have_their_own(self, client: Guest, server: str, transport: str) -> None:
        assert dig(client, f"@{server}", transport, "direct.test") == plan.DIRECT4

    @pytest.mark.parametrize("server", [plan.RESOLVER_ELSEWHERE4, plan.RESOLVER_ELSEWHERE6], ids=["v4", "v6"])
    def test_questions_to_other_servers_are_answered_too(self, client: Guest, server: str) -> None:
        assert ipaddress.ip_address(dig(client, f"@{server}", "site.test")) in FAKE4

    def test_blocked_ones_do_not_exist(self, client: Guest) -> None:
        assert "NXDOMAIN" in client.read("dig telemetry.test")


@pytest.mark.parametrize("host", [plan.BLOCKED4, f"[{plan.BLOCKED6}]"], ids=["v4", "v6"])
def test_blocked_prefix_is_dropped_and_counted(client: Guest, gateway: Guest, host: str) -> None:
    before = _dropped(gateway)
    done = client.run(f"curl -sS --max-time 3 http://{host}/", check=False)
    assert done.returncode == UNANSWERED, done
    assert wait_for(lambda: _dropped(gateway) > before)


def test_every_flow_has_its_line_in_the_journal(client: Guest, gateway: Guest) -> None:
    curl(client, "http://www.site.test/")
    line = "name=www.site.test destination=www.site.test:80 rule=6 outbound=socks"
    assert wait_for(lambda: line in gateway.read("journalctl --no-pager -u ztun"))


def _dropped(gateway: Guest) -> int:
    """By whichever program: XDP where the interface takes it, tc elsewhere."""
    counters = gateway.json("ztun routes --json", timeout=200)["counters"]
    return int(counters["drop"]["packets"] + counters["xdp_drops"]["packets"])
