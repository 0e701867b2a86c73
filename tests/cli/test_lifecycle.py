"""Beginning and ending, with real signals and steps that fail, hang or are asked to hurry."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from ztun import lifecycle
from ztun.lab.namespace import wait_until
from ztun.lifecycle import StopRequest, Undo, unless


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_asks_and_the_second_hurries(number: signal.Signals) -> None:
    stop = StopRequest()
    with stop.signals():
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.asked.wait(), 1)
        assert not stop.hurried.is_set()
        os.kill(os.getpid(), number)
        await asyncio.wait_for(stop.hurried.wait(), 1)


async def test_under_nohup_the_end_of_the_terminal_is_ignored() -> None:
    stop = StopRequest()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.signals():
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)
            assert not stop.asked.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_with_a_log_file_sighup_opens_it_again_and_stops_nothing() -> None:
    opened = []
    stop = StopRequest(lambda: not opened.append("again"))
    with stop.signals():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0.05)
        assert opened == ["again", "again"]
        assert not stop.asked.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.asked.wait(), 1)


# With a log file, in a session of its own on a terminal of its own.
ON_A_TERMINAL = """
import asyncio
from ztun.lifecycle import StopRequest

async def run():
    stop = StopRequest(lambda: print("called", flush=True) is None)
    with stop.signals():
        print("ready", flush=True)
        await stop.asked.wait()

asyncio.run(run())
"""


def test_a_terminal_that_goes_away_stops_it_even_with_a_log_file(tmp_path: Path) -> None:
    output = tmp_path / "output"
    pid, terminal = pty.fork()
    if pid == 0:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
        os.execv(sys.executable, [sys.executable, "-c", ON_A_TERMINAL])
    try:
        assert wait_until(lambda: output.exists() and "ready" in output.read_text(), 10)
        os.kill(pid, signal.SIGHUP)
        assert wait_until(lambda: "called" in output.read_text(), 5)
    finally:
        os.close(terminal)  # the kernel hangs up: SIGHUP
    ended: list[int] = []
    assert wait_until(lambda: ended.append(os.waitpid(pid, os.WNOHANG)[0]) or ended[-1] == pid, 5)
    assert output.read_text().count("called") == 1


async def test_asking_twice_over_the_control_socket_does_not_hurry() -> None:
    stop = StopRequest()
    stop.ask()
    stop.ask()
    assert stop.asked.is_set()
    assert not stop.hurried.is_set()


async def test_work_is_cut_short_by_the_event_and_has_ended_by_then() -> None:
    event, said = asyncio.Event(), []

    async def work() -> str:
        try:
            await asyncio.sleep(60)
        finally:
            said.append("ended")
        return "done"

    asyncio.get_running_loop().call_later(0.01, event.set)
    assert await unless(event, work()) is None
    assert said == ["ended"]


async def test_work_that_ends_first_gives_its_result_or_its_error() -> None:
    async def fail() -> None:
        raise KeyError("x")

    assert await unless(asyncio.Event(), asyncio.sleep(0, "result")) == "result"
    with pytest.raises(KeyError):
        await unless(asyncio.Event(), fail())


async def test_everything_is_undone_in_reverse_even_when_steps_fail() -> None:
    said: list[str] = []

    async def later() -> None:
        await asyncio.sleep(0.01)
        said.append("flows")

    def broken() -> None:
        said.append("routes")
        raise OSError("no such device")

    async def start(undo: Undo) -> None:
        undo.push("the lock", lambda: said.append("lock"))
        undo.push("routes", broken)
        undo.push("flows", later)
        raise RuntimeError("failed midway")

    stack = AsyncExitStack()
    undo = Undo(stack, asyncio.Event())
    with pytest.raises(RuntimeError, match="midway"):
        async with stack:
            await start(undo)
    assert said == ["flows", "routes", "lock"]
    assert undo.failed == ["routes"]


@pytest.mark.parametrize("hurry", [False, True])
async def test_a_step_that_hangs_does_not_keep_the_others(monkeypatch: pytest.MonkeyPatch, hurry: bool) -> None:
    monkeypatch.setattr(lifecycle, "STEP_LIMIT", 60 if hurry else 0.05)
    monkeypatch.setattr(lifecycle, "HURRIED_LIMIT", 0.05 if hurry else 60)
    said: list[str] = []
    hurried = asyncio.Event()
    if hurry:
        asyncio.get_running_loop().call_later(0.01, hurried.set)

    async def hang() -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(2), AsyncExitStack() as stack:
        undo = Undo(stack, hurried)
        undo.push("the lock", lambda: said.append("lock"))
        undo.push("flows", hang)
    assert said == ["lock"]
    assert undo.failed == ["flows"]


async def test_a_step_that_needs_a_moment_gets_it_even_when_hurried() -> None:
    said: list[str] = []
    hurried = asyncio.Event()
    hurried.set()

    async def say_goodbye() -> None:
        await asyncio.sleep(0.02)
        said.append("reset")

    async with AsyncExitStack() as stack:
        undo = Undo(stack, hurried)
        undo.push("flows", say_goodbye)
    assert (said, undo.failed) == (["reset"], [])
