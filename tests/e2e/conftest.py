"""The laboratory and a running gateway, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.ztun import PROXIES

SITE = [plan.SITE4, plan.SITE6]
SHARED = [plan.SHARED4, plan.SHARED6]

# What most modules run on. The order matters: the first rule that matches wins.
RULES: list[dict[str, Any]] = [
    {"domain_suffix": ["direct.test"], "outbound": "direct"},
    {"domain_keyword": ["telemetry"], "outbound": "block"},
    {"domain": ["blocked.test"], "outbound": "block"},
    {"ip_cidr": [plan.BLOCKED4, plan.BLOCKED6], "outbound": "block"},
    {"domain": ["web.test"], "outbound": "http-auth"},
    {"domain_suffix": ["plainweb.bulk.test"], "outbound": "http"},
    {"domain_suffix": ["auth.bulk.test"], "outbound": "socks-auth"},
    {"domain_suffix": ["badauth.bulk.test"], "outbound": "socks-badauth"},
    {"domain_suffix": ["gone.bulk.test"], "outbound": "socks-gone"},
    {"domain_suffix": ["udp.bulk.test"], "outbound": "socks-udp"},
    {"domain": ["shared.test"], "outbound": "socks-udp"},
    # The addresses SHARED4/6 are shared: one LAN host's go to a proxy, port 80 of the others too, the rest goes direct.
    {"ip_cidr": SHARED, "source_cidr": [plan.CLIENT4_OTHER, plan.CLIENT6_OTHER], "outbound": "socks"},
    {"ip_cidr": SHARED, "port": [plan.HTTP_PORT], "protocol": "tcp", "outbound": "http"},
    {"ip_cidr": SHARED, "port": [plan.BANNER_PORT], "outbound": "block"},
    # What an end-to-end reset needs: proxies turn a reset into an orderly end.
    {"ip_cidr": SITE, "port": [plan.RESET_PORT, plan.ECHO_PORT], "protocol": "tcp", "outbound": "direct"},
    {"ip_cidr": ["203.0.113.0/24", "2001:db8::/48"], "outbound": "socks-udp"},
    {"domain_suffix": ["test"], "outbound": "socks"},
]
_BAD_AUTH = {"username": plan.PROXY_USER, "password": "wrong"}
OUTBOUNDS: list[dict[str, Any]] = [
    *PROXIES,
    {"tag": "socks-badauth", "type": "socks5", "server": f"{plan.UPSTREAM4}:{plan.SOCKS_AUTH_PORT}", **_BAD_AUTH},
    {"tag": "socks-gone", "type": "socks5", "server": f"{plan.UPSTREAM4}:{plan.CLOSED_PORT}"},
]
BASE: dict[str, Any] = {"route": {"rules": RULES}, "outbounds": OUTBOUNDS, "timeouts": {"dial": 3, "drain": 0.2}}


BACKENDS = ("tcx", "clsact", "routes")
# The last is tcx with connections that the kernel carries (test_offload.py). For tests of what both ends see.
EVERY_WAY = pytest.mark.parametrize("backend", [*BACKENDS, "offload"], indirect=True)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Its gateways carry all connections themselves unless a test says otherwise: that is to be seen at work."""
    with Lab() as made:
        made.offload = False
        yield made


@pytest.fixture(scope="module", params=BACKENDS)
def backend(lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """Once for each way of capturing: gateways that are started meanwhile, and say nothing else, capture by it."""
    lab.stop()
    lab.offload = request.param == "offload"
    lab.backend = "tcx" if lab.offload else request.param
    yield lab.backend
    lab.backend, lab.offload = "auto", False


@pytest.fixture
def ztun(lab: Lab, backend: str) -> Ztun:
    """A gateway on RULES, once for each way of capturing."""
    instance = _running_on_rules(lab) or start(lab, BASE)
    assert instance.routes()["backend"] == backend
    return instance


@pytest.fixture
def any_ztun(lab: Lab) -> Ztun:
    """A gateway on RULES. It captures somehow, unless the module asks for `backend` as well."""
    return _running_on_rules(lab) or start(lab, BASE)


def _running_on_rules(lab: Lab) -> Ztun | None:
    """The gateway that an earlier test of the module left running; they are shared to save their start."""
    return next((one for one in lab.running() if one.config.get("route", {}).get("rules") == RULES), None)
