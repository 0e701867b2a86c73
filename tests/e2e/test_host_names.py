"""capture.host and the resolvers of the host itself, whose files are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from e2e.conftest import BACKENDS, OUTBOUNDS, RULES
from e2e.host_programs import lookup, page, start_on_host
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import complete

STUB = "127.0.0.53"


@pytest.fixture(scope="module", params=BACKENDS)
def ztun(lab: Lab, request: pytest.FixtureRequest) -> Ztun:
    return start_on_host(lab, request.param)


@contextmanager
def resolver(lab: Lab, address: str, *options: str) -> Iterator[None]:
    """dnsmasq on an address of the gateway; systemd-resolved's stub is one of the same kind."""
    name = f"resolver-{address}"
    always = ["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root", "--pid-file"]
    argv = ["dnsmasq", *always, "--bind-interfaces", "--cache-size=0", f"--listen-address={address}", *options]
    lab.spawn(lab.gateway, name, *argv)
    try:
        assert wait_until(lambda: f"{address}:53" in lab.gateway.run("ss", "-Hlnt").stdout, 10)
        yield
    finally:
        lab.end_server(name)


@contextmanager
def resolv_conf(lab: Lab, text: str) -> Iterator[Path]:
    """What the programs of the gateway find in /etc/resolv.conf."""
    path = Path("/etc/netns", lab.gateway.name, "resolv.conf")
    before = path.read_text()
    path.write_text(text)
    try:
        yield path
        assert path.read_text() == text
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    "server", [plan.UPSTREAM4, plan.RESOLVER_ELSEWHERE4, plan.CLIENT4], ids=["wan", "elsewhere", "lan"]
)
def test_a_plain_resolv_conf(lab: Lab, ztun: Ztun, server: str) -> None:
    with resolv_conf(lab, f"nameserver {server}\noptions timeout:3\n"):
        assert page(lab, "http://www.site.test/") == {
            "client": plan.UPSTREAM4,
            "host": "www.site.test",
            "server": plan.SITE4,
        }
        assert page(lab, "http://direct.test/")["client"] in (plan.GATEWAY_WAN4, plan.GATEWAY_WAN6)
        lab.gateway.run("ping", "-c", "1", "www.site.test")


def test_a_stub_that_asks_others(lab: Lab, ztun: Ztun) -> None:
    asked = len(lab.dns_queries())
    with resolver(lab, STUB, f"--server={plan.RESOLVER_ELSEWHERE4}"), resolv_conf(lab, f"nameserver {STUB}\n"):
        [fake] = lookup(lab, f"@{STUB}", "www.site.test")
        assert fake.startswith("198.18.")
        assert lookup(lab, "+tcp", f"@{STUB}", "direct.test") == [plan.DIRECT4]
        assert page(lab, "http://www.site.test/")["client"] == plan.UPSTREAM4
        assert page(lab, "http://direct.test/")["client"] in (plan.GATEWAY_WAN4, plan.GATEWAY_WAN6)
    # Each name was asked of upstream by ztun or not at all: a stub that comes back to itself would ask for ever.
    assert len(lab.dns_queries()) - asked < 12
    assert ztun.status()["drops"].get("ip-loop", 0) == 0


def test_a_stub_that_binds_its_interface(lab: Lab, ztun: Ztun) -> None:
    """As systemd-resolved does for the servers of a link. Only programs in the kernel see through that."""
    is_seen = bool(ztun.routes()["programs"])
    with resolver(lab, STUB, f"--server={plan.RESOLVER_ELSEWHERE4}@wan0"):
        [found] = lookup(lab, f"@{STUB}", "www.site.test")
        assert found.startswith("198.18.") if is_seen else found == plan.SITE4


def test_a_resolver_that_answers_itself_is_left_alone(lab: Lab, ztun: Ztun) -> None:
    with resolver(lab, "127.0.0.1", "--host-record=www.site.test,192.0.2.7"):
        assert lookup(lab, "@127.0.0.1", "www.site.test") == ["192.0.2.7"]


def asked(instance: Ztun) -> list[str]:
    return list(instance.status()["dns"]["servers"])


def test_whom_the_host_asks_is_followed(lab: Lab) -> None:
    """With `dns.servers` left out, as on a laptop: another network brings another resolv.conf."""
    lab.stop()
    first = f"nameserver {STUB}\nnameserver {plan.UPSTREAM4}\n"
    with resolv_conf(lab, first) as path:
        instance = lab.prepare()
        config = complete({"capture": {"host": True, "lan": []}}, instance.directory)
        config["dns"] = {"fake_ip": config["dns"]["fake_ip"]}
        config["route"] = {"rules": RULES, "default": "direct"}
        config["outbounds"] = OUTBOUNDS
        instance.start(config)
        assert asked(instance) == [f"udp://{plan.UPSTREAM4}:53"]
        assert set(lookup(lab, f"@{plan.UPSTREAM4}", "direct.test")) == {plan.DIRECT4}

        path.write_text(f"nameserver {plan.RESOLVER_ELSEWHERE4}\n")
        lab.gateway.ip("address add 10.20.0.77/24 dev wan0")
        assert wait_until(lambda: asked(instance) == [f"udp://{plan.RESOLVER_ELSEWHERE4}:53"], 15), asked(instance)
        path.write_text("# no network, no server\n")
        lab.gateway.ip("address del 10.20.0.77/24 dev wan0")
        assert page(lab, "http://direct.test/", "-4", "--resolve", f"direct.test:80:{plan.DIRECT4}")
        assert asked(instance) == [f"udp://{plan.RESOLVER_ELSEWHERE4}:53"]
        assert instance.stop() == 0
        path.write_text(first)


def test_queries_go_past_when_they_are_not_to_be_taken(lab: Lab) -> None:
    start_on_host(lab, "tcx", dns={"hijack": False})
    assert lookup(lab, f"@{plan.UPSTREAM4}", "www.site.test") == [plan.SITE4]
    assert lookup(lab, f"@{plan.GATEWAY_LAN4}", "www.site.test")[0].startswith("198.18.")
