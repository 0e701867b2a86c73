"""What is counted for each family, and countries on the way of real packets."""

from __future__ import annotations

import ipaddress
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import BASE
from e2e.traffic import ask_udp, start
from ztun.lab import Lab, Ztun, plan

# The writer of MaxMind DB files lies beside the tests of the configuration.
write_database: Callable[[Path, dict[str, Any]], None] = runpy.run_path(
    str(Path(__file__).parents[1] / "config" / "mmdb.py")
)["write_database"]


def url(address: str) -> str:
    return f"http://[{address}]/" if ":" in address else f"http://{address}/"


@pytest.mark.parametrize(
    ("address", "family", "other"), [(plan.SITE4, "ipv4", "ipv6"), (plan.SITE6, "ipv6", "ipv4")], ids=["v4", "v6"]
)
def test_packets_are_counted_by_protocol_and_family(
    lab: Lab, any_ztun: Ztun, address: str, family: str, other: str
) -> None:
    fake = lab.dig("site.test", "AAAA" if family == "ipv6" else "A")
    before = any_ztun.status()
    assert lab.curl(url(address)).returncode == 0
    ask_udp(lab.client, address, plan.ECHO_PORT, b"x")
    lab.client.run("ping", "-c1", "-W2", fake)
    after = any_ztun.status()
    for protocol in ("tcp", "udp", "icmp"):
        grown = {
            each: after[protocol]["families"][each] - before[protocol]["families"][each] for each in (family, other)
        }
        assert grown[family] > 0, protocol
        assert grown[other] == 0, protocol
        assert after[protocol]["packets"] == sum(after[protocol]["families"].values())


@pytest.mark.parametrize(
    ("address", "client"), [(plan.DIRECT4, plan.CLIENT4), (plan.DIRECT6, plan.CLIENT6)], ids=["v4", "v6"]
)
def test_a_direct_country_never_meets_the_tun(
    lab: Lab, backend: str, tmp_path: Path, address: str, client: str
) -> None:
    """Everything goes to a proxy, and one country does not: its packets are forwarded by the kernel."""
    path = tmp_path / "country.mmdb"
    country = {"country": {"iso_code": "NL"}}
    write_database(path, {"198.51.100.0/24": country, "2001:db8:1::/48": country})
    route = {
        "rules": [{"geoip": ["nl"], "outbound": "direct"}], "default": "socks", "geoip_database": str(path),
    }  # fmt: skip
    instance = start(lab, {**BASE, "route": route, "capture": {"backend": backend}})
    site = plan.SITE6 if ":" in address else plan.SITE4
    assert lab.page(url(site))["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    with lab.watching(lab.gateway, "ztun0") as packets:
        assert lab.page(url(address))["client"] == client
    destination = ipaddress.ip_address(address).packed
    assert [packet.hex() for packet in packets if destination in packet[:40]] == []
    entries = [one for table in instance.routes()["maps"] for one in table["entries"] if one.get("rule") == 0]
    (entry,) = [one for one in entries if "prefix" in one and (":" in one["prefix"]) == (":" in address)]
    assert entry["verdict"] == "direct"
    assert backend == "routes" or entry["hits"] >= 5  # the kernel counts no packets for a route
