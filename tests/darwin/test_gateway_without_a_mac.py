"""The whole gateway with its macOS part, on Linux: packets come in utun's framing over a pair of sockets, from a real
client through a TUN bridge, and leave through real proxies. No Mac was there: see stand_in.py for what plays macOS.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e.conftest import BASE, OUTBOUNDS
from e2e.test_datagram_runs import PORT as TOGETHER_PORT
from e2e.test_datagram_runs import hear, numbered, send_together, udp_socket
from e2e.traffic import ask_udp, download, echo_flow, read_all, read_exactly, upload
from open_to_all import OPEN_TO_ALL

from darwin.conftest import UTUN, DarwinLab, ZtunAsDarwin
from ztun.lab import plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import complete
from ztun.wire import checksum

SITES = pytest.mark.parametrize("site", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])
# Everything through a proxy, but one network; the routes of this host are taken over, too.
EVERYTHING: dict[str, Any] = {
    "route": {
        "rules": [
            {"ip_cidr": [plan.DIRECT4, plan.DIRECT6], "outbound": "direct"},
            {"ip_cidr": [plan.BLOCKED4, plan.BLOCKED6], "outbound": "block"},
            {"domain": ["shared.test"], "outbound": "direct"},
        ],
        "default": "socks-udp",
    },
    "outbounds": OUTBOUNDS,
    "timeouts": {"dial": 3, "drain": 0.2},
}


@pytest.fixture
def everything(lab: DarwinLab) -> ZtunAsDarwin:
    return _running(lab, EVERYTHING)


@pytest.fixture
def rules(lab: DarwinLab) -> ZtunAsDarwin:
    return _running(lab, BASE)


def _running(lab: DarwinLab, config: dict[str, Any]) -> ZtunAsDarwin:
    """The gateway on these rules that an earlier test left running, or a new one."""
    alike = [one for one in lab.running() if one.config["route"]["rules"] == config["route"]["rules"]]
    return alike[0] if alike else _started(lab, config)  # type: ignore[return-value]


def _started(lab: DarwinLab, config: dict[str, Any]) -> ZtunAsDarwin:
    lab.stop()
    return lab.ztun(config)


# What clients see.


@pytest.mark.parametrize("family", ["-4", "-6"])
@pytest.mark.parametrize("url", ["http://site.test/", "https://secure.test/", "http://web.test/"])
def test_pages_of_names_come_through_proxies(lab: DarwinLab, rules: ZtunAsDarwin, family: str, url: str) -> None:
    page = lab.page(url, family)
    assert page["host"] == url.split("/")[2]
    assert page["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)


@SITES
def test_megabytes_both_ways_are_the_same_bytes(lab: DarwinLab, rules: ZtunAsDarwin, site: str) -> None:
    with lab.client.connect(site, plan.DIGEST_PORT) as sock:
        answer, wanted = upload(sock, 4)
    assert answer == wanted
    path = lab.file(4)
    with lab.client.connect(site, plan.HTTP_PORT) as sock:
        size, _ = download(sock, f"/files/{path.name}", "site.test")
    assert size == 4 << 20
    with lab.client.connect(site, plan.ECHO_PORT) as sock:
        assert echo_flow(sock, 1 << 20)


@SITES
@pytest.mark.parametrize("size", [0, 1200, 1473, 8000])
def test_datagrams_come_back_whole(lab: DarwinLab, rules: ZtunAsDarwin, site: str, size: int) -> None:
    payload = bytes(number % 251 for number in range(size))
    assert ask_udp(lab.client, site, plan.ECHO_PORT, payload) == payload


@pytest.mark.parametrize("site", [plan.SITE4, plan.SITE6, plan.SHARED4, plan.SHARED6])
def test_datagrams_that_travel_together_are_cut_where_utun_begins(
    lab: DarwinLab, rules: ZtunAsDarwin, site: str
) -> None:
    """There is no UDP segmentation offload: the kernel cuts before the utun, and ztun before it writes (SHARED: what a
    server sends together comes to the outbound `direct` in one piece)."""
    payloads = numbered([1200] * 20 + [77])
    with udp_socket(lab.upstream, site) as server, udp_socket(lab.client, site) as sock:
        server.bind((site, TOGETHER_PORT))
        sock.sendto(b"hello", (site, TOGETHER_PORT))
        _, client = server.recvfrom(100)
        send_together(server, payloads, client)
        assert hear(sock, 21) == payloads
        with lab.watching(lab.gateway, UTUN) as packets:
            send_together(sock, payloads, (site, TOGETHER_PORT))
            assert hear(server, 21) == payloads
            send_together(server, payloads, client)
            assert hear(sock, 21) == payloads
    assert len(packets) >= 42
    assert max(map(len, packets)) <= 1500


def test_hundreds_of_flows_at_once_and_clients_that_vanish(lab: DarwinLab, rules: ZtunAsDarwin) -> None:
    """Of the flows of both families some end without a word; the others do not notice, and their echo is whole."""
    dials = [lab.client.socket(family) for family in (socket.AF_INET, socket.AF_INET6) for _ in range(150)]
    try:
        for number, sock in enumerate(dials):
            sock.setblocking(False)
            sock.connect_ex((plan.SITE4 if number < 150 else plan.SITE6, plan.BANNER_PORT))
        for sock in dials:
            sock.settimeout(20)
            assert sock.recv(100) == b"220 lab ready\r\n"
        assert rules.status()["tcp"]["active"] >= 300
        words = "type filter hook output priority 0; tcp flags & (fin | rst) != 0 drop;"
        lab.client.run("nft", f"table inet silence {{ chain c {{ {words} }}; }}")
        for sock in dials[::3]:
            sock.close()
        rest = [sock for sock in dials if sock.fileno() >= 0]
        assert len(rest) == 200
        for number, sock in enumerate(rest):
            sock.sendall(str(number).encode() * 500)
        for number, sock in enumerate(rest):
            assert read_exactly(sock, 500 * len(str(number))) == str(number).encode() * 500
    finally:
        lab.client.run("nft", "delete", "table", "inet", "silence", check=False)
        for sock in dials:
            sock.close()
    assert rules.status()["tcp"]["active"] >= 100  # nobody told of their end
    assert lab.page("http://site.test/", "-4")["host"] == "site.test"


@pytest.mark.parametrize("type", ["A", "AAAA"])
def test_dig_gets_a_fake_ip_that_answers_ping(lab: DarwinLab, rules: ZtunAsDarwin, type: str) -> None:
    address = lab.dig("site.test", type)
    assert address.startswith(("198.18.", "198.19.", "2001:2:"))
    assert "2 received" in lab.client.run("ping", "-c2", "-i0.05", "-W2", "-s1000", address).stdout


def test_direct_names_pass_ztun_by(lab: DarwinLab, rules: ZtunAsDarwin) -> None:
    assert lab.dig("direct.test") == plan.DIRECT4
    with lab.watching(lab.gateway, UTUN) as seen:
        assert lab.page("http://direct.test/", "-4")["client"] == plan.CLIENT4
    assert not any(socket.inet_aton(plan.DIRECT4) in packet for packet in seen)


def test_a_utun_that_goes_away_is_made_again(lab: DarwinLab, rules: ZtunAsDarwin) -> None:
    """macOS has no command for that; the stand-in removes it on a signal."""
    assert lab.page("http://site.test/", "-4")["host"] == "site.test"
    before = _descriptors(rules)
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT) as four, lab.client.connect(plan.SITE6, plan.ECHO_PORT) as six:
        flows = (four, six)
        assert [_echo(flow, b"before") for flow in flows] == [b"before"] * 2
        for times in (1, 2):
            os.kill(rules.pid, signal.SIGUSR2)
            assert wait_until(lambda: rules.output.count("made it again") == times, 10), rules.output  # noqa: B023
            assert [_echo(flow, b"after") for flow in flows] == [b"after"] * 2
    assert wait_until(lambda: _descriptors(rules) == before, 10)
    assert lab.page("http://site.test/", "-4")["host"] == "site.test"


def _echo(sock: socket.socket, data: bytes) -> bytes:
    sock.settimeout(10)
    sock.sendall(data)
    return sock.recv(100)


def _descriptors(instance: ZtunAsDarwin) -> int:
    """How many are open, but those of flows to proxies, which come and go."""
    found = []
    for path in Path(f"/proc/{instance.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(path))
    return len([target for target in found if not target.startswith("socket:")])


# Everything comes by the routes, and the classifier decides.


def test_what_is_direct_is_carried_by_a_socket_of_ours(lab: DarwinLab, everything: ZtunAsDarwin) -> None:
    """It cannot go back to the kernel from a utun: the server sees the gateway, where on Linux it sees the client."""
    before = everything.routes()["counters"]["direct"]["packets"]
    page = json.loads(lab.curl(f"http://{plan.DIRECT4}/").stdout)
    assert page["client"] == plan.GATEWAY_WAN4
    page = json.loads(lab.curl(f"http://[{plan.DIRECT6}]/").stdout)
    assert page["client"] == plan.GATEWAY_WAN6
    assert ask_udp(lab.client, plan.DIRECT4, plan.WHOAMI_PORT, b"?").split()[0].decode() == plan.GATEWAY_WAN4
    assert everything.routes()["counters"]["direct"]["packets"] > before


def test_a_direct_name_is_direct_though_its_address_comes_by_the_routes(
    lab: DarwinLab, everything: ZtunAsDarwin
) -> None:
    """No rule speaks of its address, which goes to the proxy for who does not ask for the name."""
    with lab.client.connect(plan.SHARED4, plan.HTTP_PORT) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\nHost: x\r\n\r\n")
        assert plan.UPSTREAM4.encode() in read_all(sock)
    assert lab.dig("shared.test") == plan.SHARED4
    assert lab.page("http://shared.test/", "-4")["client"] == plan.GATEWAY_WAN4
    learned = next(one for one in everything.routes()["maps"] if one["name"] == "learned4")["entries"]
    assert [(one["address"], one["verdict"]) for one in learned] == [(plan.SHARED4, "direct")]
    assert learned[0]["hits"] > 3


def test_own_sockets_do_not_come_back_by_the_routes(lab: DarwinLab, everything: ZtunAsDarwin) -> None:
    """Half of the addresses each go into the utun, that of the proxy too; only bound sockets get out."""
    destinations = {route["destination"] for route in everything.routes()["routes"]}
    assert {"0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"} <= destinations
    with lab.watching(lab.gateway, UTUN) as seen:
        page = json.loads(lab.curl(f"http://{plan.SITE4}/").stdout)
    assert page["client"] == plan.UPSTREAM4
    assert not any(packet[12:16] == socket.inet_aton(plan.GATEWAY_WAN4) for packet in seen if packet[0] >> 4 == 4)


def test_what_is_blocked_is_dropped_and_counted(lab: DarwinLab, everything: ZtunAsDarwin) -> None:
    before = everything.routes()["counters"]["drop_rule"]["packets"]
    for address in (plan.BLOCKED4, plan.BLOCKED6):
        with pytest.raises(TimeoutError):
            lab.client.connect(address, plan.HTTP_PORT, timeout=0.3)
    assert everything.routes()["counters"]["drop_rule"]["packets"] >= before + 2


def test_queries_to_any_resolver_are_answered_by_ztun(lab: DarwinLab, everything: ZtunAsDarwin) -> None:
    for resolver in (plan.RESOLVER_ELSEWHERE4, plan.RESOLVER_ELSEWHERE6, "192.0.2.1"):
        assert lab.dig("site.test", f"@{resolver}").startswith("198.1")


# What the commands say.


def test_routes_and_status_have_the_same_form(lab: DarwinLab, everything: ZtunAsDarwin) -> None:
    shown = everything.routes()
    assert shown["backend"] == "python"
    assert shown["programs"] == [{"name": "classify", "hook": "python", "ifname": UTUN, "id": 0}]
    names = [table["name"] for table in shown["maps"]]
    assert names == ["settings", "prefixes4", "prefixes6", "learned4", "learned6", "own", "counters", "rules"]
    assert {"direct", "tunnel", "drop", "drop_rule", "drop_bad_source"} <= shown["counters"].keys()
    assert shown["ip_rules"] == []
    status = everything.status()
    assert status["backend"] == "python"
    assert status["network"]["egress"][0]["interface"] == "wan0"
    assert "python" in everything.command("routes", "--socket", str(everything.socket_path)).stdout


# This host itself.


def test_this_hosts_own_names_and_traffic(lab: DarwinLab) -> None:
    """capture.host: a file in the directory of resolver(5) names a server whose packets the routes bring to ztun."""
    config = {
        **BASE,
        "tun": {"name": "utun"},  # one that is free, the default on macOS
        "capture": {"host": True, "lan": []},
        "route": {"rules": [{"domain_suffix": ["site.test"], "outbound": "socks"}, *BASE["route"]["rules"]]},
    }
    instance = _started(lab, config)
    assert "utun0" in instance.output
    assert {route["device"] for route in instance.routes()["routes"]} == {"utun0"}
    text = (instance.resolver / "site.test").read_text()
    server = text.split("nameserver ")[1].strip()
    address = lab.gateway.run("dig", "+short", "www.site.test", f"@{server}").stdout.strip()
    assert address.startswith("198.1")
    page = json.loads(lab.gateway.run("curl", "-sS", "-m5", "-H", "Host: www.site.test", f"http://{address}/").stdout)
    assert page["client"] == plan.UPSTREAM4
    lab.stop()
    assert not instance.resolver.exists()


# The end.


def test_nothing_is_left_behind_and_every_frame_was_whole(lab: DarwinLab) -> None:
    lab.stop()
    before = snapshot(lab.gateway)
    instance = lab.ztun({"capture": {"lan": ["lan0"]}, **EVERYTHING})
    with lab.client.connect(plan.SITE4, plan.DIGEST_PORT) as sock:
        assert len(set(upload(sock, 1))) == 1
    for site in (plan.SITE4, plan.SITE6):
        with lab.client.connect(site, plan.ECHO_PORT) as sock:
            assert echo_flow(sock, 200_000)
        assert ask_udp(lab.client, site, plan.ECHO_PORT, b"x" * 3000) == b"x" * 3000
    assert instance.stop() == 0
    assert differences(before, snapshot(lab.gateway)) == []
    frames = [bytes.fromhex(frame) for frame in instance.trace()["frames"]]
    assert len(frames) > 500
    for frame in frames:
        check_frame(frame)
    assert {frame[:4].hex() for frame in frames} == {"00000002", "0000001e"}


def check_frame(frame: bytes) -> None:
    """The family of utun in front, no more than the MTU behind it, and every checksum complete."""
    packet = frame[4:]
    assert frame[:4] == struct.pack("!I", {4: 2, 6: 30}[packet[0] >> 4])
    assert len(packet) <= 1500
    if packet[0] >> 4 == 4:
        start, protocol, addresses = (packet[0] & 15) * 4, packet[9], packet[12:20]
        assert checksum.is_valid(packet[:start])
        if packet[6] & 0x3F or packet[7]:
            return  # a fragment
    else:
        start, protocol, addresses = 40, packet[6], packet[8:40]
    if protocol in (6, 17, 58):
        transport = packet[start:]
        assert checksum.is_valid(transport, checksum.pseudo_sum(addresses, protocol, len(transport)))


def test_killed_it_leaves_what_the_next_start_removes(lab: DarwinLab) -> None:
    lab.stop()
    lab.gateway.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=0")
    try:
        config = {**EVERYTHING, "capture": {"lan": ["lan0"], "host": True}}
        config["route"] = {"rules": [{"domain": ["site.test"], "outbound": "socks"}], "default": "socks"}
        instance = lab.ztun(config)
        assert lab.gateway.run("sysctl", "-n", "net.ipv4.ip_forward").stdout.strip() == "1"
        os.kill(instance.pid, signal.SIGKILL)
        assert wait_until(lambda: not instance.alive)
        assert wait_until(lambda: UTUN not in lab.gateway.run("ip", "link").stdout)
        assert (instance.resolver / "site.test").exists()
        successor = lab.prepare()
        successor.resolver, successor.saved = instance.resolver, instance.saved
        successor.start({**instance.config, "control": {"socket": str(successor.directory / "control.sock")}})
        assert "removed left-over: resolver file" in successor.output
        assert "removed left-over: sysctl net.inet.ip.forwarding" in successor.output
        assert successor.stop() == 0
        assert not list(instance.resolver.glob("*"))
        assert lab.gateway.run("sysctl", "-n", "net.ipv4.ip_forward").stdout.strip() == "0"
    finally:
        lab.gateway.run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")


# Bad input: one clear line, and nothing left behind.


@contextlib.contextmanager
def refused(lab: DarwinLab, config: dict[str, Any]) -> Iterator[list[str]]:
    """`ztun up` on `config` has to fail; the lines of its output."""
    lab.stop()
    before = snapshot(lab.gateway)
    lines: list[str] = []
    yield lines
    instance = lab.prepare()
    instance.write(complete({"tun": {"name": UTUN}, **config}, instance.directory))
    instance.launch("up", "--config", str(instance.config_path))
    assert wait_until(lambda: not instance.alive, 15)
    assert instance.returncode == 1, instance.output
    lines += [line for line in instance.output.splitlines() if line.startswith("ztun: ")]
    assert differences(before, snapshot(lab.gateway)) == []
    assert not instance.resolver.exists()
    assert not list(instance.saved.iterdir())


def test_a_utun_that_is_taken(lab: DarwinLab) -> None:
    lab.stop()
    lab.gateway.ip(f"tuntap add dev {UTUN} mode tun")
    try:
        with refused(lab, BASE) as lines:
            pass
        [line] = lines
        assert "utun7 exists already" in line
        assert "tun.name" in line
    finally:
        lab.gateway.ip(f"link del {UTUN}")


def test_a_route_that_is_there_already(lab: DarwinLab) -> None:
    lab.stop()
    lab.gateway.ip(f"route add 203.0.113.0/24 via {plan.UPSTREAM4}")
    try:
        with refused(lab, BASE) as lines:
            pass
        [line] = lines
        assert "route to 203.0.113.0/24 exists already, through wan0" in line
        assert "route delete" in line
    finally:
        lab.gateway.ip("route del 203.0.113.0/24")


def test_no_privilege(lab: DarwinLab) -> None:
    instance = lab.prepare()
    done = lab.gateway.run(
        *OPEN_TO_ALL, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
        sys.executable, "-m", "darwin.as_darwin", "up", "--proxy", "socks5://10.1.1.1:1080",
        check=False, env=instance.environment(),
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "needs root" in line
