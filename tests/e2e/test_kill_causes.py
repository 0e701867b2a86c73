"""Other ends than SIGKILL: signals at any moment, crashes, no memory, a terminal that goes away. The host is intact."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import resource
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.kill_world import CLIENT4, GATEWAY4, PORT, TUNNELLED4, UPSTREAM4, KillWorld, configuration, is_dead
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import command

BACKENDS = ("tcx", "clsact", "routes")


@pytest.fixture(scope="module")
def shared() -> Iterator[KillWorld]:
    with KillWorld(f"ze{os.getpid()}") as made:
        yield made


@pytest.fixture
def world(shared: KillWorld) -> Iterator[KillWorld]:
    """After each test, and a sweep where that is needed, the gateway is what it was before."""
    before = shared.state()
    shared.forget_output()
    yield shared
    assert shared.changes(before) == []


def configured(world: KillWorld, backend: str, **sections: Any) -> str:
    return str(world.configure("config", {**configuration(world.directory, backend), **sections}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sigterm_at_any_point_of_the_start_undoes_what_was_done(world: KillWorld, backend: str) -> None:
    path = configured(world, backend)
    before = world.state()
    for at in (4, 9, 15, 25, 40, 60, 80, 120, 170):
        world.forget_output()
        with world.launched("up", "--config", path, at=at, number=signal.SIGTERM) as (pid, ended):
            if not wait_until(lambda pid=pid: is_dead(pid), 20):
                os.kill(pid, signal.SIGTERM)  # it has fewer calls than that
        assert ended[0].status == 0, (at, world.output())
        assert world.changes(before) == [], at
        assert "Traceback" not in world.output()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_sigterm_cuts_the_drain_short_and_undoes_all_the_same(world: KillWorld, backend: str) -> None:
    path = configured(world, backend, timeouts={"drain": 60})
    with world.launched("up", "--config", path) as (pid, ended):
        world.await_up(pid)
        with world.client.connect(TUNNELLED4, PORT) as flow:
            flow.sendall(b"busy")
            os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: "stopping signal=SIGTERM" in world.output(), 10)
            flow.sendall(b"still busy")
            os.kill(pid, signal.SIGTERM)
            assert wait_until(lambda: is_dead(pid), 10)
    assert ended[0].status == 0, world.output()
    assert "stopping at once" in world.output()


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGQUIT])
def test_a_crash_is_no_worse_than_a_kill(world: KillWorld, number: signal.Signals) -> None:
    path = configured(world, "clsact")
    with world.launched("up", "--config", path) as (pid, ended):
        world.await_up(pid)
        os.kill(pid, number)
    assert ended[0].status == -number
    _look_and_sweep(world, path)


def test_an_exception_that_nobody_expected_costs_nothing_else(world: KillWorld) -> None:
    path = configured(world, "clsact")
    with world.launched("up", "--config", path) as (pid, ended):
        world.await_up(pid)
        os.kill(pid, signal.SIGUSR1)
        assert wait_until(lambda: "unexpected error" in world.output(), 10), world.output()
        world.time_until(world.client, TUNNELLED4, TUNNELLED4)
        os.kill(pid, signal.SIGTERM)
    assert ended[0].status == 0, world.output()


def test_an_exception_that_ends_the_loop_undoes_everything(world: KillWorld) -> None:
    path = configured(world, "routes")
    with world.launched("up", "--config", path) as (pid, ended):
        world.await_up(pid)
        os.kill(pid, signal.SIGUSR2)
    assert ended[0].status == 3, world.output()


@pytest.mark.parametrize("backend", ["clsact", "routes"])
def test_without_memory_it_goes_on_or_ends_and_the_host_does_not_notice(world: KillWorld, backend: str) -> None:
    """It is killed, as the kernel does it, or sees what it can still do with not a page to be had."""
    path = configured(world, backend)
    with world.launched("up", "--config", path) as (pid, _), contextlib.ExitStack() as flows:
        world.await_up(pid)
        world.time_until(world.client, TUNNELLED4, TUNNELLED4)
        os.kill(pid, signal.SIGRTMIN)
        assert wait_until(lambda: is_dead(pid) or resource.prlimit(pid, resource.RLIMIT_AS)[0] == 1 << 20, 10)
        for _ in range(100):
            with contextlib.suppress(OSError):
                flow = flows.enter_context(world.client.connect(TUNNELLED4, PORT, timeout=0.05))
                flow.settimeout(0.01)
                flow.sendall(bytes(200_000))
            for accepted in world.accept_all():
                flows.enter_context(accepted)
        world.time_until(world.gateway, UPSTREAM4, GATEWAY4)
        world.time_until(world.client, UPSTREAM4, CLIENT4)
        if not is_dead(pid):
            os.kill(pid, signal.SIGKILL)
    _look_and_sweep(world, path)


def test_a_terminal_that_goes_away_ends_it_in_peace(world: KillWorld) -> None:
    path = configured(world, "clsact")
    pid, terminal = pty.fork()
    if pid == 0:
        output = os.open(world.directory / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.execvp("ip", ["ip", "netns", "exec", world.gateway.name, *command("up", "--config", path)])
    try:
        world.await_up(pid)
    finally:
        os.close(terminal)  # the kernel hangs up
    ended: list[tuple[int, int]] = []
    assert wait_until(lambda: ended.append(os.waitpid(pid, os.WNOHANG)) or ended[-1][0] == pid, 15), world.output()
    assert os.waitstatus_to_exitcode(ended[-1][1]) == 0, world.output()


def _look_and_sweep(world: KillWorld, path: str) -> None:
    assert world.reached(world.client, UPSTREAM4) == CLIENT4
    world.time_until(world.client, TUNNELLED4, CLIENT4)
    assert world.run("down", "--config", path).status == 0, world.output()


def test_down_without_an_instance_says_what_it_removed(world: KillWorld) -> None:
    path = configured(world, "routes")
    with world.launched("up", "--config", path) as (pid, _):
        world.await_up(pid)
        os.kill(pid, signal.SIGKILL)
    left = json.loads(world.gateway.run(*command("routes", "--config", path, "--json"), check=False).stdout)[
        "leftovers"
    ]
    assert any(line.startswith("sysctl ipv4.conf.lan1.forwarding") for line in left)

    done = world.gateway.run(*command("down", "--config", path, "--json"))

    answer = json.loads(done.stdout)
    assert answer["state"] == "not running"
    assert [line for line in answer["removed"] if line.startswith("sysctl")] == [
        line for line in left if line.startswith("sysctl")
    ]
    assert any(line.startswith("ip rule") for line in answer["removed"])
    again = world.gateway.run(*command("down", "--config", path), check=False)
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.startswith("ztun: not running")


def test_down_leaves_another_instance_alone(world: KillWorld) -> None:
    path = configured(world, "clsact")
    with world.launched("up", "--config", path) as (pid, ended):
        world.await_up(pid)
        elsewhere = str(world.directory / "nobody.sock")
        done = world.gateway.run(*command("down", "--socket", elsewhere), check=False)
        assert (done.returncode, done.stdout) == (1, "")
        world.time_until(world.client, TUNNELLED4, TUNNELLED4)
        os.kill(pid, signal.SIGTERM)
    assert ended[0].status == 0, world.output()
