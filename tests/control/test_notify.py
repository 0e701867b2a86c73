"""sd_notify(3) against a real datagram socket, as systemd would open it."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztun.control import notify as service
from ztun.control.notify import Pulse, notify, watchdog_interval


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A service manager that waits for what it is told; no watchdog."""
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"{tmp_path}/notify")
        sock.setblocking(False)
        yield sock


def told(manager: socket.socket) -> list[str]:
    messages = []
    try:
        while True:
            messages.append(manager.recv(1000).decode())
    except BlockingIOError:
        return messages


async def beats(manager: socket.socket, seconds: float, count: int) -> int:
    """How many messages came within so long, or until there were so many."""
    came, end = 0, time.monotonic() + seconds
    while came < count and time.monotonic() < end:
        await asyncio.sleep(0.005)
        came += len(told(manager))
    return came


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_hears_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    name = f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        manager.settimeout(2)
        assert notify("READY=1\nSTATUS=up")
        assert manager.recv(100) == b"READY=1\nSTATUS=up"


@pytest.mark.parametrize("value", ["", "relative/path", "/nonexistent/notify"])
def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert not notify("READY=1")


def test_a_manager_that_does_not_listen_does_not_stop_us(manager: socket.socket) -> None:
    """Its queue is full: nobody waits for it."""
    for number in range(10_000):
        if not notify(f"STATUS={number}"):
            return
    pytest.fail("a queue without an end")


@pytest.mark.parametrize(
    ("variables", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "20000000"}, 20.0),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),  # meant for who started us
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_how_often_the_watchdog_wants_to_hear(variables: dict[str, str], seconds: float | None) -> None:
    assert watchdog_interval(variables) == seconds


async def test_the_watchdog_hears_from_the_loop_with_a_line(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    pulse = Pulse(asyncio.get_running_loop(), lambda: "17 flows")
    pulse.start()
    assert told(manager) == ["WATCHDOG=1\nSTATUS=17 flows"]
    assert await beats(manager, 10, 3) >= 3
    pulse.stop()
    told(manager)
    assert await beats(manager, 0.1, 1) == 0


async def test_a_loop_that_hangs_says_nothing(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    pulse = Pulse(asyncio.get_running_loop(), lambda: "")
    pulse.start()
    told(manager)
    time.sleep(0.3)  # noqa: ASYNC251 (ten times as long as the watchdog waits)
    assert told(manager) == []
    assert await beats(manager, 10, 1) == 1
    pulse.stop()


async def test_what_fails_to_be_said_stops_the_pulse_of_nobody_else(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect in the line must not be taken for a loop that hangs."""
    monkeypatch.setenv("WATCHDOG_USEC", "30000")

    def say() -> str:
        raise RuntimeError("a defect")

    pulse = Pulse(asyncio.get_running_loop(), say)
    pulse.start()
    assert await beats(manager, 10, 3) >= 3
    pulse.stop()


async def test_without_a_manager_there_is_no_pulse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    pulse = Pulse(asyncio.get_running_loop(), lambda: pytest.fail("nobody asked"))
    pulse.start()
    pulse.stop()


@pytest.mark.parametrize("opened", [True, False])
def test_a_reload_is_told_from_its_beginning_to_its_end(manager: socket.socket, opened: bool) -> None:
    """A manager that asks for it does not want us to stop, also where there was nothing to open anew."""
    heard: list[list[str]] = []

    def action() -> bool:
        heard.append(told(manager))
        return opened

    assert service.reload(action)
    [[first]] = heard
    state, when = first.split("\n")
    assert state == "RELOADING=1"
    assert 0 <= time.monotonic_ns() // 1000 - int(when.removeprefix("MONOTONIC_USEC=")) < 60_000_000
    assert told(manager) == ["READY=1"]


def test_without_a_manager_a_reload_is_what_its_action_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert service.reload(lambda: True)
    assert not service.reload(lambda: False)
