"""Direct traffic is the kernel's alone: the server sees the client itself, and the TUN sees nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

import pytest

from e2e.traffic import ask_udp
from ztun.lab import Lab, Ztun, plan


@pytest.fixture
def tun_stays_silent(lab: Lab, ztun: Ztun) -> Iterator[None]:
    """No packet of or to the direct destinations passes the TUN during the test."""
    needles = [ipaddress.ip_address(address).packed for address in (plan.DIRECT4, plan.DIRECT6)]
    with lab.watching(lab.gateway, "ztun0") as packets:
        yield
    assert [packet.hex() for packet in packets if any(needle in packet[:40] for needle in needles)] == []


@pytest.mark.usefixtures("tun_stays_silent")
class TestDirect:
    def test_page_by_address(self, lab: Lab) -> None:
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
        assert lab.page(f"http://[{plan.DIRECT6}]/")["client"] == plan.CLIENT6

    @pytest.mark.parametrize(("family", "client"), [("-4", plan.CLIENT4), ("-6", plan.CLIENT6)])
    def test_page_by_name(self, lab: Lab, family: str, client: str) -> None:
        assert lab.page("http://direct.test/", family) == {
            "client": client,
            "host": "direct.test",
            "server": plan.DIRECT4 if family == "-4" else plan.DIRECT6,
        }

    def test_datagrams(self, lab: Lab) -> None:
        assert ask_udp(lab.client, plan.DIRECT4, plan.WHOAMI_PORT, b"?").split()[0].decode() == plan.CLIENT4
        assert ask_udp(lab.client, plan.DIRECT6, plan.WHOAMI_PORT, b"?").split()[0].decode() == plan.CLIENT6

    @pytest.mark.parametrize("address", [plan.DIRECT4, plan.DIRECT6])
    def test_ping(self, lab: Lab, address: str) -> None:
        assert "1 received" in lab.client.run("ping", "-c1", "-W2", address).stdout

    def test_refusal(self, lab: Lab) -> None:
        with pytest.raises(ConnectionRefusedError):
            lab.client.connect(plan.DIRECT4, plan.CLOSED_PORT)

    def test_many_megabytes(self, lab: Lab) -> None:
        lab.file(32)
        lab.curl("-o", "/dev/null", f"http://{plan.DIRECT4}/files/32M")


def test_proxied_traffic_does_pass_the_tun(lab: Lab, ztun: Ztun) -> None:
    """The counter-test: the watch above sees what there is to see."""
    needle = ipaddress.ip_address(plan.SITE4).packed
    with lab.watching(lab.gateway, "ztun0") as packets:
        lab.page(f"http://{plan.SITE4}/")

    assert any(needle in packet[:40] for packet in packets)


def test_direct_packets_are_counted_as_such(lab: Lab, ztun: Ztun, backend: str) -> None:
    def counted() -> int:
        return int(ztun.routes()["counters"].get("direct", {"packets": 0})["packets"])

    before = counted()
    lab.client.run("ping", "-c5", "-i0.01", plan.DIRECT4)

    # With routes nobody looks at them: the kernel counts no packets for a route.
    assert counted() >= before + (5 if backend != "routes" else 0)


def test_gateways_own_addresses_and_networks_stay_reachable(lab: Lab, ztun: Ztun) -> None:
    for address in (plan.GATEWAY_LAN4, plan.GATEWAY_LAN6, plan.GATEWAY_WAN4, plan.UPSTREAM4, plan.UPSTREAM6):
        assert "1 received" in lab.client.run("ping", "-c1", "-W2", address).stdout, address
