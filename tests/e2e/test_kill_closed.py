"""With `fail: closed` nothing slips past the proxy from the first capture on: not when ztun is killed, not while it is
dead, not while the next one starts. Only an end in peace opens the way.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from e2e.kill_world import CLIENT4, GATEWAY4, TUNNELLED4, UPSTREAM4, KillWorld, configuration
from ztun.lab.namespace import wait_until

PROBE_PORT = 9
INTERVAL = 0.001  # seconds between two probes
STALE = 1.2  # seconds after which the heartbeat of a dead gateway counts for nothing


@pytest.fixture
def world() -> Iterator[KillWorld]:
    with KillWorld(f"zc{os.getpid()}") as made:
        yield made


class Probes:
    """Datagrams sent all the time to where only the proxy leads, which carries none: each arrival is a leak."""

    def __init__(self, world: KillWorld) -> None:
        self._receiver = world.upstream.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._receiver.bind((TUNNELLED4, PROBE_PORT))
        self._receiver.setblocking(False)
        self._sender = world.client.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._stop = threading.Event()
        self.sent = 0

    def _send(self) -> None:
        while not self._stop.wait(INTERVAL):
            try:
                self._sender.sendto(b"probe", (TUNNELLED4, PROBE_PORT))
                self.sent += 1
            except OSError:
                pass  # the refusal of an earlier one

    @contextmanager
    def sending(self) -> Iterator[None]:
        thread = threading.Thread(target=self._send)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            self._receiver.close()
            self._sender.close()

    def leaked(self) -> int:
        """How many came through since the last look."""
        count = 0
        while True:
            try:
                self._receiver.recv(100)
            except BlockingIOError:
                return count
            count += 1


@pytest.mark.parametrize("backend", ["clsact", "routes"])
def test_nothing_slips_past_from_the_first_capture_on(world: KillWorld, backend: str) -> None:
    path = str(world.configure("config", configuration(world.directory, backend, fail="closed", host=True)))
    probes = Probes(world)
    with probes.sending():
        assert wait_until(lambda: probes.leaked() > 0)
        for death in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
            world.forget_output()
            with world.launched("up", "--config", path, compiled=False) as (pid, _):
                world.await_up(pid)
                if death is signal.SIGKILL:
                    probes.leaked()  # before it was there for the first time
                    before = probes.sent
                assert world.reached(world.client, UPSTREAM4) == CLIENT4
                assert probes.leaked() == 0
                os.kill(pid, death)
            if death is signal.SIGKILL:
                time.sleep(STALE)
                assert world.reached(world.client, UPSTREAM4) == CLIENT4
                assert world.reached(world.gateway, UPSTREAM4) == GATEWAY4
                for source in (world.client, world.gateway):
                    assert world.reached(source, TUNNELLED4) is None
                assert probes.leaked() == 0
                assert probes.sent > before
        assert wait_until(lambda: probes.leaked() > 0)


@pytest.mark.parametrize("backend", ["tcx", "clsact", "routes"])
def test_a_rule_that_is_gone_at_the_restart_holds_nobody_back(world: KillWorld, backend: str) -> None:
    """What a dead instance kept shut opens when the next one has another mind."""
    closed = configuration(world.directory, "clsact", fail="closed", tun="zt1")
    with world.launched("up", "--config", str(world.configure("closed", closed))) as (pid, _):
        world.await_up(pid)
        os.kill(pid, signal.SIGKILL)
    time.sleep(STALE)
    assert world.reached(world.client, TUNNELLED4) is None
    world.forget_output()
    now = configuration(world.directory, backend)
    now["route"] = {"rules": [], "default": "direct"}
    with world.launched("up", "--config", str(world.configure("open", now))) as (pid, ended):
        world.await_up(pid)
        assert ("removed left-over: tc filter ztun:zt1:capture" in world.output()) == (backend != "clsact")
        assert world.reached(world.client, TUNNELLED4) == CLIENT4
        os.kill(pid, signal.SIGTERM)
    assert ended[0].status == 0
