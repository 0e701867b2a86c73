"""Interfaces that come, go and are renamed, uplinks that change, addresses that move: under traffic, on a real kernel.

A change is followed within SOON seconds. On a quiet machine it is a tenth of that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.conftest import BASE
from e2e.traffic import ask_udp, read_exactly, start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot

SOON = 1.0
BACKENDS = pytest.mark.parametrize("backend", ["tcx", "clsact", "routes"])
# A second uplink: its own network, the same upstream.
WAN1_4, WAN1_6, NEXT4, NEXT6 = "10.30.0.1", "fd10:30::1", "10.30.0.2", "fd10:30::2"
PROXIED = f"http://{plan.SITE4}/"


def make_lan(lab: Lab) -> None:
    """lan0 and the client's end of it, as the lab makes them."""
    lab.gateway.ip(
        f"link add lan0 type veth peer name eth0 netns {lab.client.name}",
        f"address add {plan.GATEWAY_LAN4}/24 dev lan0",
        f"address add {plan.GATEWAY_LAN6}/64 dev lan0 nodad",
        "link set lan0 up",
    )
    lab.client.ip(
        *(f"address add {address}/24 dev eth0" for address in (plan.CLIENT4, plan.CLIENT4_OTHER)),
        *(f"address add {address}/64 dev eth0 nodad" for address in (plan.CLIENT6, plan.CLIENT6_OTHER)),
        "link set eth0 up",
        f"route add default via {plan.GATEWAY_LAN4} src {plan.CLIENT4}",
        f"route add default via {plan.GATEWAY_LAN6} src {plan.CLIENT6}",
    )


def set_wan_up(lab: Lab) -> None:
    """What somebody has to do after `ip link set wan0 down`: IPv6 addresses and routes went with it."""
    lab.gateway.ip(
        "link set wan0 up",
        f"address replace {plan.GATEWAY_WAN4}/24 dev wan0",
        f"address replace {plan.GATEWAY_WAN6}/64 dev wan0 nodad",
        f"route replace default via {plan.UPSTREAM4}",
        f"route replace default via {plan.UPSTREAM6}",
    )


def set_upstream_up(lab: Lab) -> None:
    """The same for the other end of it."""
    lab.upstream.ip(
        "link set eth0 up",
        f"address replace {plan.UPSTREAM6}/64 dev eth0 nodad",
        f"route replace 10.10.0.0/16 via {plan.GATEWAY_WAN4}",
        f"route replace fd10:10::/32 via {plan.GATEWAY_WAN6}",
    )


def add_uplink(lab: Lab) -> None:
    lab.gateway.ip(
        f"link add wan1 type veth peer name eth1 netns {lab.upstream.name}",
        f"address add {WAN1_4}/24 dev wan1",
        f"address add {WAN1_6}/64 dev wan1 nodad",
        "link set wan1 up",
    )
    lab.upstream.ip(
        f"address add {NEXT4}/24 dev eth1",
        f"address add {NEXT6}/64 dev eth1 nodad",
        "link set eth1 up",
    )


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def lab(module_lab: Lab) -> Iterator[Lab]:
    """The laboratory, its interfaces put right again afterwards."""
    lab = module_lab
    yield lab
    for instance in lab.running():
        instance.kill()
    links = {name for _, name in _links(lab)}
    for name in links & {"lan0", "lan9", "wan1", "ztun0"}:
        lab.gateway.ip(f"link del {name}")
    lab.gateway.ip("address flush dev wan0")
    make_lan(lab)
    set_wan_up(lab)
    set_upstream_up(lab)


def _links(lab: Lab) -> list[tuple[int, str]]:
    with lab.gateway.entered():
        return socket.if_nameindex()


def on(backend: str, **sections: Any) -> dict[str, Any]:
    return {**BASE, "capture": {"backend": backend, "lan": ["lan0"]}, **sections}


def lan_states(instance: Ztun) -> dict[str, str]:
    return {each["name"]: each["state"] for each in instance.status()["network"]["lan"]}


def soon(condition: Callable[[], object], seconds: float = SOON) -> None:
    assert wait_until(condition, seconds)


def seen_as(lab: Lab, address: str = plan.SITE4) -> str | None:
    """Who the server says we are; None when it is not reached within a second."""
    done = lab.curl(f"http://{address}/", check=False, timeout=1)
    if done.returncode:
        return None
    client: str = json.loads(done.stdout)["client"]
    return client


def error_of_datagram(lab: Lab, address: str) -> int:
    """The ICMP error that comes back for a datagram; those of networks and hosts are told to who asks (ip(7))."""
    with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        sock.settimeout(2)
        sock.connect((address, plan.ECHO_PORT))
        sock.send(b"x")
        with pytest.raises(OSError) as raised:
            sock.recv(100)
    return raised.value.errno or 0


def programs(instance: Ztun) -> list[tuple[str, str]]:
    return sorted((each["name"], each["ifname"]) for each in instance.routes()["programs"])


# Interfaces of the LAN.


@BACKENDS
def test_renamed_away_is_let_go_and_renamed_back_is_captured(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    assert seen_as(lab) == plan.UPSTREAM4
    had = programs(instance)

    lab.gateway.ip("link set lan0 name lan9")

    soon(lambda: lan_states(instance) == {"lan0": "absent"})
    assert seen_as(lab) == plan.CLIENT4
    assert "lan9" not in dict(programs(instance)).values()
    assert "ztun" not in lab.gateway.run("tc", "filter", "show", "dev", "lan9", "ingress").stdout

    lab.gateway.ip("link set lan9 name lan0")

    soon(lambda: lan_states(instance) == {"lan0": "up"})
    assert seen_as(lab) == plan.UPSTREAM4
    assert programs(instance) == had
    shown = instance.command("status", "--socket", str(instance.socket_path)).stdout
    assert f"network up, out by wan0 {plan.GATEWAY_WAN4}, wan0 {plan.GATEWAY_WAN6}, LAN lan0 up" in shown
    assert instance.output.count("no interface of this name") == 1


@BACKENDS
def test_made_anew_is_captured_again_and_a_download_goes_on(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    path = lab.file(64)
    with lab.client.connect(plan.SITE4, plan.HTTP_PORT, timeout=30) as sock:
        sock.sendall(f"GET /files/{path.name} HTTP/1.0\r\n\r\n".encode())
        received = len(read_exactly(sock, 1 << 20))

        lab.gateway.ip("link del lan0")
        soon(lambda: lan_states(instance) == {"lan0": "absent"})
        make_lan(lab)

        soon(lambda: lan_states(instance) == {"lan0": "up"})
        assert seen_as(lab) == plan.UPSTREAM4
        while data := sock.recv(1 << 20):
            received += len(data)
    assert received > 64 << 20
    assert instance.status()["network"]["state"] == "up"


@BACKENDS
def test_absent_at_the_start_it_is_waited_for(lab: Lab, backend: str) -> None:
    lab.gateway.ip("link del lan0")
    instance = start(lab, on(backend))
    assert lan_states(instance) == {"lan0": "absent"}
    assert "no interface lan0 yet" in instance.output

    make_lan(lab)

    soon(lambda: lan_states(instance) == {"lan0": "up"})
    assert seen_as(lab) == plan.UPSTREAM4
    # It answers DNS on the addresses that came with it.
    soon(lambda: lab.dig("site.test", "A", check=False).startswith("198.18."))
    assert instance.output.count("no interface of this name") == 1


@BACKENDS
def test_down_at_the_start_it_is_captured_once_it_is_up(lab: Lab, backend: str) -> None:
    lab.gateway.ip("link set lan0 down")
    instance = start(lab, on(backend, dns={"listen": [f"{plan.GATEWAY_LAN4}:53"]}))
    assert lan_states(instance) == {"lan0": "down"}

    lab.gateway.ip("link set lan0 up", f"address replace {plan.GATEWAY_LAN6}/64 dev lan0 nodad")

    soon(lambda: lan_states(instance) == {"lan0": "up"})
    soon(lambda: seen_as(lab) == plan.UPSTREAM4, 5)


# Uplinks.


@BACKENDS
def test_without_an_uplink_clients_are_told_at_once(lab: Lab, backend: str) -> None:
    """The dial time-out is 10 s; nobody waits for it, neither who was waiting nor who comes now."""
    instance = start(lab, on(backend, timeouts={"dial": 10}))
    ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"x")
    with waiting_dial(lab, plan.SILENT4) as told:
        lab.gateway.ip("link set wan0 down")
        soon(told)
    soon(lambda: instance.status()["network"]["state"] == "paused")
    status = instance.status()
    assert status["network"]["egress"] == []
    assert status["udp"]["active"] == 0

    started = time.monotonic()
    with pytest.raises(OSError, match="nreachable"):
        lab.client.connect(plan.SITE4, plan.HTTP_PORT)
    assert error_of_datagram(lab, plan.SITE4) in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    assert time.monotonic() - started < SOON

    set_wan_up(lab)

    soon(lambda: instance.status()["network"]["state"] == "up")
    assert seen_as(lab) == plan.UPSTREAM4
    assert ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"y") == b"y"
    assert "Traceback" not in instance.output


def test_without_a_carrier_as_well(lab: Lab) -> None:
    """The routes are still there, so the kernel says nothing. It takes up to a second to notice itself."""
    instance = start(lab, on("tcx", timeouts={"dial": 10}))
    with waiting_dial(lab, plan.SILENT4) as told:
        lab.upstream.ip("link set eth0 down")
        soon(told, 1 + SOON)
    assert instance.status()["network"]["state"] == "paused"
    started = time.monotonic()
    for address in (plan.SITE4, plan.SITE6):
        with pytest.raises(OSError, match="nreachable"):
            lab.client.connect(address, plan.HTTP_PORT)
    with pytest.raises(OSError, match="nreachable"):  # by the outbound `direct`
        lab.client.connect(plan.SITE4, plan.ECHO_PORT)
    assert time.monotonic() - started < SOON

    set_upstream_up(lab)

    soon(lambda: instance.status()["network"]["state"] == "up", 1 + SOON)
    soon(lambda: seen_as(lab) == plan.UPSTREAM4)


def test_of_two_uplinks_one_without_a_carrier(lab: Lab) -> None:
    """What needs that one fails at once, and the rest goes on: no pause."""
    add_uplink(lab)
    lab.gateway.ip(f"route replace default via {NEXT4}")
    instance = start(lab, {**BASE, "timeouts": {"dial": 10}})

    lab.upstream.ip("link set eth0 down")

    soon(lambda: "down" in {way["state"] for way in instance.status()["network"]["egress"]}, 1 + SOON)
    assert instance.status()["network"]["state"] == "up"
    started = time.monotonic()
    with pytest.raises(OSError, match="No route to host"):  # by a proxy on its network
        lab.client.connect(plan.SITE4, plan.HTTP_PORT)
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT) as sock:  # by the outbound `direct`
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
    assert time.monotonic() - started < SOON


def test_a_connection_outlives_a_short_loss_of_the_link(lab: Lab) -> None:
    instance = start(lab, BASE)
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=30) as sock:
        assert sock.recv(100)
        lab.gateway.ip("link set wan0 down")
        soon(lambda: instance.status()["network"]["state"] == "paused")
        sock.sendall(b"sent without a link")
        set_wan_up(lab)
        assert sock.recv(100) == b"sent without a link"


def test_another_default_route_moves_flows_to_the_other_uplink(lab: Lab) -> None:
    """A connection from the old uplink's address would be answered by nobody on the new one."""
    add_uplink(lab)
    instance = start(lab, BASE)
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=5) as sock:
        sock.sendall(b"before")
        assert sock.recv(100) == b"before"

        lab.gateway.ip(f"route replace default via {NEXT4}")

        started = time.monotonic()
        with pytest.raises(ConnectionResetError):
            sock.recv(100)
        assert time.monotonic() - started < SOON
    egress = {way["to"]: (way["interface"], way["address"]) for way in instance.status()["network"]["egress"]}
    assert egress["ipv4"] == ("wan1", WAN1_4)
    assert egress["socks"] == ("wan0", plan.GATEWAY_WAN4)
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT) as sock:
        sock.sendall(b"after")
        assert sock.recv(100) == b"after"
    soon(lambda: (plan.ECHO_PORT, WAN1_4) in [(entry["port"], entry["peer"]) for entry in lab.journal()])


def test_a_default_route_that_goes_back_and_forth_under_traffic(lab: Lab) -> None:
    add_uplink(lab)
    instance = start(lab, BASE)
    stop, done = threading.Event(), [0, 0]

    def load() -> None:
        while not stop.is_set():
            try:
                with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=2) as sock:
                    sock.sendall(b"x")
                    done[sock.recv(1) == b"x"] += 1
            except OSError:
                done[0] += 1

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            lab.gateway.ip(f"route replace default via {NEXT4 if number % 2 == 0 else plan.UPSTREAM4}")
            time.sleep(0.15)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    failed, served = done
    assert served > 100
    assert failed < served / 10
    soon(lambda: {way["interface"] for way in instance.status()["network"]["egress"]} == {"wan0"})
    assert seen_as(lab) == plan.UPSTREAM4
    soon(lambda: instance.status()["tcp"]["active"] == 0, 5)


@BACKENDS
def test_another_address_of_the_uplink(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    assert ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"before") == b"before"
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=5) as sock:
        assert sock.recv(100)

        lab.gateway.ip(
            f"address del {plan.GATEWAY_WAN4}/24 dev wan0",
            "address add 10.20.0.7/24 dev wan0",
            f"route replace default via {plan.UPSTREAM4}",
        )

        started = time.monotonic()
        with pytest.raises(ConnectionResetError):
            sock.recv(100)
        assert time.monotonic() - started < SOON
    assert seen_as(lab) == plan.UPSTREAM4
    soon(lambda: {way["address"] for way in instance.status()["network"]["egress"]} >= {"10.20.0.7"})
    # The association went with its control connection, and there is another.
    assert ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"after") == b"after"


@BACKENDS
def test_own_addresses_and_networks_are_known_at_once(lab: Lab, backend: str) -> None:
    """What was a site behind the proxy is a host of our own network now; and back."""
    instance = start(lab, on(backend))
    assert verdict_of(instance, "203.0.113.0/24") == "tunnel"

    lab.gateway.ip("address add 203.0.113.1/25 dev wan0")
    soon(lambda: verdict_of(instance, "203.0.113.0/25") == "direct")

    lab.gateway.ip("address del 203.0.113.1/25 dev wan0")
    soon(lambda: verdict_of(instance, "203.0.113.0/25") is None)


def verdict_of(instance: Ztun, prefix: str) -> str | None:
    entries = [entry for table in instance.routes()["maps"] for entry in table["entries"]]
    return next((entry["verdict"] for entry in entries if entry.get("prefix") == prefix), None)


# Storms, and the end.


@BACKENDS
def test_two_hundred_flaps_end_well(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    assert seen_as(lab) == plan.UPSTREAM4
    before = figures(instance)

    started = time.monotonic()
    lab.gateway.ip(*["link set lan0 down", "link set lan0 up", "link set wan0 down", "link set wan0 up"] * 100)
    lab.gateway.ip(f"address replace {plan.GATEWAY_LAN6}/64 dev lan0 nodad")
    set_wan_up(lab)

    soon(lambda: lan_states(instance) == {"lan0": "up"})
    soon(lambda: instance.status()["network"]["state"] == "up")
    soon(lambda: seen_as(lab) == plan.UPSTREAM4, 5)
    lasted = time.monotonic() - started
    after = figures(instance)
    assert after["cpu"] - before["cpu"] < 0.5 + 0.6 * lasted
    soon(lambda: {**figures(instance), "cpu": 0} == {**before, "cpu": 0})
    assert "Traceback" not in instance.output


@BACKENDS
def test_an_interface_that_is_made_anew_many_times_leaks_nothing(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    assert seen_as(lab) == plan.UPSTREAM4
    before = figures(instance)
    for _ in range(10):
        lab.gateway.ip("link del lan0")
        make_lan(lab)
    soon(lambda: lan_states(instance) == {"lan0": "up"})
    soon(lambda: seen_as(lab) == plan.UPSTREAM4, 5)
    soon(lambda: {**figures(instance), "cpu": 0} == {**before, "cpu": 0})


def figures(instance: Ztun) -> dict[str, Any]:
    """CPU time in seconds, descriptors and BPF objects, when none of its threads has something open for a moment."""
    with contextlib.suppress(FileNotFoundError):
        return _figures(instance)
    return figures(instance)


def _figures(instance: Ztun) -> dict[str, Any]:
    fields = Path(f"/proc/{instance.pid}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    descriptors = sum("socket:" not in _link(path) for path in Path(f"/proc/{instance.pid}/fd").iterdir())
    return {"cpu": cpu, "descriptors": descriptors, **{k: len(v) for k, v in instance.bpf_ids().items()}}


def _link(path: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


@BACKENDS
def test_killed_after_changes_it_leaves_nothing(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    lab.gateway.ip("link del lan0")
    make_lan(lab)
    soon(lambda: lan_states(instance) == {"lan0": "up"})
    soon(lambda: seen_as(lab) == plan.UPSTREAM4, 3)
    instance.kill()
    soon(lambda: seen_as(lab) == plan.CLIENT4, 1.5)  # `fail: open`
    again = lab.ztun(on(backend, control={"socket": str(instance.socket_path)}))  # sweeps
    assert again.stop() == 0
    shown = snapshot(lab.gateway)
    assert [line for line in differences({}, shown) if "ztun0" in line or "proto 122" in line] == []
    assert "bpf" not in lab.gateway.run("tc", "filter", "show", "dev", "lan0", "ingress").stdout


# The TUN itself.


@BACKENDS
def test_a_tun_that_is_set_down_is_set_up_again(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    assert seen_as(lab) == plan.UPSTREAM4
    for times, down in enumerate((["link set ztun0 down"], ["link set ztun0 down", "link set ztun0 up"]), start=1):
        lab.gateway.ip(*down)
        soon(lambda: instance.output.count("somebody set the TUN down") == times)  # noqa: B023
        soon(lambda: seen_as(lab, plan.SITE4) == plan.UPSTREAM4, 3)
        soon(lambda: lab.page(f"http://[{plan.SITE6}]/")["client"] == plan.UPSTREAM6, 3)
        assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    addresses = lab.gateway.run("ip", "-brief", "address", "show", "ztun0").stdout
    assert "198.18.0.1/15" in addresses
    assert "2001:2::1/48" in addresses


@BACKENDS
def test_a_tun_that_is_removed_is_made_again_and_flows_go_on(lab: Lab, backend: str) -> None:
    instance = start(lab, on(backend))
    path = lab.file(64)
    before = figures(instance)
    with lab.client.connect(plan.SITE4, plan.HTTP_PORT, timeout=30) as sock:
        sock.sendall(f"GET /files/{path.name} HTTP/1.0\r\n\r\n".encode())
        received = len(read_exactly(sock, 1 << 20))
        for times in range(1, 4):
            lab.gateway.ip("link del ztun0")
            soon(lambda times=times: instance.output.count("made it again") == times)
            received += len(read_exactly(sock, 1 << 20))
        while data := sock.recv(1 << 20):
            received += len(data)
    assert received > 64 << 20
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert lab.page(f"http://[{plan.SITE6}]/")["client"] == plan.UPSTREAM6
    assert instance.output.count("somebody removed the TUN, made it again") == 3
    soon(lambda: {**figures(instance), "cpu": 0} == {**before, "cpu": 0})


@BACKENDS
def test_a_tun_that_is_removed_while_it_is_made_again_is_made_once_more(lab: Lab, backend: str) -> None:
    """Each time as soon as the kernel lists it, which is before its addresses and routes are back."""
    instance = start(lab, on(backend))
    for _ in range(6):
        assert wait_until(lambda: "ztun0" in {name for _, name in _links(lab)}, interval=0.001)
        lab.gateway.ip("link del ztun0")
    assert wait_until(lambda: lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6))
    assert instance.status()["state"] == "running"


@contextlib.contextmanager
def waiting_dial(lab: Lab, address: str) -> Iterator[Callable[[], bool]]:
    """A client that connects to somebody who does not answer; yields whether it was told that it is in vain."""
    with lab.client.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((address, plan.HTTP_PORT))
        time.sleep(0.3)
        yield lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0
