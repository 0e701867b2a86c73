"""Others who change the network of a gateway: they work as before beside ztun, and find theirs untouched after it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.foreign import GO_ON, Counting, attach_filter, attach_tcx
from e2e.lan_sites import Site, more_lans
from e2e.traffic import start
from ztun.lab import Lab, plan
from ztun.lab.namespace import Namespace, wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.platform.linux.hooks import FILTER_PRIORITY
from ztun.platform.linux.tun import open_tun

RULES = [
    {"domain_suffix": ["test"], "outbound": "socks"},
    # What the containers and the LAN send anywhere beyond, except what is asked for directly.
    {"ip_cidr": [plan.DIRECT4, plan.DIRECT6], "outbound": "direct"},
    {"ip_cidr": ["203.0.113.0/24", "2001:db8::/48", f"{plan.UPSTREAM4}/32"], "outbound": "socks"},
]
PUBLISHED = 8080
# What Docker sets up for a bridge with a published port, in the words of nft(8); `mark` is a rule of somebody else.
DOCKER = f"""
table ip nat {{
    chain PREROUTING {{ type nat hook prerouting priority dstnat; fib daddr type local jump DOCKER; }}
    chain OUTPUT {{ type nat hook output priority -100; ip daddr != 127.0.0.0/8 fib daddr type local jump DOCKER; }}
    chain POSTROUTING {{
        type nat hook postrouting priority srcnat;
        ip saddr 10.10.20.0/24 oifname != "br0" masquerade
    }}
    chain DOCKER {{ iifname != "br0" tcp dport {PUBLISHED} dnat to 10.10.20.2:80; }}
}}
table ip filter {{
    chain FORWARD {{
        type filter hook forward priority filter; policy drop;
        oifname "br0" ct state related,established accept
        oifname "br0" jump DOCKER
        iifname "br0" accept
        iifname "lan0" accept
        oifname "lan0" ct state related,established accept
    }}
    chain DOCKER {{ ip daddr 10.10.20.2 iifname != "br0" oifname "br0" tcp dport 80 accept; }}
}}
table inet somebody {{
    set seen {{ type ipv4_addr; elements = {{ 192.0.2.1 }}; }}
    chain input {{ type filter hook input priority 0; policy accept; ip saddr @seen counter packets 0 bytes 0 drop; }}
}}
"""


@pytest.fixture(scope="module")
def boxes(lab: Lab) -> Iterator[dict[str, Site]]:
    with more_lans(lab) as sites:
        (lab.directory / "box").mkdir()
        (lab.directory / "box" / "index.html").write_text('{"server": "box1"}\n')
        server = ["python3", "-m", "http.server", "--directory", str(lab.directory / "box"), "80"]
        lab.spawn(sites["box1"].namespace, "box", *server)
        assert wait_until(
            lambda: sites["box2"].namespace.run("nc", "-z", "10.10.20.2", "80", check=False).returncode == 0
        )
        yield sites


@pytest.fixture(scope="module")
def docker(lab: Lab, boxes: dict[str, Site]) -> Iterator[None]:
    lab.gateway.run("nft", DOCKER)
    yield
    for table in ("ip nat", "ip filter", "inet somebody"):
        lab.gateway.run("nft", "delete", "table", *table.split(), check=False)


@pytest.fixture
def unchanged(lab: Lab) -> Iterator[Callable[[], list[str]]]:
    """Whether the network is byte for byte what it was when the test began, once all instances are stopped."""
    lab.stop()
    before = snapshot(lab.gateway)

    def look() -> list[str]:
        lab.stop()
        return differences(before, snapshot(lab.gateway))

    yield look
    lab.stop()


def settings(backend: str, *lan: str) -> dict[str, Any]:
    return {"capture": {"lan": list(lan), "backend": backend}, "route": {"rules": RULES, "default": "direct"}}


def published(namespace: Namespace, host: str) -> str:
    """The container's page, from outside."""
    return namespace.run("curl", "-sS", "--max-time", "5", f"http://{host}:{PUBLISHED}/").stdout.strip()


def proxied(lab: Lab) -> bool:
    return lab.page("http://site.test/", "-4")["client"] == plan.UPSTREAM4


@pytest.mark.usefixtures("docker")
class TestDocker:
    @pytest.mark.parametrize("bpf", ["tcx", "clsact"])
    def test_published_ports_and_containers_work_with_the_bridge_captured(
        self, lab: Lab, boxes: dict[str, Site], bpf: str, unchanged: Callable[[], list[str]]
    ) -> None:
        instance = start(lab, settings(bpf, "lan0", "br0"))
        # From the internet and from the LAN to the container: what it answers is no flow of its own.
        assert published(lab.upstream, plan.GATEWAY_WAN4) == '{"server": "box1"}'
        assert published(lab.client, plan.GATEWAY_LAN4) == '{"server": "box1"}'
        assert instance.routes()["counters"]["pass_answers"]["packets"] > 0
        # The container's own: directly, masqueraded by Docker's rule, and through the proxy.
        assert boxes["box1"].fetch(f"http://{plan.DIRECT4}/")["client"] == plan.GATEWAY_WAN4
        assert boxes["box1"].fetch(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
        assert boxes["box2"].fetch("http://site.test/", "-4")["client"] == plan.UPSTREAM4
        assert proxied(lab)
        assert unchanged() == []

    def test_without_bpf_the_containers_bridge_is_left_alone(
        self, lab: Lab, boxes: dict[str, Site], unchanged: Callable[[], list[str]]
    ) -> None:
        start(lab, settings("routes", "lan0"))
        assert published(lab.upstream, plan.GATEWAY_WAN4) == '{"server": "box1"}'
        assert boxes["box1"].fetch(f"http://{plan.DIRECT4}/")["client"] == plan.GATEWAY_WAN4
        assert unchanged() == []

    def test_without_bpf_a_policy_of_drop_is_told_with_its_remedy(
        self, lab: Lab, unchanged: Callable[[], list[str]]
    ) -> None:
        lab.gateway.run("nft", "delete", "table", "ip", "filter")
        lab.gateway.run("nft", "table ip guard { chain f { type filter hook forward priority 0; policy drop; }; }")
        try:
            instance = start(lab, settings("routes", "lan0"))
            remedy = (
                'nft insert rule ip guard f iifname "ztun0" accept; nft insert rule ip guard f oifname "ztun0" accept'
            )
            assert "a firewall drops what is forwarded" in instance.output
            assert instance.routes()["firewall"] == {"drops": ["ip guard f"], "remedy": remedy}
            told = instance.command("routes", "--socket", str(instance.socket_path)).stdout
            assert "ip guard f" in told
            assert lab.curl(f"http://{plan.SITE4}/", check=False, timeout=1).returncode == 28
            for line in remedy.split("; "):
                lab.gateway.run("sh", "-c", line)
            assert proxied(lab)
            assert "firewall" not in instance.routes()
        finally:
            lab.stop()
            lab.gateway.run("nft", "delete", "table", "ip", "guard")
            lab.gateway.run("nft", "-f", "-", input=DOCKER.replace("table ip nat", "table ip unused"), check=False)
            lab.gateway.run("nft", "delete", "table", "ip", "unused", check=False)


@pytest.mark.parametrize("backend_name", ["clsact", "routes"])
def test_a_flushed_firewall_is_nothing_to_ztun(lab: Lab, backend_name: str) -> None:
    lab.gateway.run("nft", "table inet mine { chain forward { type filter hook forward priority 0; policy accept; }; }")
    start(lab, settings(backend_name, "lan0"))
    assert proxied(lab)
    lab.gateway.run("nft", "flush", "ruleset")
    assert proxied(lab)
    assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4


@pytest.mark.parametrize("bpf", ["tcx", "clsact"])
def test_programs_and_filters_of_others_on_the_same_hook_see_all_and_stay(
    lab: Lab, bpf: str, unchanged: Callable[[], list[str]]
) -> None:
    before, behind, outside = (Counting(name, GO_ON) for name in ("before", "behind", "outside"))
    first, last = Counting("first", GO_ON), Counting("last", GO_ON)
    links: list[int] = []
    try:
        attach_filter(lab.gateway, "lan0", "before", before.program, 10)
        attach_filter(lab.gateway, "lan0", "behind", behind.program, FILTER_PRIORITY + 10)
        attach_filter(lab.gateway, "lan0", "outside", outside.program, 10, "egress")
        links.append(attach_tcx(lab.gateway, "lan0", first.program, first=True))
        with_others = snapshot(lab.gateway)
        start(lab, settings(bpf, "lan0"))
        links.append(attach_tcx(lab.gateway, "lan0", last.program))  # behind ours, if ours is there
        assert proxied(lab)
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
        # What ztun takes nobody behind it sees; what it passes they do. TCX comes before all filters.
        order = [first, last, before, behind]
        seen = [one.packets for one in order]
        assert seen == sorted(seen, reverse=True), seen
        ahead_of_ours = order.index(first if bpf == "tcx" else before)
        assert seen[ahead_of_ours] > seen[ahead_of_ours + 1] > 0, seen
        assert seen[-1] > 0
        assert outside.packets > 0
        lab.stop()
        os.close(links.pop())
        assert differences(with_others, snapshot(lab.gateway)) == []
        packets = before.packets
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
        assert before.packets > packets
    finally:
        lab.stop()
        for fd in links:
            os.close(fd)
        lab.gateway.run("tc", "qdisc", "del", "dev", "lan0", "clsact", check=False)
        for one in (before, behind, outside, first, last):
            one.close()
    assert unchanged() == []


def rules_of(lab: Lab, *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(lab.gateway.run("ip", "-j", *arguments, "rule").stdout)
    return found


def test_rules_that_somebody_removes_come_back(lab: Lab, unchanged: Callable[[], list[str]]) -> None:
    """As networkd does when it starts: away with every rule that is not its own (ManageForeignRoutingPolicyRules)."""
    instance = start(lab, settings("routes", "lan0"))
    before = rules_of(lab, "-4"), rules_of(lab, "-6")
    for family in ("-4", "-6"):
        lab.gateway.run("ip", family, "rule", "flush", "protocol", "122")
    assert wait_until(lambda: (rules_of(lab, "-4"), rules_of(lab, "-6")) == before)
    assert wait_until(lambda: "somebody removed our ip rules, put them back" in instance.output)
    assert proxied(lab)
    assert unchanged() == []


@pytest.mark.parametrize("backend_name", ["tcx", "routes"])
def test_addresses_that_somebody_takes_from_the_tun_come_back(
    lab: Lab, backend_name: str, unchanged: Callable[[], list[str]]
) -> None:
    instance = start(lab, settings(backend_name, "lan0"))
    lab.gateway.run("ip", "address", "flush", "dev", "ztun0")
    assert wait_until(lambda: "somebody took addresses from the TUN, putting them back" in instance.output)
    assert wait_until(lambda: lab.curl("-4", "http://site.test/", check=False, timeout=2).returncode == 0)
    assert lab.page(f"http://[{plan.SITE6}]/")["client"] == plan.UPSTREAM6
    assert unchanged() == []


@pytest.mark.parametrize("backend_name", ["tcx", "routes"])
def test_networkd_may_own_the_interfaces(lab: Lab, backend_name: str, tmp_path: Path) -> None:
    """The real one, in the gateway's namespace: it configures lan0 while ztun captures from it."""
    instance = start(lab, settings(backend_name, "lan0"))
    before = rules_of(lab), instance.routes()["programs"]
    network = f"[Match]\nName=lan0\n[Network]\nAddress={plan.GATEWAY_LAN4}/24\nAddress={plan.GATEWAY_LAN6}/64\n"
    (tmp_path / "10-lan.network").write_text(network + "[Address]\nAddress=10.10.0.77/32\n")
    with networkd(lab, tmp_path):
        assert wait_until(lambda: "10.10.0.77" in lab.gateway.run("ip", "address", "show", "lan0").stdout, 15)
        assert wait_until(lambda: lab.curl("http://site.test/", check=False, timeout=2).returncode == 0)
        assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
        assert lab.page(f"http://{plan.DIRECT4}/")["client"] == plan.CLIENT4
        assert wait_until(lambda: (rules_of(lab), instance.routes()["programs"]) == before)
    lab.stop()
    lab.gateway.run("ip", "address", "del", "10.10.0.77/32", "dev", "lan0")


@contextlib.contextmanager
def networkd(lab: Lab, configuration: Path) -> Iterator[None]:
    """systemd-networkd with a /run of its own; it takes a read-only /sys for a container, where no udev is to ask."""
    script = f"""
        mount --make-rprivate / && mount -o remount,ro /sys && mount -t tmpfs tmpfs /run
        mkdir -p /run/systemd/netif/links /run/systemd/netif/leases /run/systemd/network
        chown -R systemd-network:systemd-network /run/systemd/netif
        cp {configuration}/*.network /run/systemd/network/
        exec /lib/systemd/systemd-networkd
    """
    process = lab.spawn(lab.gateway, "networkd", "unshare", "-m", "sh", "-ec", script)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


# As tailscaled and wg-quick(8) set them up; TUN devices play theirs.
TAILSCALE = [
    "link set ts0 up",
    "address add 100.100.1.1/32 dev ts0",
    "rule add pref 5210 fwmark 0x80000/0xff0000 lookup main",
    "rule add pref 5230 fwmark 0x80000/0xff0000 lookup default",
    "rule add pref 5250 fwmark 0x80000/0xff0000 type unreachable",
    "rule add pref 5270 lookup 52",
    "route add 100.64.0.0/10 dev ts0 table 52",
]
WIREGUARD = [
    "link set wg0 up",
    "address add 10.99.0.2/24 dev wg0",
    "route add default dev wg0 table 51820",
    "rule add pref 32765 not fwmark 51820 lookup 51820",
    "rule add pref 32764 lookup main suppress_prefixlength 0",
]


@pytest.mark.parametrize("backend_name", ["tcx", "routes"])
def test_tables_and_rules_of_vpns_stay_and_work(lab: Lab, backend_name: str) -> None:
    lab.stop()
    clean = snapshot(lab.gateway)
    with lab.gateway.entered():
        devices = [open_tun(name, 1280) for name in ("ts0", "wg0")]  # with somebody who has it open, as with theirs
    lab.gateway.ip(*TAILSCALE, *WIREGUARD)
    try:
        with_vpns = snapshot(lab.gateway)
        start(lab, settings(backend_name, "lan0"))
        assert proxied(lab)
        assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
        # What the rules of ztun leave alone goes where theirs say: the tailnet, and the default route of the other.
        for ifname, host in (("ts0", "100.100.5.5"), ("wg0", plan.DIRECT4)):
            with lab.watching(lab.gateway, ifname) as packets:
                lab.curl(f"http://{host}/", check=False, timeout=0.5)
            assert any(socket.inet_aton(host) in packet[:20] for packet in packets), ifname
        lab.stop()
        assert differences(with_vpns, snapshot(lab.gateway)) == []
    finally:
        lab.stop()
        for line in [*TAILSCALE, *WIREGUARD]:
            if line.startswith("rule"):
                lab.gateway.run("ip", *line.replace("add", "del", 1).split())
        for device in devices:
            device.close()
    assert wait_until(lambda: differences(clean, snapshot(lab.gateway)) == [])
