"""Loops made for real: ztun's own packets come back into its TUN, and nothing grows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from e2e.conftest import BACKENDS
from e2e.host_programs import counted, page, url_of
from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

FAKE_PROXY = "198.18.77.1"  # within the Fake-IPs: the main table sends it into the TUN
HELD = 0.5  # seconds in which nothing may come


def start_looping(lab: Lab, backend: str, **sections: Any) -> Ztun:
    capture = {"host": True, "backend": backend}
    return start(lab, {"capture": capture, "timeouts": {"dial": 1, "drain": 0.2}, **sections})


def cut(instance: Ztun) -> int:
    """Packets of our own that were found to come back, in the kernel or behind it."""
    in_kernel = counted(instance, "drop_loop") if instance.routes()["programs"] else 0
    return in_kernel + int(instance.status()["drops"].get("ip-loop", 0))


@contextmanager
def our_packets_into_the_tun(lab: Lab) -> Iterator[None]:
    """As somebody's policy routing might do it who does not know what the mark is for."""
    rules = ["rule add fwmark 0x7a74 priority 99 lookup 99", "route add default dev ztun0 table 99"]
    lab.gateway.ip(*rules)
    try:
        yield
    finally:
        lab.gateway.ip("rule del fwmark 0x7a74 priority 99 lookup 99")  # the route goes with the TUN


def assert_calm(instance: Ztun, *, most: int) -> None:
    """What was cut is counted, and comes to an end when nobody asks for anything any more."""
    assert wait_until(lambda: cut(instance) > 0), instance.status()["drops"]
    assert wait_until(lambda: settled(instance), timeout=20, interval=0)
    assert cut(instance) <= most, instance.output


def settled(instance: Ztun) -> bool:
    before = total(instance)
    time.sleep(HELD)
    return total(instance) - before == 0


def total(instance: Ztun) -> int:
    """Everything that passes the TUN."""
    return int(instance.status()["device"]["read"]) + cut(instance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_proxy_among_the_fake_ips(lab: Lab, backend: str) -> None:
    outbounds = [{"tag": "behind", "type": "socks5", "server": f"{FAKE_PROXY}:1080"}]
    rules = [{"ip_cidr": [plan.SITE4], "outbound": "behind"}]
    instance = start_looping(lab, backend, outbounds=outbounds, route={"rules": rules, "default": "direct"})
    for connect in (lab.gateway.connect, lab.client.connect):
        with pytest.raises(OSError):
            connect(plan.SITE4, plan.HTTP_PORT)
    assert_calm(instance, most=200)
    assert page(lab, url_of(plan.DIRECT4))["client"] == plan.GATEWAY_WAN4


@pytest.mark.parametrize("backend", BACKENDS)
def test_rules_that_send_our_packets_into_the_tun(lab: Lab, backend: str) -> None:
    rules = [{"ip_cidr": ["203.0.113.0/24"], "outbound": "socks-udp"}]
    instance = start_looping(lab, backend, route={"rules": rules, "default": "direct"})
    with our_packets_into_the_tun(lab):
        for connect in (lab.gateway.connect, lab.client.connect):
            with pytest.raises(OSError):
                connect(plan.SITE4, plan.HTTP_PORT)
        # A query that comes back would be asked again by whoever answers it.
        query = ["dig", "+short", "+tries=1", "+time=1", f"@{plan.UPSTREAM4}", "direct.test"]
        assert plan.DIRECT4 not in lab.gateway.run(*query, check=False).stdout
        assert_calm(instance, most=200)
    assert wait_until(lambda: "a loop was cut" in instance.output, timeout=15)
    assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4


@pytest.mark.parametrize("backend", ["tcx", "routes"])
def test_a_proxy_in_a_captured_prefix_is_no_loop(lab: Lab, backend: str) -> None:
    """Our own packets are let out by their mark; what a program of the host sends there itself is captured."""
    rules = [{"ip_cidr": [f"{plan.UPSTREAM4}/32", "203.0.113.0/24"], "outbound": "socks"}]
    instance = start_looping(lab, backend, route={"rules": rules, "default": "direct"})
    assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4
    assert cut(instance) == 0
