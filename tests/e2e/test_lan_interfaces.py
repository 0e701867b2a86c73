"""Several LANs at once: cables, a VLAN of a trunk, containers on a bridge, through a real SOCKS5 server and back."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.lan_sites import Site, more_lans
from e2e.traffic import ask_udp, start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

LAN = ["lan0", "lan1", "trunk0.10", "br0"]
SITES = ["client", "cable", "vlan", "box1", "box2"]
EVERYTHING = ["203.0.113.0/24", "2001:db8::/48"]

# As Docker sets it: nothing is forwarded but what stays on a bridge, which br_netfilter shows to the firewall as well.
FORWARD_DROP = """table inet guard {
    chain forward { type filter hook forward priority filter; policy drop; iifname br0 oifname br0 accept; }
}"""


# packet(7), linux/if_packet.h.
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_AUXDATA = 263, 8
_AUXDATA = struct.Struct("=IIIHHHH")  # struct tpacket_auxdata: the last but one is the VLAN's tag
_OUTGOING = 4


@pytest.fixture(scope="module")
def sites(lab: Lab) -> Iterator[dict[str, Site]]:
    with more_lans(lab) as more:
        mac = lab.client.run("cat", "/sys/class/net/eth0/address").stdout.strip()
        yield {"client": Site("lan0", lab.client, plan.CLIENT4, plan.CLIENT6, mac), **more}


def settings(sites: dict[str, Site], backend: str) -> dict[str, Any]:
    rules = [
        {"domain": ["blocked.test"], "source_mac": [sites["box2"].mac], "outbound": "block"},
        {"domain_suffix": ["test"], "interface": ["trunk0.10"], "outbound": "http"},
        {"domain_suffix": ["test"], "outbound": "socks"},
        # By address: only one container, and one VLAN, may go past the proxy.
        {"ip_cidr": [plan.SITE4, plan.SITE6], "source_mac": [sites["box1"].mac], "outbound": "direct"},
        {"ip_cidr": [plan.SITE4, plan.SITE6], "interface": ["lan1"], "port": 80, "outbound": "block"},
        {"ip_cidr": EVERYTHING, "outbound": "socks-udp"},
    ]
    return {"capture": {"lan": LAN, "backend": backend}, "route": {"rules": rules, "default": "direct"}}


@pytest.fixture(scope="module")
def closed_gateway(lab: Lab, backend: str) -> Iterator[None]:
    """No forwarding at all, in two ways, where BPF makes both unimportant."""
    keys = ["ipv4/ip_forward", "ipv6/conf/all/forwarding"]
    if backend == "routes":
        yield
        return
    with lab.gateway.entered():
        for key in keys:
            Path("/proc/sys/net", key).write_text("0")
    lab.gateway.run("nft", FORWARD_DROP)
    yield
    lab.gateway.run("nft", "delete table inet guard")
    with lab.gateway.entered():
        for key in keys:
            Path("/proc/sys/net", key).write_text("1")


@pytest.fixture(scope="module")
def gateway(lab: Lab, sites: dict[str, Site], backend: str, closed_gateway: None) -> Iterator[Ztun]:
    instance = start(lab, settings(sites, backend))
    assert instance.routes()["backend"] == backend
    yield instance
    lab.stop()


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("family", ["-4", "-6"])
def test_names_go_through_the_proxy_from_every_lan(
    gateway: Ztun, sites: dict[str, Site], name: str, family: str
) -> None:
    page = sites[name].fetch("http://site.test/", family)
    assert page["client"] == (plan.UPSTREAM6 if page["server"] == plan.SITE6 else plan.UPSTREAM4)
    assert page["host"] == "site.test"


@pytest.mark.parametrize("name", ["client", "vlan", "box2"])
@pytest.mark.parametrize(("address", "seen"), [(plan.SITE4, plan.UPSTREAM4), (plan.SITE6, plan.UPSTREAM6)])
def test_addresses_and_datagrams_do_so_too(
    gateway: Ztun, sites: dict[str, Site], name: str, address: str, seen: str
) -> None:
    host = f"[{address}]" if ":" in address else address
    assert sites[name].fetch(f"http://{host}/")["client"] == seen
    answer = ask_udp(sites[name].namespace, address, plan.WHOAMI_PORT, b"who am I?")
    assert answer.split()[0].decode() == seen


def test_rules_ask_for_the_mac_address(lab: Lab, gateway: Ztun, sites: dict[str, Site]) -> None:
    # box1 may go past the proxy; the gateway itself does it, and the site sees the gateway.
    assert sites["box1"].fetch(f"http://{plan.SITE4}/")["client"] == plan.GATEWAY_WAN4
    assert sites["box1"].fetch(f"http://[{plan.SITE6}]/")["client"] == plan.GATEWAY_WAN6
    assert sites["box2"].fetch(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    # A name that only one of them may not have: its flow is refused, the other's is served.
    assert sites["box1"].fetch("http://blocked.test/")["client"] == plan.UPSTREAM4
    assert sites["box2"].is_refused("http://blocked.test/")


def test_rules_ask_for_the_interface(gateway: Ztun, sites: dict[str, Site]) -> None:
    assert sites["cable"].is_refused(f"http://{plan.SITE4}/")
    assert sites["vlan"].fetch(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    dials = {}
    for name in ("vlan", "cable"):
        before = gateway.status()["outbounds"]["http"]["dials"]
        assert sites[name].fetch("http://v4only.test/")["client"] == plan.UPSTREAM4
        dials[name] = gateway.status()["outbounds"]["http"]["dials"] - before
    assert dials == {"vlan": 1, "cable": 0}


def test_frames_on_the_trunk_carry_the_tag_both_ways(lab: Lab, gateway: Ztun, sites: dict[str, Site]) -> None:
    with lab.gateway.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
        with lab.gateway.entered():
            sock.bind(("trunk0", _ETH_P_ALL))
        sock.settimeout(5)
        sites["vlan"].fetch("http://site.test/", "-4")
        seen = {_look(sock) for _ in range(12)}
    assert {tag for tag, _ in seen} == {10}
    assert {outgoing for _, outgoing in seen} == {True, False}


def _look(sock: socket.socket) -> tuple[int, bool]:
    """The VLAN of the next frame, and whether it leaves."""
    _data, ancillary, _flags, address = sock.recvmsg(2048, 256)
    [tag] = [
        _AUXDATA.unpack(value)[5] for level, kind, value in ancillary if (level, kind) == (_SOL_PACKET, _PACKET_AUXDATA)
    ]
    return tag & 0xFFF, address[2] == _OUTGOING


def test_the_flows_say_where_their_clients_are(lab: Lab, gateway: Ztun, sites: dict[str, Site]) -> None:
    with (
        sites["box2"].namespace.connect(plan.SITE4, plan.ECHO_PORT),
        sites["vlan"].namespace.connect(plan.SITE6, plan.ECHO_PORT),
    ):
        flows = json.loads(gateway.command("status", "--flows", "--json", "--socket", str(gateway.socket_path)).stdout)
        rows = {flow["client"].rpartition(":")[0]: flow for flow in flows["flows"] if flow["protocol"] == "tcp"}
        for name, host in (("box2", sites["box2"].address4), ("vlan", f"[{sites['vlan'].address6}]")):
            assert (rows[host]["interface"], rows[host]["mac"]) == (sites[name].interface, sites[name].mac)
        shown = gateway.command("status", "--flows", "--socket", str(gateway.socket_path)).stdout
        assert f"br0 {sites['box2'].mac}" in shown


def test_containers_of_one_bridge_reach_each_other_past_the_gateway(gateway: Ztun, sites: dict[str, Site]) -> None:
    sites["box1"].namespace.run("ping", "-c1", "-W5", sites["box2"].address4)
    sites["box1"].namespace.run("ping", "-c1", "-W5", sites["box2"].address6)


def test_a_port_of_a_bridge_is_told_to_be_one(lab: Lab, sites: dict[str, Site]) -> None:
    instance = start(lab, {"capture": {"lan": ["lan0", "port1"]}})
    assert wait_until(lambda: "packets of a bridge's ports come in by the bridge" in instance.output)
    assert "capture br0" in instance.output
    reason = {"name": "port1", "state": "failed", "reason": "a port of br0: capture br0"}
    assert instance.status()["network"]["lan"] == [{"name": "lan0", "state": "up"}, reason]
    lab.gateway.ip("link set port1 nomaster")
    assert wait_until(lambda: instance.status()["network"]["lan"][1] == {"name": "port1", "state": "up"})
    lab.gateway.ip("link set port1 master br0")
    lab.stop()
