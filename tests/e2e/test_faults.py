"""Too few descriptors, too little memory, clocks that jump, a proxy that dies: bounded, and over when it is over."""

from __future__ import annotations

import ast
import contextlib
import errno
import os
import resource
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import BASE
from e2e.faults import at_rest, comes_to_rest, drops, load, seen_as, soon, works
from e2e.traffic import read_all, reset, start
from ztun.lab import Lab, Ztun, plan, servers
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import complete

_ZTUN = Path(__file__).resolve().parents[2] / "ztun"


# Descriptors.

LIMIT = 256
CONNECTS = 5000


@pytest.fixture
def few_descriptors(lab: Lab) -> Ztun:
    lab.stop()
    instance = lab.prepare()
    instance.wrapper = ("prlimit", f"--nofile={LIMIT}:{LIMIT}")
    instance.start(complete({**BASE, "limits": {"half_open_per_source": 4096}}, instance.directory))
    return instance


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """For ourselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def crowd(lab: Lab, count: int, port: int) -> Iterator[tuple[list[socket.socket], Counter[int]]]:
    """So many connects, some hundreds at a time; yields those that were served, and the errors of the others."""
    served: list[socket.socket] = []
    errors: Counter[int] = Counter()
    with many_descriptors(), selectors.DefaultSelector() as selector:
        try:
            for begin in range(0, count, 250):
                for _ in range(min(250, count - begin)):
                    sock = lab.client.socket()
                    sock.setblocking(False)
                    sock.connect_ex((plan.SITE4, port))
                    selector.register(sock, selectors.EVENT_WRITE)
                deadline = time.monotonic() + 20
                while selector.get_map() and time.monotonic() < deadline:
                    for key, _ in selector.select(1):
                        one = key.fileobj
                        assert isinstance(one, socket.socket)
                        selector.unregister(one)
                        if number := one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                            errors[number] += 1
                            one.close()
                        else:
                            served.append(one)
                assert not selector.get_map(), "connects that nobody answers"
            yield served, errors
        finally:
            for sock in served:
                reset(sock)


def test_five_thousand_connects_with_256_descriptors(lab: Lab, few_descriptors: Ztun) -> None:
    """What there is room for is served, the others are told at once, and ztun itself is not short of descriptors."""
    instance = few_descriptors
    works(lab)
    before = at_rest(instance)
    with crowd(lab, CONNECTS, plan.ECHO_PORT) as (served, errors):
        assert set(errors) == {errno.ECONNREFUSED}
        assert len(served) + errors[errno.ECONNREFUSED] == CONNECTS
        assert LIMIT // 4 < len(served) < LIMIT - 32
        assert drops(instance, "tcp-limit-descriptors") >= errors[errno.ECONNREFUSED]
        for sock in served:  # they are alive
            sock.settimeout(5)
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
        # What takes descriptors of its own still has them.
        assert lab.dig("direct.test") == plan.DIRECT4
        assert instance.command("status", "--socket", str(instance.socket_path)).returncode == 0
        assert seen_as(lab, plan.DIRECT4) == plan.CLIENT4
        lab.gateway.ip("link del ztun0")
        assert wait_until(lambda: "made it again" in instance.output)
        served[0].sendall(b"y")
        assert served[0].recv(1) == b"y"
    works(lab)
    comes_to_rest(instance, before)
    lines = instance.output.splitlines()
    assert sum("no descriptors are left" in line for line in lines) < 20
    assert len(lines) < 1000
    print(f"served {len(served)} of {CONNECTS}, {len(lines)} lines of log")


# Memory.

STUCK_PORT = 7100


def test_a_process_that_can_have_no_more_memory(lab: Lab) -> None:
    """Uploads that nobody takes want memory that there is not: some flows end, the process and the others do not."""
    rule = {"ip_cidr": [plan.SITE4], "port": [STUCK_PORT], "protocol": "tcp", "outbound": "direct"}
    instance = start(lab, {**BASE, "route": {"rules": [rule, *BASE["route"]["rules"]]}})
    works(lab)
    before = at_rest(instance)
    limit = size_of(instance) + (8 << 20)
    resource.prlimit(instance.pid, resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        with stuck(lab):
            hogs = [hog for _ in range(40) if (hog := full(lab)) is not None]
            assert "out of memory, flows may hold less" in instance.output
            assert instance.status()["memory"]["limit"] < 64 << 20
            assert size_of(instance) <= limit
            assert instance.status()["state"] == "running"
            assert wait_until(lambda: seen_as(lab, plan.DIRECT4) == plan.CLIENT4)
            for hog in hogs:
                reset(hog)
    finally:
        resource.prlimit(instance.pid, resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    works(lab)
    soon(lambda: instance.status()["tcp"]["active"] == 0)
    comes_to_rest(instance, before)


def size_of(instance: Ztun) -> int:
    """Bytes of data segment, heap and private mappings: what RLIMIT_DATA counts (getrlimit(2))."""
    [line] = [line for line in Path(f"/proc/{instance.pid}/status").read_text().splitlines() if "VmData" in line]
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def stuck(lab: Lab) -> Iterator[None]:
    """A server at SITE4 that accepts and never reads."""
    with lab.upstream.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind((plan.SITE4, STUCK_PORT))
        listener.listen(100)
        yield


def full(lab: Lab) -> socket.socket | None:
    """A connection that took what it could; None when it was refused or cut."""
    try:
        sock = lab.client.connect(plan.SITE4, STUCK_PORT, timeout=5)
    except OSError:
        return None
    try:
        sock.settimeout(0.3)
        for _ in range(1000):
            sock.send(bytes(1 << 16))
    except TimeoutError:
        return sock
    except OSError:
        sock.close()
        return None
    return sock


# Clocks.


def test_nothing_is_measured_by_a_clock_that_can_jump() -> None:
    """CLOCK_REALTIME is for the log and for certificates, which are not ours to check; CLOCK_BOOTTIME for nothing.

    CLOCK_MONOTONIC stands still while the machine sleeps, in BPF as well: afterwards no heartbeat is stale, no flow
    has been idle for long, and no Fake-IP is older.
    """
    jumping = {"time", "time_ns", "now", "utcnow", "today", "CLOCK_REALTIME", "CLOCK_BOOTTIME", "gmtime", "localtime"}
    sources = {path: path.read_text() for path in _ZTUN.rglob("*.py") if path != _ZTUN / "log" / "lines.py"}
    found = [
        f"{path.relative_to(_ZTUN)}: {node.value.id}.{node.attr}"
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.attr in jumping and node.value.id in ("time", "datetime", "date")
    ]
    assert found == []
    assert "bpf_ktime_get_boot_ns" not in "".join(path.read_text() for path in _ZTUN.parent.glob("bpf/*.[ch]"))


# What Python's time of day comes from. libfaketime would do it for C as well, but the lock of the interpreter waits by
# calls that it gets wrong.
_JUMPING = """
import pathlib, time
_when = pathlib.Path(__file__).with_name("when")
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + int(_when.read_text()) * 86400
time.time_ns = lambda: _time_ns() + int(_when.read_text()) * 86400 * 10**9
"""


def test_the_time_of_day_jumps_by_ten_years(lab: Lab) -> None:
    """Forth and back, under traffic, with names in the store and in caches."""
    lab.stop()
    instance = lab.prepare()
    when = instance.directory / "when"
    when.write_text("0")
    (instance.directory / "sitecustomize.py").write_text(_JUMPING)
    path = os.pathsep.join(filter(None, [str(instance.directory), os.environ.get("PYTHONPATH")]))
    instance.start(complete(BASE, instance.directory, offload=False), env={**os.environ, "PYTHONPATH": path})
    works(lab)
    before, address = at_rest(instance), lab.dig("site.test")
    years = set()
    with load(lab) as outcomes, lab.client.connect(plan.SITE4, plan.BANNER_PORT) as kept:
        assert kept.recv(100)
        for days in ("3650", "-3650", "0"):
            when.write_text(days)
            served = outcomes["served"]
            soon(lambda: outcomes["served"] > served + 20)  # noqa: B023
            kept.sendall(b"still here")
            assert kept.recv(100) == b"still here"
            assert lab.dig("site.test") == address
            assert lab.dig("direct.test") == plan.DIRECT4
            assert instance.status()["uptime_s"] < 3600
            years.add(year_of(instance))
    assert set(outcomes) == {"served"}
    assert max(years) - min(years) >= 19  # it did jump
    works(lab)
    comes_to_rest(instance, before)
    assert instance.stop() == 0


def year_of(instance: Ztun) -> int:
    """The year that its control socket tells, for it uses the time of day (RFC 9110 section 6.6.1)."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(instance.socket_path))
        sock.sendall(b"GET /log-level HTTP/1.0\r\n\r\n")
        head = read_all(sock).decode()
    [date] = [line for line in head.splitlines() if line.startswith("Date:")]
    return int(date.split()[4])


# The proxy.

PROXIES = {servers.SOCKS_UDP: "socks-udp", f"tinyproxy-{plan.HTTP_PROXY_PORT}": "http"}


@pytest.mark.parametrize("server", PROXIES)
def test_a_proxy_that_is_killed_and_started_again_under_load(lab: Lab, server: str) -> None:
    tag = PROXIES[server]
    rules = [{"ip_cidr": [plan.SITE4], "outbound": tag}]
    instance = start(lab, {**BASE, "route": {"rules": rules}})
    before = at_rest(instance)
    with load(lab) as outcomes:
        soon(lambda: outcomes["served"] > 20)
        with lab.client.connect(plan.SITE4, plan.BANNER_PORT) as cut:
            assert cut.recv(100)
            lab.end_server(server)
            assert ends(cut)
        outcomes.clear()
        soon(lambda: sum(outcomes.values()) > 20)
        assert not outcomes["TimeoutError"]  # nobody waits
        lab.begin_server(server)
        again = time.monotonic()
        served = outcomes["served"]
        soon(lambda: outcomes["served"] > served + 20)
        print(f"{tag}: served again after {time.monotonic() - again:.2f} s")
    comes_to_rest(instance, before)


def ends(sock: socket.socket) -> bool:
    """Whether a flow is over, one way or the other."""
    sock.settimeout(5)
    try:
        return sock.recv(100) == b""
    except ConnectionResetError:
        return True


# Name servers.


def test_name_servers_that_are_gone_and_come_back(lab: Lab) -> None:
    """Names of proxied flows need none here; others are refused in time, and asked again when there is somebody."""
    instance = start(lab, BASE)
    works(lab)
    before = at_rest(instance)
    lab.end_server("dnsmasq")
    try:
        assert lab.dig("site.test", "A").startswith("198.18.")
        begin = time.monotonic()
        said = lab.client.run("dig", "+tries=1", "+time=8", "gone.direct.test", check=False).stdout
        print(f"refused after {time.monotonic() - begin:.2f} s")
        assert "SERVFAIL" in said
        assert seen_as(lab) == plan.UPSTREAM4
    finally:
        lab.begin_server("dnsmasq")
    begin = time.monotonic()
    soon(lambda: lab.dig("direct.test", check=False) == plan.DIRECT4)
    print(f"answered again after {time.monotonic() - begin:.2f} s")
    works(lab)
    comes_to_rest(instance, before)
