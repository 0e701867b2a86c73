"""Calls on the TUN that fail: strace(1) makes the kernel refuse them. And a TUN that goes, under load."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.conftest import BASE
from e2e.faults import at_rest, comes_to_rest, cpu, load, seen_as, soon, works
from e2e.traffic import download, start, upload
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

# Without load all three are in test_network_changes.
BACKENDS = pytest.mark.parametrize("backend", ["tcx", "routes"])


@pytest.fixture
def instance(lab: Lab) -> Ztun:
    """One for all tests here that do not say how packets are captured."""
    running = lab.running()
    return running[0] if running and "backend" not in running[0].config["capture"] else start(lab, BASE)


def _tun_of(instance: Ztun) -> str:
    """What the kernel calls the file: seen from a chroot, a process in another mount namespace has a longer name."""
    descriptors = Path(f"/proc/{instance.pid}/fd").iterdir()
    return next(name for each in descriptors if (name := os.readlink(each)).endswith("/dev/net/tun"))


@contextlib.contextmanager
def failing(lab: Lab, instance: Ztun, call: str, error: str, when: str) -> Iterator[None]:
    """Calls on the TUN fail: `when` as strace(1) counts them, "3+5" the third and every fifth after that."""
    log = lab.directory / "strace.log"
    arguments = ["-p", str(instance.pid), "-o", str(log), "-P", _tun_of(instance), "-e", f"trace={call}"]
    argv = ["strace", "-f", *arguments, "-e", f"inject={call}:error={error}:when={when}"]
    tracer = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    assert "attached" in tracer.stderr.readline()
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(10)
        tracer.stderr.close()
    assert f"{error} (" in log.read_text()  # it did happen


@pytest.mark.parametrize("error", ["ENOBUFS", "EAGAIN", "EIO"])
@pytest.mark.parametrize("call", ["writev", "read"])
def test_every_byte_arrives_though_calls_on_the_tun_fail(lab: Lab, instance: Ztun, call: str, error: str) -> None:
    """A packet that the kernel does not take is lost, and sent again as any other; a read is tried again."""
    works(lab)
    before = at_rest(instance)
    digest = hashlib.sha256(lab.file(4).read_bytes()).hexdigest()
    with failing(lab, instance, call, error, "5+9"):
        with lab.client.connect(plan.SITE4, plan.HTTP_PORT, timeout=30) as sock:
            assert download(sock, "/files/4M", "site") == (4 << 20, digest)
        with lab.client.connect(plan.SITE4, plan.DIGEST_PORT, timeout=30) as sock:
            answered, expected = upload(sock, 4)
    assert answered == expected
    works(lab)
    comes_to_rest(instance, before)


def test_a_tun_that_cannot_be_read_for_two_seconds_costs_no_time(lab: Lab, instance: Ztun) -> None:
    """It is readable all the while. Reads are tried some times a second, not thousands of times."""
    works(lab)
    before, errors = at_rest(instance), instance.status()["device"]["read_errors"]
    with failing(lab, instance, "read", "EIO", "1+"):
        with lab.client.socket() as waiting:
            waiting.setblocking(False)
            waiting.connect_ex((plan.SITE4, plan.BANNER_PORT))
            assert wait_until(lambda: instance.status()["device"]["read_errors"] > errors)
            used = cpu(instance)
            time.sleep(2)
            assert cpu(instance) - used < 0.6
        assert instance.status()["device"]["read_errors"] - errors < 40
    begin = time.monotonic()
    works(lab)
    print(f"works again after {time.monotonic() - begin:.2f} s")
    comes_to_rest(instance, before)


@BACKENDS
def test_a_tun_that_is_removed_or_set_down_again_and_again_under_load(lab: Lab, backend: str) -> None:
    """Clients notice nothing but a moment without answers, or that they go direct for it.

    Of one whose last word went direct, ztun hears no more: its idle time ends it.
    """
    instance = start(lab, {**BASE, "capture": {"backend": backend}, "timeouts": {"tcp_idle": 3}})
    works(lab)
    before = at_rest(instance)
    digest = hashlib.sha256(lab.file(16).read_bytes()).hexdigest()
    with load(lab) as outcomes:
        soon(lambda: outcomes["served"] > 20)
        for number in range(6):
            lab.gateway.ip("link del ztun0" if number % 2 else "link set ztun0 down")
            begin, served = time.monotonic(), outcomes["served"]
            soon(lambda: outcomes["served"] > served + 20)  # noqa: B023
            print(f"{backend}: 20 served after {time.monotonic() - begin:.2f} s")
        with lab.client.connect(plan.SITE4, plan.HTTP_PORT, timeout=30) as sock:
            assert download(sock, "/files/16M", "site") == (16 << 20, digest)
    failed = sum(outcomes.values()) - outcomes["served"]
    assert failed < 6 * 4 + 10, outcomes  # each client once for each time, at most
    works(lab)
    comes_to_rest(instance, before)


def test_an_interface_that_is_renamed_under_load_and_comes_back(lab: Lab) -> None:
    """Connections through ztun are cut: their packets go direct meanwhile, to a server that does not know them.

    Its reset goes to the client alone: the idle time ends these flows in ztun.
    """
    instance = start(lab, {**BASE, "timeouts": {"tcp_idle": 3}})
    works(lab)
    before = at_rest(instance)
    with load(lab) as outcomes:
        soon(lambda: outcomes["served"] > 20)
        lab.gateway.ip("link set lan0 name lan9")
        soon(lambda: seen_as(lab) == plan.CLIENT4)
        lab.gateway.ip("link set lan9 name lan0")
        begin = time.monotonic()
        soon(lambda: seen_as(lab) == plan.UPSTREAM4)
        print(f"captured again after {time.monotonic() - begin:.2f} s")
    works(lab)
    comes_to_rest(instance, before)
