"""Names and prefixes that rules send to a proxy, fetched by clients that know nothing of it."""

from __future__ import annotations

import ipaddress

import pytest

from e2e.traffic import ask_udp, read_all
from ztun.lab import Lab, Ztun, plan

FAKE4 = ipaddress.ip_network("198.18.0.0/15")
FAKE6 = ipaddress.ip_network("2001:2::/48")
PROXY_SEEN = {plan.UPSTREAM4, plan.UPSTREAM6}


def test_name_resolves_to_a_fake_ip_of_either_family(lab: Lab, ztun: Ztun) -> None:
    assert ipaddress.ip_address(lab.dig("site.test", "A")) in FAKE4
    assert ipaddress.ip_address(lab.dig("site.test", "AAAA")) in FAKE6


def test_page_by_name_comes_through_the_socks5_proxy_which_resolves_it(lab: Lab, ztun: Ztun) -> None:
    before = len(lab.dns_queries())

    page = lab.page("http://www.site.test/")

    assert page["client"] in PROXY_SEEN
    assert page["host"] == "www.site.test"
    asked = [query for query in lab.dns_queries()[before:] if query.name == "www.site.test"]
    assert asked, "the proxy was not handed the name"
    assert plan.GATEWAY_WAN4 not in {query.source for query in asked}, "ztun resolved the name itself"


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_page_by_name_over_either_family(lab: Lab, ztun: Ztun, family: str) -> None:
    # What the client uses is the Fake-IP's family; what the proxy uses then is its own affair.
    assert lab.page("http://site.test/", family)["client"] in PROXY_SEEN
    assert lab.page("http://v6only.test/", family) == {
        "client": plan.UPSTREAM6,
        "host": "v6only.test",
        "server": plan.SITE6,
    }


@pytest.mark.parametrize(
    ("address", "proxy"), [(plan.SITE4, plan.UPSTREAM4), (plan.SITE6, plan.UPSTREAM6)], ids=["v4", "v6"]
)
def test_page_by_address_of_a_proxied_prefix(lab: Lab, ztun: Ztun, address: str, proxy: str) -> None:
    host = f"[{address}]" if ":" in address else address

    assert lab.page(f"http://{host}/") == {"client": proxy, "host": host, "server": address}


def test_tls_reaches_the_server_untouched(lab: Lab, ztun: Ztun) -> None:
    assert lab.page("https://secure.test/")["client"] in PROXY_SEEN


@pytest.mark.parametrize(
    ("name", "outbound"),
    [
        ("web.test", "http-auth"),
        ("a.plainweb.bulk.test", "http"),
        ("a.auth.bulk.test", "socks-auth"),
        ("a.udp.bulk.test", "socks-udp"),
        ("a.bulk.test", "socks"),
    ],
)
def test_every_kind_of_proxy_carries_the_page_its_rule_sends_there(
    lab: Lab, any_ztun: Ztun, name: str, outbound: str
) -> None:
    page = lab.page(f"http://{name}/")

    assert page["client"] in PROXY_SEEN
    assert page["host"] == name
    assert outbound in any_ztun.status()["outbounds"]


@pytest.mark.parametrize("name", ["a.badauth.bulk.test", "a.gone.bulk.test"])
def test_proxy_that_does_not_serve_fails_the_client_at_once(lab: Lab, any_ztun: Ztun, name: str) -> None:
    done = lab.curl("-w", "%{time_total}", f"http://{name}/", check=False)

    assert done.returncode == 7, done  # CURLE_COULDNT_CONNECT: the client was never told that it is connected
    assert float(done.stdout) < 2


def test_first_matching_rule_of_the_file_wins(lab: Lab, any_ztun: Ztun) -> None:
    # telemetry.test matches the block rule by keyword and, further down, the suffix "test".
    assert lab.curl("http://telemetry.test/", check=False).returncode == 6  # CURLE_COULDNT_RESOLVE_HOST
    assert (
        lab.page("http://sub.direct.test/", "--resolve", f"sub.direct.test:80:{plan.DIRECT4}")["client"] == plan.CLIENT4
    )


class TestRulesThatAnAddressAloneDoesNotDecide:
    """The flows reach the stack, and what no rule took leaves it by the direct outbound."""

    def test_source_cidr_sends_one_host_to_the_proxy(self, lab: Lab, ztun: Ztun) -> None:
        # Port 443, since port 80 has a rule of its own.
        url = f"https://{plan.SHARED4}/"
        assert lab.page(url, "-k", "--interface", plan.CLIENT4_OTHER)["client"] == plan.UPSTREAM4
        assert lab.page(url, "-k", "--interface", plan.CLIENT4)["client"] == plan.GATEWAY_WAN4

    def test_port_sends_one_service_to_the_proxy(self, lab: Lab, ztun: Ztun) -> None:
        assert lab.page(f"http://{plan.SHARED4}/")["client"] == plan.UPSTREAM4
        assert lab.page(f"https://{plan.SHARED4}/", "-k")["client"] == plan.GATEWAY_WAN4

    def test_the_same_over_ipv6(self, lab: Lab, ztun: Ztun) -> None:
        assert lab.page(f"http://[{plan.SHARED6}]/")["client"] == plan.UPSTREAM6
        assert lab.page(f"https://[{plan.SHARED6}]/", "-k")["client"] == plan.GATEWAY_WAN6

    def test_protocol_keeps_a_tcp_rule_from_datagrams(self, lab: Lab, ztun: Ztun) -> None:
        seen = ask_udp(lab.client, plan.SHARED4, plan.WHOAMI_PORT, b"who am I?")

        assert seen.split()[0].decode() == plan.GATEWAY_WAN4

    def test_blocked_port_is_reset(self, lab: Lab, ztun: Ztun) -> None:
        with pytest.raises(ConnectionRefusedError):
            lab.client.connect(plan.SHARED4, plan.BANNER_PORT)
        with lab.client.connect(plan.SHARED4, plan.FIN_FIRST_PORT) as sock:
            assert read_all(sock) == b"that is all\n"
