"""At each bound the newest flow is refused at once, the others go on, and the reason is there to see."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from e2e.traffic import ask_udp, read_exactly, reset, start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

_AT_ONCE = 1.0  # seconds; the dial time-out is three, and a SYN that gets no answer is repeated after one
_MIB = 1 << 20
_STUCK_PORT = 7100  # a server that accepts and never reads


@pytest.fixture(scope="module")
def limited(lab: Lab, backend: str) -> Ztun:
    """A gateway with room for very little, once for each way of capturing."""
    limits = {
        "tcp_flows": 7, "tcp_flows_per_source": 4, "half_open_per_source": 2,
        "udp_sessions": 5, "udp_sessions_per_source": 3, "memory": _MIB,
    }  # fmt: skip
    rules = [
        {"ip_cidr": [plan.SITE4], "port": [_STUCK_PORT, plan.ECHO_PORT], "protocol": "tcp", "outbound": "direct"},
        {"ip_cidr": ["203.0.113.0/24", "2001:db8::/48"], "outbound": "socks-udp"},
    ]
    return start(lab, {"limits": limits, "route": {"rules": rules}, "timeouts": {"dial": 3}})


@pytest.fixture(autouse=True)
def nothing_left(limited: Ztun) -> Iterator[None]:
    """No test begins with the flows of the one before."""
    yield
    assert wait_until(lambda: limited.status()["tcp"]["active"] == 0), limited.status()["tcp"]


def echo(sock: socket.socket, text: bytes) -> bool:
    sock.sendall(text)
    return read_exactly(sock, len(text)) == text


def drops(instance: Ztun, reason: str) -> int:
    return int(instance.status()["drops"].get(reason, 0))


@contextlib.contextmanager
def flows(lab: Lab, count: int, host: str = plan.SITE4, source: str | None = None) -> Iterator[list[socket.socket]]:
    """Connections to the echo server; they end with a reset, so that nothing waits for them."""
    made = [lab.client.connect(host, plan.ECHO_PORT, source=source) for _ in range(count)]
    try:
        yield made
    finally:
        for sock in made:
            reset(sock)


def refused_at_once(lab: Lab, host: str = plan.SITE4, source: str | None = None) -> bool:
    begin = time.monotonic()
    with pytest.raises(ConnectionRefusedError):
        lab.client.connect(host, plan.ECHO_PORT, source=source)
    return time.monotonic() - begin < _AT_ONCE


def test_one_client_has_its_share_of_the_flows(lab: Lab, limited: Ztun) -> None:
    before = drops(limited, "tcp-limit-source")
    with flows(lab, 4) as mine:
        assert refused_at_once(lab)
        assert drops(limited, "tcp-limit-source") == before + 1
        assert all(echo(sock, b"lives on") for sock in mine)
        with flows(lab, 1, source=plan.CLIENT4_OTHER) as others:
            assert echo(others[0], b"a neighbour is not concerned")
        reset(mine.pop())
        with flows(lab, 1) as again:
            assert echo(again[0], b"there is room again")


def test_a_prefix_of_ipv6_is_one_client(lab: Lab, limited: Ztun) -> None:
    with flows(lab, 2, plan.SITE6, plan.CLIENT6) as mine, flows(lab, 2, plan.SITE6, plan.CLIENT6_OTHER) as more:
        assert refused_at_once(lab, plan.SITE6)
        assert all(echo(sock, b"lives on") for sock in (*mine, *more))
        with flows(lab, 1) as by_ipv4:
            assert echo(by_ipv4[0], b"another source")


def test_all_clients_share_what_there_is(lab: Lab, limited: Ztun) -> None:
    before = drops(limited, "tcp-limit")
    with flows(lab, 4) as mine, flows(lab, 3, source=plan.CLIENT4_OTHER) as theirs:
        curl = lab.curl("--silent", "--max-time", "5", f"http://[{plan.SITE6}]/", check=False)
        assert curl.returncode == 7, curl  # CURLE_COULDNT_CONNECT; a time-out would be 28
        assert drops(limited, "tcp-limit") == before + 1
        assert all(echo(sock, b"lives on") for sock in (*mine, *theirs))
    assert wait_until(lambda: limited.status()["tcp"]["active"] == 0)
    assert lab.page(f"http://[{plan.SITE6}]/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)


def test_dials_that_hang_are_bounded(lab: Lab, limited: Ztun) -> None:
    before = drops(limited, "tcp-limit-half-open-source")
    with flows(lab, 1) as mine:
        hanging = [spawn_nc(lab, plan.SILENT4) for _ in range(2)]
        try:
            assert wait_until(lambda: limited.status()["tcp"]["half_open"] == 2)
            assert refused_at_once(lab)
            assert drops(limited, "tcp-limit-half-open-source") == before + 1
            assert echo(mine[0], b"lives on")
        finally:
            for process in hanging:
                process.kill()
                process.wait()
        assert wait_until(lambda: limited.status()["tcp"]["half_open"] == 0, timeout=10)
        with flows(lab, 1) as again:
            assert echo(again[0], b"there is room again")


def spawn_nc(lab: Lab, host: str) -> subprocess.Popen[bytes]:
    return lab.client.spawn("nc", "-w", "10", host, "80", stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_one_client_has_its_share_of_the_udp_sessions(lab: Lab, limited: Ztun) -> None:
    before = drops(limited, "udp-limit-source")
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)]
        for sock in mine:
            sock.settimeout(3)
            sock.connect((plan.SITE4, plan.ECHO_PORT))
            sock.send(b"first")
            assert sock.recv(100) == b"first"
        with pytest.raises(ConnectionRefusedError):
            ask_udp(lab.client, plan.SITE4, plan.ECHO_PORT, b"one too many", tries=1)
        assert drops(limited, "udp-limit-source") == before + 1
        for sock in mine:
            sock.send(b"lives on")
            assert sock.recv(100) == b"lives on"


def test_memory_is_bounded(lab: Lab, limited: Ztun) -> None:
    """A server that never reads: what the kernel's buffers do not take waits in the gateway."""
    before = drops(limited, "memory-limit")
    with stuck_server(lab), flows(lab, 1) as mine:
        hogs = [lab.client.connect(plan.SITE4, _STUCK_PORT) for _ in range(2)]
        try:
            fill(hogs)
            assert drops(limited, "memory-limit") > before, limited.status()
            assert refused_at_once(lab)
            assert echo(mine[0], os.urandom(200_000))
        finally:
            for hog in hogs:
                reset(hog)
        assert wait_until(lambda: limited.status()["tcp"]["active"] == 1)
        with flows(lab, 1) as again:
            assert echo(again[0], b"there is room again")


@contextlib.contextmanager
def stuck_server(lab: Lab) -> Iterator[None]:
    """Takes connections, with the smallest buffers there are, and leaves it at that."""
    with lab.upstream.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind((plan.SITE4, _STUCK_PORT))
        listener.listen()
        yield


def fill(socks: list[socket.socket]) -> None:
    """Send until nobody takes anything for a while."""
    block = bytes(65536)
    for sock in socks:
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(1000):
                sock.send(block)


def test_status_shows_the_reasons(limited: Ztun) -> None:
    reasons = {"tcp-limit", "tcp-limit-source", "tcp-limit-half-open-source", "udp-limit-source", "memory-limit"}
    arguments = ("status", "--config", str(limited.config_path))
    assert reasons <= set(json.loads(limited.command(*arguments, "--json").stdout)["drops"])
    table = limited.command(*arguments).stdout
    assert all(reason in table for reason in reasons), table
