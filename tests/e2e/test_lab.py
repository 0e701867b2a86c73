"""The laboratory without ztun: the gateway is a plain router, and every server does what the other tests rely on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from e2e.traffic import read_all
from ztun.lab import Lab, plan, servers
from ztun.lab.snapshot import differences, snapshot

CREDENTIALS = f"{plan.PROXY_USER}:{plan.PROXY_PASSWORD}"
PROXIES = {
    "microsocks": f"socks5h://{plan.UPSTREAM4}:{plan.SOCKS_PORT}",
    "microsocks with a password": f"socks5h://{CREDENTIALS}@{plan.UPSTREAM4}:{plan.SOCKS_AUTH_PORT}",
    servers.SOCKS_UDP: f"socks5h://{plan.UPSTREAM4}:{plan.SOCKS_UDP_PORT}",
    "tinyproxy": f"http://{plan.UPSTREAM4}:{plan.HTTP_PROXY_PORT}",
    "tinyproxy with a password": f"http://{CREDENTIALS}@{plan.UPSTREAM4}:{plan.HTTP_PROXY_AUTH_PORT}",
}


@pytest.mark.parametrize(("address", "client"), [(plan.SITE4, plan.CLIENT4), (f"[{plan.SITE6}]", plan.CLIENT6)])
def test_plain_forwarding_shows_the_clients_own_address(lab: Lab, address: str, client: str) -> None:
    assert lab.page(f"http://{address}/")["client"] == client


@pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES.keys())
def test_proxy_fetches_by_name_under_its_own_address(lab: Lab, proxy: str) -> None:
    page = lab.page("http://v4only.test/", "--proxytunnel", "--proxy", proxy)

    assert page == {"client": plan.UPSTREAM4, "host": "v4only.test", "server": plan.SITE4}


@pytest.mark.parametrize("port", [plan.SOCKS_AUTH_PORT, plan.HTTP_PROXY_AUTH_PORT])
def test_proxy_refuses_without_the_password(lab: Lab, port: int) -> None:
    scheme = "socks5h" if port == plan.SOCKS_AUTH_PORT else "http"

    done = lab.curl("-p", "-x", f"{scheme}://{plan.UPSTREAM4}:{port}", "http://v4only.test/", check=False)

    assert done.returncode != 0


def test_resolver_answers_everything_the_tests_ask(lab: Lab) -> None:
    at = f"@{plan.UPSTREAM4}"
    assert lab.dig(at, "site.test", "A") == plan.SITE4
    assert lab.dig(at, "site.test", "AAAA") == plan.SITE6
    assert lab.dig(at, "anything.bulk.test", "A") == plan.SITE4
    assert lab.dig(at, "direct.test", "HTTPS") == '1 . alpn="h2"'
    assert lab.dig(at, "-x", plan.DIRECT4) == "direct.test."
    assert len(lab.dig(at, "big.test", "TXT")) > 4000
    assert "NXDOMAIN" in lab.client.run("dig", at, "nowhere.test").stdout


def test_addresses_refuse_stay_silent_or_cannot_be_reached_as_the_plan_says(lab: Lab) -> None:
    with pytest.raises(ConnectionRefusedError):
        lab.client.connect(plan.SITE4, plan.CLOSED_PORT)
    with pytest.raises(OSError, match="No route to host"):
        lab.client.connect(plan.UNREACHABLE4, plan.HTTP_PORT)
    with pytest.raises(TimeoutError):
        lab.client.connect(plan.SILENT4, plan.HTTP_PORT, timeout=0.5)


def test_banner_server_speaks_first(lab: Lab) -> None:
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT) as sock:
        assert sock.recv(100) == b"220 lab ready\r\n"
        sock.shutdown(1)
        assert read_all(sock) == b""


def test_fresh_lab_is_up_in_three_seconds_and_leaves_nothing() -> None:
    started = time.monotonic()
    with Lab() as lab:
        elapsed = time.monotonic() - started
        names = [namespace.name for namespace in (lab.client, lab.gateway, lab.upstream)]
        assert all(Path("/run/netns", name).exists() for name in names)
        directory = lab.directory

    assert elapsed < 3
    assert not directory.exists()
    assert not any(Path(parent, name).exists() for name in names for parent in ("/run/netns", "/etc/netns"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_lab_ended_by_a_signal_leaves_nothing(number: int) -> None:
    body = (
        "import time; from ztun.lab import Lab; lab = Lab().__enter__(); print(lab._prefix, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    prefix = process.stdout.readline().strip()
    assert list(Path("/run/netns").glob(f"{prefix}-*"))

    process.send_signal(number)
    process.communicate(timeout=10)

    assert not list(Path("/run/netns").glob(f"{prefix}-*"))
    assert not list(Path("/tmp").glob(f"{prefix}*"))


def test_lab_sweeps_what_a_killed_one_left() -> None:
    body = (
        "import time; from ztun.lab import Lab; lab = Lab().__enter__(); print(lab._prefix, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    prefix = process.stdout.readline().strip()
    process.kill()
    process.communicate(timeout=10)
    assert list(Path("/run/netns").glob(f"{prefix}-*"))

    with Lab():
        pass

    assert not list(Path("/run/netns").glob(f"{prefix}-*"))


def test_snapshot_is_steady_and_sees_every_kind_of_change(lab: Lab) -> None:
    before = snapshot(lab.gateway)
    assert differences(before, snapshot(lab.gateway)) == []

    changes = [
        ("link add left0 type veth peer name left1", "link del left0", "ip -d link"),
        ("address add 192.0.2.77/32 dev lo", "address del 192.0.2.77/32 dev lo", "ip -d address"),
        ("route add 192.0.2.0/24 dev wan0 table 77", "route del 192.0.2.0/24 dev wan0 table 77", "ip -4 route"),
        ("rule add priority 77 table 77", "rule del priority 77", "ip -4 rule"),
    ]
    for change, undo, where in changes:
        lab.gateway.ip(change)
        assert any(line.startswith(where) for line in differences(before, snapshot(lab.gateway))), change
        lab.gateway.ip(undo)
    lab.gateway.run("tc", "qdisc", "add", "dev", "lan0", "clsact")
    assert any("clsact" in line for line in differences(before, snapshot(lab.gateway)))
    lab.gateway.run("tc", "qdisc", "del", "dev", "lan0", "clsact")
    lab.gateway.run("sysctl", "-w", "net.ipv4.conf.lan0.rp_filter=2")
    assert any("rp_filter" in line for line in differences(before, snapshot(lab.gateway)))
    lab.gateway.run("sysctl", "-w", "net.ipv4.conf.lan0.rp_filter=0")
    assert differences(before, snapshot(lab.gateway)) == []
