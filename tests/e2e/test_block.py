"""Blocked prefixes end in BPF: dropped, counted, and never seen by the TUN or the server."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from ztun.lab import Lab, Ztun, plan

FAMILIES = pytest.mark.parametrize("address", [plan.BLOCKED4, plan.BLOCKED6], ids=["v4", "v6"])


@FAMILIES
def test_blocked_prefix_is_dropped_before_tun_and_wan(lab: Lab, ztun: Ztun, address: str) -> None:
    needle = ipaddress.ip_address(address).packed
    before = ztun.routes()["counters"]["drop"]["packets"]
    with lab.watching(lab.gateway, "ztun0") as tun, lab.watching(lab.gateway, "wan0") as wan:
        with pytest.raises(TimeoutError):
            lab.client.connect(address, plan.HTTP_PORT, timeout=0.5)
        for _ in range(10):
            with lab.client.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", (address, 9))

    assert ztun.routes()["counters"]["drop"]["packets"] >= before + 11
    assert not any(needle in packet[:40] for packet in (*tun, *wan))


def test_hits_are_counted_for_the_rule_that_blocked(lab: Lab, ztun: Ztun) -> None:
    def hits() -> int:
        entries = [entry for made in ztun.routes()["maps"] for entry in made["entries"] if _is_blocked(entry)]
        assert entries, ztun.routes()["maps"]
        return sum(int(entry.get("hits", 0)) for entry in entries)

    before = hits()
    lab.client.run("ping", "-c3", "-i0.01", "-W0.2", plan.BLOCKED4, check=False)

    assert hits() >= before + 3


def _is_blocked(entry: object) -> bool:
    return isinstance(entry, dict) and plan.BLOCKED4 in str(entry.get("prefix", entry.get("key", "")))
