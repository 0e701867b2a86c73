"""A gateway that stands still (SIGSTOP): what clients see meanwhile, and that it goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from e2e.conftest import BASE
from e2e.faults import at_rest, comes_to_rest, seen_as, soon, works
from e2e.traffic import start, upload
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

MINUTE = 60.0


@contextlib.contextmanager
def standing_still(instance: Ztun, seconds: float) -> Iterator[None]:
    """For so long at least."""
    end = time.monotonic() + seconds
    os.kill(instance.pid, signal.SIGSTOP)
    try:
        yield
        time.sleep(max(0.0, end - time.monotonic()))
    finally:
        os.kill(instance.pid, signal.SIGCONT)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "seconds"), [("tcx", MINUTE), ("clsact", 3.0)])
def test_clients_go_direct_meanwhile(lab: Lab, backend: str, seconds: float) -> None:
    """`fail: open`. A flow that is silent meanwhile goes on; a new one is direct within a second or so."""
    instance = start(lab, {**BASE, "capture": {"backend": backend, "fail": "open"}})
    works(lab)
    before = at_rest(instance)
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=30) as kept:
        assert kept.recv(100)
        with standing_still(instance, seconds):
            begin = time.monotonic()
            assert wait_until(lambda: seen_as(lab) == plan.CLIENT4, 10)
            print(f"{backend}: direct after {time.monotonic() - begin:.2f} s")
            assert all(seen_as(lab) == plan.CLIENT4 for _ in range(5))
            assert seen_as(lab, plan.DIRECT4) == plan.CLIENT4
        begin = time.monotonic()
        soon(lambda: seen_as(lab) == plan.UPSTREAM4)
        print(f"{backend}: proxied again after {time.monotonic() - begin:.2f} s")
        kept.sendall(b"still here")
        assert kept.recv(100) == b"still here"
    works(lab)
    comes_to_rest(instance, before)


def test_nothing_goes_direct_meanwhile_where_it_must_not(lab: Lab) -> None:
    """`fail: closed`. What would be tunnelled waits, also an upload in full swing, which then arrives whole."""
    instance = start(lab, {**BASE, "capture": {"fail": "closed"}})
    assert instance.status()["backend"] == "clsact"
    works(lab)
    before = at_rest(instance)
    answers: list[tuple[str, str]] = []
    with lab.client.connect(plan.SITE4, plan.DIGEST_PORT, timeout=60) as sock:
        sender = threading.Thread(target=lambda: answers.append(upload(sock, 512)))
        sender.start()
        assert wait_until(lambda: instance.status()["tcp"]["active"] > 0)
        with standing_still(instance, 3):
            time.sleep(1.2)  # until the heartbeat is stale
            assert sender.is_alive(), "the upload was over too soon"
            assert seen_as(lab) is None
            assert seen_as(lab, plan.DIRECT4) == plan.CLIENT4
        sender.join()
    [(answered, expected)] = answers
    assert answered == expected
    works(lab)
    comes_to_rest(instance, before)


def test_a_gateway_that_stands_still_now_and_then_keeps_its_flows(lab: Lab) -> None:
    """Shorter than the heartbeat's second: nobody notices."""
    instance = start(lab, BASE)
    works(lab)
    before = at_rest(instance)
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=30) as kept:
        assert kept.recv(100)
        for _ in range(5):
            with standing_still(instance, 0.3):
                kept.sendall(b"x")
            assert kept.recv(100) == b"x"
            time.sleep(0.3)
    comes_to_rest(instance, before)


def test_what_it_was_about_to_say_when_it_was_stopped_harms_no_flow(lab: Lab) -> None:
    """It stands still within what it does for a client, and goes on with that: answers must not pass it by."""
    instance = start(lab, {**BASE, "capture": {"backend": "tcx", "fail": "open"}})
    works(lab)
    before = at_rest(instance)
    for _ in range(3):
        with lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=30) as kept:
            assert kept.recv(100)
            with standing_still(instance, 1.2):
                pass
            time.sleep(0.1)  # for what an answer that went astray would bring about
            kept.sendall(b"still here")
            assert kept.recv(100) == b"still here"
    comes_to_rest(instance, before)


def test_more_news_of_the_network_than_fit_while_it_stands_still(lab: Lab) -> None:
    """The kernel drops notifications that nobody reads (ENOBUFS, netlink(7)); what is true is read afterwards."""
    instance = start(lab, BASE)
    works(lab)
    before, overflows = at_rest(instance), instance.status()["network"]["events"]["overflows"]
    with standing_still(instance, 0.3):
        lab.gateway.ip(
            *(f"link set lan0 mtu {1400 + number % 100}" for number in range(3000)), "link set lan0 mtu 1500"
        )
        lab.gateway.ip("link set lan0 name lan9")
    soon(lambda: instance.status()["network"]["lan"] == [{"name": "lan0", "state": "absent"}])
    assert instance.status()["network"]["events"]["overflows"] > overflows
    lab.gateway.ip("link set lan9 name lan0")
    works(lab)
    comes_to_rest(instance, before)
