"""The control socket, a real one: answers, access rights, stale and live sockets in the way, and a stop that waits."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ztun.control.client import ControlClient, NotRunning, find_socket
from ztun.control.lock import AlreadyRunning
from ztun.control.server import ControlServer
from ztun.errors import ConfigError, ZtunError

# An instance that takes 0.4 s to stop after it was asked.
INSTANCE = """
import asyncio, sys
from ztun.control.server import ControlServer

async def run():
    stop = asyncio.Event()
    server = ControlServer(sys.argv[1], status=lambda: {"state": "running"}, routes=dict, stop=stop.set)
    await server.start()
    print("ready", flush=True)
    await stop.wait()
    await asyncio.sleep(float(sys.argv[2]))
    await server.close()

asyncio.run(run())
"""


@asynccontextmanager
async def serving(path: Path, **given: Any) -> AsyncIterator[ControlServer]:
    callables = {"status": dict, "routes": dict, "stop": lambda: None} | given
    server = ControlServer(path, **callables)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def start_instance(path: Path, stopping: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", INSTANCE, str(path), str(stopping)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


async def test_status_and_routes_come_back_as_they_were_given(tmp_path: Path) -> None:
    status = {"state": "running", "uptime_s": 1.5, "drops": {"bad checksum": 2}}
    async with serving(tmp_path / "c.sock", status=lambda: status, routes=lambda: {"backend": "tcx"}):
        client = ControlClient(tmp_path / "c.sock")
        assert await asyncio.to_thread(client.status) == status
        assert await asyncio.to_thread(client.routes) == {"backend": "tcx"}


async def test_routes_that_take_long_keep_nobody_waiting(tmp_path: Path) -> None:
    asked, goes_on = threading.Event(), threading.Event()

    def routes() -> dict[str, Any]:
        asked.set()
        assert goes_on.wait(20)
        return {"backend": "tcx"}

    async with serving(tmp_path / "c.sock", status=lambda: {"state": "running"}, routes=routes):
        client = ControlClient(tmp_path / "c.sock", timeout=20)
        waiting = asyncio.create_task(asyncio.to_thread(client.routes))
        assert await asyncio.to_thread(asked.wait, 20)
        assert await asyncio.to_thread(client.status) == {"state": "running"}, "the event loop is free"
        goes_on.set()
        assert await waiting == {"backend": "tcx"}


async def test_a_part_of_the_routes(tmp_path: Path) -> None:
    entries = [{"prefix": f"10.0.0.{n}/32", "hits": n} for n in range(5)]
    answer = {"maps": [{"name": "prefixes4", "entries": entries}, {"name": "own", "entries": []}]}
    async with serving(tmp_path / "c.sock", routes=lambda: answer):
        client = ControlClient(tmp_path / "c.sock")
        cut = await asyncio.to_thread(client.routes, most=2)
        assert cut["maps"][0] == {"name": "prefixes4", "entries": entries[3:], "count": 5}
        alone = await asyncio.to_thread(client.routes, most=2, name="prefixes4")
        assert alone["maps"] == [{"name": "prefixes4", "entries": entries, "count": 5}]


async def test_only_the_owner_may_use_it_and_nothing_stays(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ztun" / "c.sock"
    async with serving(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == []


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with serving(path, status=lambda: {"state": "running"}):
        assert (await asyncio.to_thread(ControlClient(path).status))["state"] == "running"


async def test_a_live_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with serving(path, status=lambda: {"state": "running"}):
        with pytest.raises(AlreadyRunning, match=f"already running as pid {os.getpid()}"):
            await ControlServer(path, status=dict, routes=dict, stop=lambda: None).start()
        assert (await asyncio.to_thread(ControlClient(path).status))["state"] == "running"


async def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ZtunError, match=r"notes\.txt exists and is not a socket"):
        await ControlServer(path, status=dict, routes=dict, stop=lambda: None).start()
    assert path.read_text() == "mine"


async def test_close_does_not_remove_the_socket_of_a_successor(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with serving(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


async def test_an_answer_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise KeyError("tcp")

    async with serving(tmp_path / "c.sock", status=broken):
        with pytest.raises(ZtunError, match=r"the running instance failed: /status failed: KeyError\('tcp'\)"):
            await asyncio.to_thread(ControlClient(tmp_path / "c.sock").status)


def test_not_running_says_where_it_looked_and_what_to_do(tmp_path: Path) -> None:
    client = ControlClient(tmp_path / "c.sock")
    with pytest.raises(NotRunning, match=r"no control socket at .*/c\.sock\); start it with `ztun up`"):
        client.status()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "c.sock"))
    with pytest.raises(NotRunning):
        client.routes()


def test_an_instance_that_never_answers_is_given_up(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "c.sock"))
        silent.listen()
        with pytest.raises(ZtunError, match=r"no answer on .* within 0 s"):
            ControlClient(tmp_path / "c.sock", timeout=0.2).status()


def test_stop_returns_when_the_process_is_gone(tmp_path: Path) -> None:
    instance = start_instance(tmp_path / "c.sock", stopping=0.4)
    pid = ControlClient(tmp_path / "c.sock").stop(wait=10)
    assert pid == instance.pid
    assert instance.wait(timeout=0.5) == 0
    assert not (tmp_path / "c.sock").exists()


def test_stop_does_not_wait_forever(tmp_path: Path) -> None:
    instance = start_instance(tmp_path / "c.sock", stopping=30)
    with pytest.raises(ZtunError, match=f"pid {instance.pid} is still stopping after 0 s"):
        ControlClient(tmp_path / "c.sock").stop(wait=0.3)
    instance.kill()
    instance.wait()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"control": {"socket": "/tmp/x.sock"}, "rote": {}}', "/tmp/x.sock"),
        ("{}", "/run/default"),
        ('{"control": []}', "/run/default"),
        ('{"control": {"socket": 7}}', "/run/default"),
        ("[]", "/run/default"),
    ],
)
def test_the_socket_is_found_in_the_file_whatever_else_it_holds(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "ztun.json"
    file.write_text(content)
    assert find_socket(file, None, "/run/default") == Path(expected)


def test_the_option_beats_the_environment_and_that_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ztun.json"
    file.write_text('{"control": {"socket": "/file"}}')
    monkeypatch.setenv("ZTUN_CONTROL__SOCKET", "/environment")
    assert find_socket(file, None, "/default") == Path("/environment")
    assert find_socket(file, Path("/option"), "/default") == Path("/option")


@pytest.mark.parametrize(("content", "says"), [(None, "cannot read"), ("{", "is not JSON")])
def test_a_file_that_cannot_be_read_is_a_configuration_error(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "ztun.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        find_socket(file, None, "/default")
