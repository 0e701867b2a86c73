"""capture.offload: the kernel carries connections from their SYN-ACK on, between real ends; ztun sees them no more."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.conftest import OUTBOUNDS, RULES
from e2e.faults import seen_as
from e2e.traffic import download, read_all, read_exactly, reset, start, upload
from ztun.lab import Lab, Namespace, Ztun, plan
from ztun.lab.namespace import wait_until
from ztun.platform.linux import bpfcall
from ztun.wire import checksum

# Over IPv6 by a proxy that is reached over IPv6; the rest as everywhere.
OUTBOUNDS6 = [{"tag": "six", "type": "socks5", "server": f"[{plan.UPSTREAM6}]:{plan.SOCKS_PORT}"}]
RULES6 = [
    {"ip_cidr": [plan.SITE6], "port": [plan.HTTP_PORT], "outbound": "six"},
    {"ip_cidr": [plan.SITE6], "port": [plan.DIGEST_PORT], "outbound": "direct"},  # half-closes, and that proxy cannot
]
OFFLOADING: dict[str, Any] = {
    "capture": {"backend": "tcx", "offload": True},
    "route": {"rules": RULES6 + RULES},
    "outbounds": OUTBOUNDS6 + OUTBOUNDS,
    "timeouts": {"dial": 3, "drain": 0.2},
}
SITES = pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])


@pytest.fixture
def instance(lab: Lab) -> Ztun:
    running = lab.running()
    return running[0] if running and _is_plain(running[0]) else start(lab, OFFLOADING)


def _is_plain(instance: Ztun) -> bool:
    return all(instance.config[key].items() >= OFFLOADING[key].items() for key in ("capture", "timeouts"))


def carried(instance: Ztun) -> int:
    """Connections that the kernel was given so far."""
    return int(instance.status()["tcp"]["offloaded_total"])


def lives(instance: Ztun) -> int:
    return int(instance.status()["tcp"]["offloaded"])


@contextlib.contextmanager
def carrying(instance: Ztun, count: int = 1) -> Iterator[None]:
    """What is opened meanwhile is carried by the kernel, and nothing of it is left afterwards."""
    before = carried(instance)
    yield
    assert carried(instance) == before + count
    assert wait_until(lambda: lives(instance) == 0), instance.routes()["maps"][-1]


def packets(instance: Ztun, counter: str) -> int:
    return int(instance.routes()["counters"][counter]["packets"])


@contextlib.contextmanager
def sysctl(namespace: Namespace, key: str, value: int) -> Iterator[None]:
    before = namespace.run("sysctl", "-n", key).stdout.strip()
    namespace.run("sysctl", "-qw", f"{key}={value}")
    try:
        yield
    finally:
        namespace.run("sysctl", "-qw", f"{key}={before}")


# Conversations.


@SITES
def test_a_page_comes_without_ztun(lab: Lab, instance: Ztun, address: str) -> None:
    """It sees the SYN; of the rest not one packet."""
    seen = instance.status()["tcp"]["packets"]
    with carrying(instance):
        shown = f"[{address}]" if ":" in address else address
        assert seen_as(lab, shown) in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert instance.status()["tcp"]["packets"] == seen + 1
    assert packets(instance, "pass_up") > 2
    assert packets(instance, "pass_down") > 1


@SITES
def test_every_byte_arrives(lab: Lab, instance: Ztun, address: str) -> None:
    digest = hashlib.sha256(lab.file(16).read_bytes()).hexdigest()
    with carrying(instance, 2):
        with lab.client.connect(address, plan.HTTP_PORT) as sock:
            assert download(sock, "/files/16M", "site") == (16 << 20, digest)
        with lab.client.connect(address, plan.DIGEST_PORT) as sock:
            answered, expected = upload(sock, 16)
            assert answered == expected


def test_through_an_http_proxy(lab: Lab, instance: Ztun) -> None:
    with carrying(instance):
        assert lab.page("http://web.test/", "-4")["client"] == plan.UPSTREAM4


def test_past_all_proxies_where_only_ztun_can_decide(lab: Lab, instance: Ztun) -> None:
    """The outbound `direct`: nobody in between, and a destination that ztun has to look up."""
    with carrying(instance), lab.client.connect(plan.SITE4, plan.ECHO_PORT) as sock:
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"


def test_a_server_that_speaks_first_is_heard(lab: Lab, instance: Ztun) -> None:
    """Carried or not: what it said may be there before the kernel could take over."""
    for _ in range(20):
        with lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=3) as sock:
            assert read_exactly(sock, 15) == b"220 lab ready\r\n"
            sock.sendall(b"QUIT")
            assert read_exactly(sock, 4) == b"QUIT"
    assert wait_until(lambda: lives(instance) == 0)


def test_a_clients_fin_leaves_the_other_half_open(lab: Lab, instance: Ztun) -> None:
    with carrying(instance), lab.client.connect(plan.SITE4, plan.DIGEST_PORT) as sock:
        sock.sendall(b"all")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).startswith(b"3 ")


def test_a_servers_reset_reaches_the_client_as_one(lab: Lab, instance: Ztun) -> None:
    ended = instance.status()["tcp"]["ended"].get("aborted", 0)
    with carrying(instance), lab.client.connect(plan.SITE4, plan.RESET_PORT) as sock:
        sock.sendall(b"reset me\n")
        with pytest.raises(ConnectionResetError):
            sock.recv(100)
    assert instance.status()["tcp"]["ended"]["aborted"] == ended + 1


def test_a_clients_reset_reaches_the_server_as_one(lab: Lab, instance: Ztun) -> None:
    with carrying(instance):
        sock = lab.client.connect(plan.SITE4, plan.ECHO_PORT)
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        reset(sock)
        assert wait_until(
            lambda: any(entry["port"] == plan.ECHO_PORT and entry["event"] == "reset" for entry in lab.journal()[-3:])
        )
    assert instance.status()["tcp"]["ended"]["reset by client"] >= 1


def test_a_port_can_be_used_again_at_once(lab: Lab, instance: Ztun) -> None:
    """By a client that resets what it does not need: the one before may not be known to be over."""
    for number in range(20):
        with lab.client.socket() as sock:
            sock.settimeout(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((plan.CLIENT4, 45678))
            sock.connect((plan.SITE4, plan.ECHO_PORT))
            word = f"word {number}".encode()
            sock.sendall(word)
            assert read_exactly(sock, len(word)) == word
            reset(sock)
    assert wait_until(lambda: lives(instance) == 0)


def test_flows_are_listed_with_what_they_carried(lab: Lab, instance: Ztun) -> None:
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT) as sock:
        sock.sendall(b"x" * 1000)
        assert len(read_exactly(sock, 1000)) == 1000
        flow = next(one for one in instance.request("GET", "/flows")["flows"] if one["state"] == "offloaded")
        assert (flow["up"], flow["down"]) == (1000, 1000)
        assert flow["idle_s"] < 1
        entries = next(one for one in instance.routes()["maps"] if one["name"] == "carried")["entries"]
        assert [entry["client_port"] for entry in entries] == [sock.getsockname()[1]]
    assert wait_until(lambda: lives(instance) == 0)


# Ends that are unlike each other.


@pytest.mark.parametrize(
    ("end", "key", "value", "is_carried"),
    [
        ("client", "net.ipv4.tcp_timestamps", 0, False),  # the proxy waits for them
        ("upstream", "net.ipv4.tcp_timestamps", 0, True),
        ("client", "net.ipv4.tcp_sack", 0, False),  # the proxy would send it what it does not know
        ("upstream", "net.ipv4.tcp_sack", 0, True),
        ("client", "net.ipv4.tcp_window_scaling", 0, True),
        ("upstream", "net.ipv4.tcp_window_scaling", 0, True),
    ],
)
def test_ends_agree_or_ztun_stays_between_them(
    lab: Lab, instance: Ztun, end: str, key: str, value: int, is_carried: bool
) -> None:
    digest = hashlib.sha256(lab.file(4).read_bytes()).hexdigest()
    with sysctl(getattr(lab, end), key, value):
        instance = start(lab, OFFLOADING)  # no connection to the proxy that waits was made before
        with carrying(instance, 2 * is_carried):
            with lab.client.connect(plan.SITE4, plan.HTTP_PORT) as sock:
                assert download(sock, "/files/4M", "site") == (4 << 20, digest)
            with lab.client.connect(plan.SITE4, plan.DIGEST_PORT) as sock:
                answered, expected = upload(sock, 4)
                assert answered == expected


def test_a_client_that_takes_less_than_the_proxy_may_send_is_not_carried(lab: Lab, instance: Ztun) -> None:
    digest = hashlib.sha256(lab.file(4).read_bytes()).hexdigest()
    with carrying(instance, 0), lab.client.socket() as sock:
        sock.settimeout(10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 900)
        sock.connect((plan.SITE4, plan.HTTP_PORT))
        assert download(sock, "/files/4M", "site") == (4 << 20, digest)


# Bad links.


@contextlib.contextmanager
def losing(namespace: Namespace, percent: int) -> Iterator[None]:
    """Of what comes in for this host and of what it sends, some is lost."""
    chains = "".join(
        f"add chain inet lossy {hook} {{ type filter hook {hook} priority -300; }};"
        f"add rule inet lossy {hook} meta l4proto tcp numgen random mod 100 < {percent} drop;"
        for hook in ("input", "output")
    )
    namespace.run("nft", f"add table inet lossy; {chains}")
    try:
        yield
    finally:
        namespace.run("nft", "delete table inet lossy")


def test_every_byte_arrives_over_bad_links(lab: Lab, instance: Ztun) -> None:
    """Both ends tell each other what they have got (SACK), in numbers that are moved on the way."""
    digest = hashlib.sha256(lab.file(4).read_bytes()).hexdigest()
    with carrying(instance, 2), losing(lab.client, 4), losing(lab.upstream, 4):
        with lab.client.connect(plan.SITE4, plan.HTTP_PORT, timeout=60) as sock:
            assert download(sock, "/files/4M", "site") == (4 << 20, digest)
        with lab.client.connect(plan.SITE4, plan.DIGEST_PORT, timeout=60) as sock:
            answered, expected = upload(sock, 4)
            assert answered == expected


@contextlib.contextmanager
def narrow(lab: Lab, mtu: int) -> Iterator[list[int]]:
    """As if the way to the proxy led over a link that takes `mtu` bytes: more is lost, and the sender is told so.

    Gives a list of the lengths that were too much.
    """
    rules = "".join(
        f"add rule inet narrow in {match} tcp flags & (syn|rst) == 0 meta length > {mtu} drop;"
        for match in (f"ip daddr {plan.UPSTREAM4}", f"ip6 daddr {plan.UPSTREAM6}")
    )
    chain = "add chain inet narrow in { type filter hook prerouting priority -300; };"
    lab.upstream.run("nft", f"add table inet narrow; {chain} {rules}")
    lab.client.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")  # a link has no super-segments
    lengths: list[int] = []
    stop = threading.Event()
    with lab.upstream.entered():
        heard = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        four = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        six = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    heard.settimeout(0.1)

    def tell() -> None:
        while not stop.is_set():
            try:
                packet = heard.recv(65536)
            except TimeoutError:
                continue
            if len(packet) <= mtu or packet[9 if packet[0] >> 4 == 4 else 6] != socket.IPPROTO_TCP:
                continue
            if packet[0] >> 4 == 4 and packet[16:20] == socket.inet_aton(plan.UPSTREAM4):
                lengths.append(len(packet))
                message = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + packet[:28]
                check = checksum.finish(checksum.ones_sum(message)).to_bytes(2, "big")
                four.sendto(message[:2] + check + message[4:], (socket.inet_ntoa(packet[12:16]), 0))
            elif packet[0] >> 4 == 6 and packet[24:40] == socket.inet_pton(socket.AF_INET6, plan.UPSTREAM6):
                lengths.append(len(packet))
                message = struct.pack("!BBHI", 2, 0, 0, mtu) + packet[:1000]  # the kernel does its checksum
                six.sendto(message, (socket.inet_ntop(socket.AF_INET6, packet[8:24]), 0))

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield lengths
    finally:
        stop.set()
        thread.join()
        for sock in (heard, four, six):
            sock.close()
        lab.upstream.run("nft", "delete table inet narrow")
        lab.client.run("ethtool", "-K", "eth0", "tso", "on", "gso", "on")


@SITES
def test_a_client_hears_what_the_way_to_the_proxy_takes(lab: Lab, instance: Ztun, address: str) -> None:
    """The kernel's TCP that holds the port would not care: the segment is none of its own."""
    body = os.urandom(300_000)
    with (
        carrying(instance),
        lab.client.connect(address, plan.HTTP_PORT, timeout=20) as sock,
        narrow(lab, 1300) as lengths,
    ):
        head = f"POST /void HTTP/1.1\r\nHost: site\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        sock.sendall(head.encode() + body)
        assert read_all(sock).startswith(b"HTTP/1.1 ")
    assert lengths, "nothing was too long"
    for version in ("-4", "-6"):
        lab.client.run("ip", version, "route", "flush", "cache")


def test_a_syn_ack_that_is_lost_is_sent_again(lab: Lab, instance: Ztun) -> None:
    rule = "add rule ip early in tcp sport 7000 tcp flags syn,ack / syn,ack drop"
    nft = "add table ip early; add chain ip early in { type filter hook input priority -300; }; " + rule
    lab.client.run("nft", nft)
    try:
        sock = lab.client.socket()
        sock.setblocking(False)
        sock.connect_ex((plan.SITE4, plan.ECHO_PORT))
        assert wait_until(lambda: lives(instance) == 1)
        time.sleep(0.3)
    finally:
        lab.client.run("nft", "delete table ip early")
    with sock:
        sock.settimeout(5)
        assert wait_until(lambda: sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0 and _is_connected(sock))
        sock.sendall(b"hello")
        assert read_exactly(sock, 5) == b"hello"
    assert wait_until(lambda: lives(instance) == 0)


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


# Ends that others make.


def test_who_is_silent_for_too_long_is_ended(lab: Lab) -> None:
    instance = start(lab, {**OFFLOADING, "timeouts": {"tcp_idle": 2}})
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=15) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
    assert wait_until(lambda: lives(instance) == 0)
    assert instance.status()["tcp"]["ended"] == {"timed out": 1}
    assert wait_until(lambda: [e["event"] for e in lab.journal() if e["port"] == plan.ECHO_PORT][-1:] == ["reset"])


def test_whoever_stops_ztun_resets_both_ends(lab: Lab) -> None:
    instance = start(lab, OFFLOADING)
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        entries = len(lab.journal())
        assert instance.stop() == 0
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
    assert wait_until(lambda: [entry["event"] for entry in lab.journal()[entries:]] == ["reset"])


def test_after_a_kill_nothing_is_carried_and_nothing_is_left(lab: Lab) -> None:
    instance = start(lab, OFFLOADING)
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=3) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        programs = instance.bpf_ids()["prog"]
        os.kill(instance.pid, signal.SIGKILL)
        assert wait_until(lambda: not instance.alive)
        begin = time.monotonic()
        sock.sendall(b"y")  # goes direct now, to a server that does not know the connection
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
        assert seen_as(lab) == plan.CLIENT4
        print(f"direct after {time.monotonic() - begin:.2f} s")
    assert programs
    assert wait_until(lambda: not any(map(_is_loaded, programs)))
    works = start(lab, OFFLOADING)
    with carrying(works):
        assert seen_as(lab) == plan.UPSTREAM4


def test_while_ztun_stands_still_its_connections_go_on(lab: Lab, instance: Ztun) -> None:
    """What it would have to carry itself goes direct meanwhile, as ever."""
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=5) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        os.kill(instance.pid, signal.SIGSTOP)
        try:
            time.sleep(1.3)
            assert seen_as(lab) == plan.CLIENT4
            for number in range(10):
                sock.sendall(bytes([number]))
                assert sock.recv(10) == bytes([number])
        finally:
            os.kill(instance.pid, signal.SIGCONT)
        assert wait_until(lambda: seen_as(lab) == plan.UPSTREAM4)
        sock.sendall(b"after")
        assert read_exactly(sock, 5) == b"after"
    assert wait_until(lambda: lives(instance) == 0)


def _is_loaded(program: int) -> bool:
    try:
        os.close(bpfcall.open_program(program))
    except FileNotFoundError:
        return False
    return True


def test_a_socket_that_somebody_destroys_ends_its_flow(lab: Lab, instance: Ztun) -> None:
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=5) as sock:
        sock.sendall(b"x")
        assert sock.recv(10) == b"x"
        lab.gateway.run("ss", "-K", "dst", plan.SITE4, "dport", "=", str(plan.ECHO_PORT))
        with pytest.raises(ConnectionResetError):
            sock.recv(10)
    assert wait_until(lambda: lives(instance) == 0)


def test_an_uplink_that_is_renamed_goes_on_carrying(lab: Lab, instance: Ztun) -> None:
    with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=5) as sock:
        sock.sendall(b"before")
        assert read_exactly(sock, 6) == b"before"
        lab.gateway.ip("link set wan0 name wan9")
        try:
            for _ in range(20):
                sock.sendall(b"meanwhile")
                assert read_exactly(sock, 9) == b"meanwhile"
                time.sleep(0.05)
        finally:
            lab.gateway.ip("link set wan9 name wan0")
        sock.sendall(b"after")
        assert read_exactly(sock, 5) == b"after"
    assert wait_until(lambda: lives(instance) == 0)


# Where it cannot be.


@pytest.mark.parametrize("backend", ["clsact", "routes"])
def test_without_tcx_ztun_carries_them_and_says_so(lab: Lab, backend: str) -> None:
    instance = start(lab, {**OFFLOADING, "capture": {"backend": backend, "offload": True}})
    with carrying(instance, 0):
        assert seen_as(lab) == plan.UPSTREAM4
    if backend == "clsact":
        assert "the kernel carries no connections, ztun does" in instance.output
