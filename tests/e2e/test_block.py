"""Blocked prefixes end in the kernel: dropped, counted, and never seen by the TUN or the server.

Routes drop as silently (a blackhole sends no ICMP error), but the kernel counts no packets for a route.
"""

from __future__ import annotations

import ipaddress
import socket

import pytest

from e2e.conftest import BASE
from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

FAMILIES = pytest.mark.parametrize("address", [plan.BLOCKED4, plan.BLOCKED6], ids=["v4", "v6"])


@FAMILIES
def test_blocked_prefix_is_dropped_before_tun_and_wan(lab: Lab, ztun: Ztun, backend: str, address: str) -> None:
    needle = ipaddress.ip_address(address).packed
    before = _dropped(ztun)
    with lab.watching(lab.gateway, "ztun0") as tun, lab.watching(lab.gateway, "wan0") as wan:
        with pytest.raises(TimeoutError):
            lab.client.connect(address, plan.HTTP_PORT, timeout=0.5)
        for _ in range(10):
            with lab.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", (address, 9))

    assert _dropped(ztun) >= before + (11 if backend != "routes" else 0)
    assert not any(needle in packet[:40] for packet in (*tun, *wan))


def test_hits_are_counted_for_the_rule_that_blocked(lab: Lab, ztun: Ztun, backend: str) -> None:
    def hits() -> int:
        entries = [entry for made in ztun.routes()["maps"] for entry in made["entries"] if _is_blocked(entry)]
        assert entries, ztun.routes()["maps"]
        return sum(int(entry.get("hits", 0)) for entry in entries)

    before = hits()
    lab.client.run("ping", "-c3", "-i0.01", "-W0.2", plan.BLOCKED4, check=False)

    assert hits() >= before + (3 if backend != "routes" else 0)


@FAMILIES
def test_xdp_drops_before_there_is_a_packet(lab: Lab, ztun: Ztun, backend: str, address: str) -> None:
    def counted(name: str) -> int:
        return int(ztun.routes()["counters"].get(name, {"packets": 0})["packets"])

    hooks = {one["ifname"] for one in ztun.routes()["programs"] if one["hook"].startswith("xdp/")}
    assert hooks == ({"lan0"} if backend != "routes" else set())
    by_xdp, in_all = counted("xdp_drops"), counted("drop_rule")
    with lab.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(5):
            sock.sendto(b"x", (address, 9))
    if backend != "routes":
        assert wait_until(lambda: counted("xdp_drops") >= by_xdp + 5)
        assert counted("drop_rule") - in_all == counted("xdp_drops") - by_xdp


def test_xdp_can_be_switched_off(lab: Lab) -> None:
    instance = start(lab, {**BASE, "capture": {"backend": "tcx", "xdp": False}})
    assert {one["hook"] for one in instance.routes()["programs"]} == {"tcx/ingress", "tcx/egress"}
    with pytest.raises(TimeoutError):
        lab.client.connect(plan.BLOCKED4, plan.HTTP_PORT, timeout=0.3)
    counters = instance.routes()["counters"]
    assert counters["drop_rule"]["packets"] >= 1
    assert counters["xdp_drops"]["packets"] == 0


def _dropped(ztun: Ztun) -> int:
    return int(ztun.routes()["counters"].get("drop", {"packets": 0})["packets"])


def _is_blocked(entry: object) -> bool:
    return isinstance(entry, dict) and plan.BLOCKED4 in str(entry.get("prefix", entry.get("key", "")))
