"""Two gateways with their macOS part on one machine, the stand-in for a Mac: each its own, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from e2e.conftest import OUTBOUNDS
from e2e.lan_sites import Site, one_cable

from darwin.conftest import DarwinLab, ZtunAsDarwin
from ztun.lab import plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import complete

# Everything goes into the utun of the first one, this host's own traffic too.
FIRST: dict[str, Any] = {
    "capture": {"lan": ["lan0"], "host": True},
    "dns": {"fake_ip": {"range": "198.18.0.0/16", "range6": "2001:2:0:1::/64"}},
    "outbounds": OUTBOUNDS,
    "route": {"default": "socks-udp"},
}
SECOND: dict[str, Any] = {
    "tun": {"name": "utun8"},
    "capture": {"lan": ["lan1"]},
    "dns": {"listen": ["10.10.1.1:53"], "fake_ip": {"range": "198.19.0.0/16", "range6": "2001:2:0:2::/64"}},
    "outbounds": OUTBOUNDS,
    "route": {
        "rules": [
            {"ip_cidr": [plan.SITE4, plan.SITE6], "port": [plan.HTTP_PORT], "outbound": "direct"},
            {"ip_cidr": [plan.SITE4, plan.SITE6], "outbound": "socks-udp"},
            {"domain_suffix": ["test"], "outbound": "socks"},
        ]
    },
}

RANGES = "give each a range of its own, as 198.18.0.0/17 and 198.18.128.0/17"
ROUTE = "end what made it (another VPN, another ztun?), or remove it with `route delete 0.0.0.0/1`"


@pytest.fixture(scope="module")
def cable(lab: DarwinLab) -> Iterator[Site]:
    with one_cable(lab) as site:
        yield site


@pytest.fixture(scope="module")
def first(lab: DarwinLab, cable: Site) -> ZtunAsDarwin:
    return lab.ztun(FIRST)


def test_what_one_sends_out_does_not_go_into_the_other(lab: DarwinLab, cable: Site, first: ZtunAsDarwin) -> None:
    """The utun of the other one has a route for it, as for everything."""
    alone = snapshot(lab.gateway)
    second = lab.ztun(SECOND)
    dials = first.status()["outbounds"]["socks-udp"]["dials"]
    assert cable.fetch(f"http://{plan.SITE4}/")["client"] == plan.GATEWAY_WAN4
    assert cable.fetch(f"http://[{plan.SITE6}]/")["client"] == plan.GATEWAY_WAN6
    assert cable.fetch("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert first.status()["outbounds"]["socks-udp"]["dials"] == dials
    assert cable.namespace.run("dig", "+short", "site.test", "A").stdout.startswith("198.19.")
    assert lab.dig("site.test", "A").startswith("198.18.")
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert second.stop() == 0
    assert differences(alone, snapshot(lab.gateway)) == []
    assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4


def test_what_two_cannot_share_is_refused_in_one_line(lab: DarwinLab, cable: Site, first: ZtunAsDarwin) -> None:
    who = f"another ztun (pid {first.pid}, --socket {first.socket_path})"
    store = first.config["dns"]["fake_ip"]["store"]
    wanted: list[tuple[dict[str, Any], str]] = [
        ({"tun": {"name": "utun7"}}, f"tun.name: utun7 is in use by {who}; choose another name"),
        (
            {"dns": {"fake_ip": {"range": "198.18.128.0/17"}}},
            f"dns.fake_ip.range: 198.18.128.0/17 overlaps 198.18.0.0/16, which is in use by {who}; {RANGES}",
        ),
        (
            {"dns": {"fake_ip": {"store": store}}},
            f"dns.fake_ip.store: {store} is in use by another ztun (pid {first.pid}); choose another file",
        ),
        (
            {"control": {"socket": str(first.socket_path)}},
            f"already running as pid {first.pid}; stop it with `ztun down` first",
        ),
        (
            {"route": {"default": "socks"}},
            f"a route to 0.0.0.0/1 exists already, through utun7: {ROUTE}",
        ),
    ]
    before = snapshot(lab.gateway)
    instances = [_launch(lab, number, sections) for number, (sections, _line) in enumerate(wanted)]
    assert wait_until(lambda: not any(instance.alive for instance in instances), 60)
    for instance, (_sections, line) in zip(instances, wanted, strict=True):
        said = [each for each in instance.output.splitlines() if each.startswith("ztun: ")]
        assert (instance.returncode, said) == (1, [f"ztun: {line}"]), instance.output
    assert differences(before, snapshot(lab.gateway)) == []
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert first.stop() == 0
    assert not first.claims.exists()


def _launch(lab: DarwinLab, number: int, sections: dict[str, Any]) -> ZtunAsDarwin:
    """One of many that start at the same time, and have nothing in common but with `first`."""
    instance = lab.prepare()
    ranges = {"range": f"100.{64 + number}.0.0/16", "range6": f"2001:2:0:{number + 16}::/64"}
    config: dict[str, Any] = {
        "tun": {"name": f"utun{20 + number}"},
        "capture": {"lan": [f"lan{20 + number}"]},  # absent so far, which is no problem
        "dns": {"listen": [], "fake_ip": ranges},
    }
    fake_ip = {**ranges, **sections.get("dns", {}).get("fake_ip", {})}
    merged = {**config, **sections, "dns": {**config["dns"], "fake_ip": fake_ip}}
    instance.write(complete(merged, instance.directory))
    instance.launch("up", "--config", str(instance.config_path))
    return instance
