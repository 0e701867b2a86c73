"""capture.host while the network changes, and when the gateway dies."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from e2e.conftest import BACKENDS
from e2e.host_programs import await_exits, exits, fetches, lookup, page, start_on_host, url_of
from e2e.traffic import ask_udp, start
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until

BPF = ("tcx", "clsact")
SECOND4, SECOND_UPSTREAM4 = "10.21.0.1", "10.21.0.2"
SECOND6, SECOND_UPSTREAM6 = "fd10:21::1", "fd10:21::2"


@pytest.fixture
def second_uplink(lab: Lab) -> Iterator[None]:
    """wan1, as a laptop's second network: another cable to the same internet, without a default route as yet."""
    lab.stop()
    make_second_uplink(lab)
    yield
    lab.stop()
    lab.gateway.ip(
        f"route replace default via {plan.UPSTREAM4} dev wan0",
        f"route replace default via {plan.UPSTREAM6} dev wan0",
        "link del wan1",
    )


def make_second_uplink(lab: Lab) -> None:
    lab.gateway.ip(
        f"link add wan1 type veth peer name eth1 netns {lab.upstream.name}",
        f"address add {SECOND4}/24 dev wan1",
        f"address add {SECOND6}/64 dev wan1 nodad",
        "link set wan1 up",
    )
    lab.upstream.ip(
        f"address add {SECOND_UPSTREAM4}/24 dev eth1",
        f"address add {SECOND_UPSTREAM6}/64 dev eth1 nodad",
        "link set eth1 up",
    )


@pytest.mark.parametrize("backend", BPF)
def test_capture_follows_the_default_route(lab: Lab, second_uplink: None, backend: str) -> None:
    instance = start_on_host(lab, backend)
    await_exits(instance, {"wan0": [4, 6]})
    lab.gateway.ip(f"route replace default via {SECOND_UPSTREAM4} dev wan1")
    await_exits(instance, {"wan0": [6], "wan1": [4]})
    assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4
    assert page(lab, url_of(plan.DIRECT4))["client"] == SECOND4
    assert page(lab, url_of(plan.SITE6))["client"] == plan.UPSTREAM6

    lab.gateway.ip(f"route replace default via {SECOND_UPSTREAM6} dev wan1")
    await_exits(instance, {"wan1": [4, 6]})
    assert ("leave", "wan0") not in {(each["name"], each["ifname"]) for each in instance.routes()["programs"]}
    assert page(lab, url_of(plan.SITE6))["client"] == plan.UPSTREAM6

    # Gone, and made anew.
    lab.gateway.ip("link del wan1")
    await_exits(instance, {})
    make_second_uplink(lab)
    lab.gateway.ip(f"route add default via {SECOND_UPSTREAM4} dev wan1")
    await_exits(instance, {"wan1": [4]})
    assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4


def test_every_default_route_is_a_way_out(lab: Lab, second_uplink: None) -> None:
    """Also one with a higher metric: who binds an interface leaves by it, and is answered there."""
    instance = start_on_host(lab, "tcx")
    lab.gateway.ip(f"route add default via {SECOND_UPSTREAM4} dev wan1 metric 600")
    await_exits(instance, {"wan0": [4, 6], "wan1": [4]})
    for interface in ("wan0", "wan1"):
        assert page(lab, url_of(plan.SITE4), "--interface", interface)["client"] == plan.UPSTREAM4
    assert page(lab, url_of(plan.DIRECT4), "--interface", "wan1")["client"] == SECOND4
    # A VPN that covers it with longer prefixes: what leaves by the old one is the VPN itself.
    for half in ("0.0.0.0/1", "128.0.0.0/1"):
        lab.gateway.ip(f"route add {half} via {SECOND_UPSTREAM4} dev wan1")
    await_exits(instance, {"wan0": [6], "wan1": [4]})


# Only answers come in, and only where their questions went; what leaves is masqueraded, as Docker does it.
FIREWALL = """
table inet strict {
    chain input {
        type filter hook input priority 0; policy drop;
        iifname { lo, lan0 } accept
        iifname wan0 ct state established,related accept
        iifname wan0 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        iifname ztun0 ct state established accept
        counter
    }
    chain leaving { type nat hook postrouting priority 100; oifname wan0 masquerade; }
}
"""


def test_a_firewall_and_a_strict_reverse_path_filter_mind_nothing(lab: Lab) -> None:
    lab.stop()
    lab.gateway.run("nft", "-f", "-", input=FIREWALL)
    lab.gateway.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1", "net.ipv4.conf.wan0.rp_filter=1")
    try:
        start_on_host(lab, "tcx")
        assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4
        assert page(lab, url_of(plan.SITE6))["client"] == plan.UPSTREAM6
        assert page(lab, "http://site.test/")["client"] == plan.UPSTREAM4
        assert page(lab, url_of(plan.DIRECT4))["client"] == plan.GATEWAY_WAN4
        assert ask_udp(lab.gateway, plan.SITE4, plan.ECHO_PORT, b"through") == b"through"
        assert lookup(lab, f"@{plan.UPSTREAM4}", "direct.test") == [plan.DIRECT4]
    finally:
        lab.gateway.run("nft", "delete", "table", "inet", "strict")
        lab.gateway.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.wan0.rp_filter=0")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_there_before_goes_on_and_all_is_open_when_it_is_killed(lab: Lab, backend: str) -> None:
    """A connection such as the one by which ztun is being started."""
    lab.stop()
    with lab.gateway.connect(plan.SITE4, plan.ECHO_PORT) as outgoing:
        for number in range(3):
            if number == 1:
                instance = start_on_host(lab, backend)
                assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4
            if number == 2:
                instance.stop(signal.SIGKILL)
            outgoing.sendall(b"still there?")
            assert outgoing.recv(100) == b"still there?"
    assert wait_until(lambda: fetches(lab, url_of(plan.SITE4)), timeout=10)
    assert page(lab, url_of(plan.SITE4))["client"] == plan.GATEWAY_WAN4
    assert lookup(lab, f"@{plan.UPSTREAM4}", "site.test") == [plan.SITE4]


@pytest.mark.parametrize("backend", ["clsact", "routes"])
def test_closed_when_it_is_killed(lab: Lab, backend: str) -> None:
    instance = start_on_host(lab, backend, capture={"fail": "closed"})
    assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4
    instance.stop(signal.SIGKILL)
    with lab.watching(lab.gateway, "wan0") as packets:
        assert not fetches(lab, url_of(plan.SITE4), "--max-time", "1")
    assert not [one for one in packets if one[0] >> 4 == 4 and one[16:20] == socket.inet_aton(plan.SITE4)]
    assert page(lab, url_of(plan.DIRECT4))["client"] == plan.GATEWAY_WAN4
    # The next one takes over what the dead one left, and removes it when it ends.
    again = start_on_host(lab, backend)
    assert page(lab, url_of(plan.SITE4))["client"] == plan.UPSTREAM4
    assert again.stop() == 0
    assert page(lab, url_of(plan.SITE4))["client"] == plan.GATEWAY_WAN4
    assert "ztun" not in lab.gateway.run("tc", "filter", "show", "dev", "wan0", "egress").stdout
    assert "from 0.0.0.0" not in lab.gateway.run("ip", "rule").stdout


def test_a_laptop_needs_no_lan(lab: Lab) -> None:
    """`ztun up --proxy … --host`, with everything but the neighbours through the proxy."""
    lab.stop()
    instance = lab.prepare()
    proxy = f"socks5://{plan.UPSTREAM4}:{plan.SOCKS_PORT}"
    socket_path = str(instance.socket_path)
    instance.launch("up", "--proxy", proxy, "--host", "--socket", socket_path, env=environment(instance.directory))
    instance.wait_ready()
    assert wait_until(lambda: "captures  this host, by " in instance.output), instance.output
    await_exits(instance, {"wan0": [4, 6]})
    assert page(lab, url_of(plan.DIRECT4))["client"] == plan.UPSTREAM4
    assert page(lab, "http://direct.test/")["client"] == plan.UPSTREAM4
    assert page(lab, url_of(plan.UPSTREAM4))["client"] == plan.GATEWAY_WAN4
    assert instance.stop() == 0


def environment(directory: object) -> dict[str, str]:

    return os.environ | {"ZTUN_DNS__FAKE_IP__STORE": f"{directory}/fake-ip.db"}


def test_nothing_is_attached_unless_it_is_asked_for(lab: Lab) -> None:
    instance = start(lab, {"route": {"default": "socks"}})
    assert exits(instance) == {}
    assert page(lab, url_of(plan.SITE4))["client"] == plan.GATEWAY_WAN4
    assert {each["ifname"] for each in instance.routes()["programs"]} <= {"lan0", "ztun0"}
