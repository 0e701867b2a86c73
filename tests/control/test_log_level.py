"""The levels of the log over the control socket, and what the command makes of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ztun.control.client import ControlClient
from ztun.control.server import ControlServer
from ztun.errors import ConfigError
from ztun.log.components import COMPONENTS, Levels

CURL = ["curl", "-sS", "-w", "\n%{http_code}", "--unix-socket"]
MAIN = "import sys; from ztun.cli import main; sys.exit(main())"


@pytest.fixture
async def levels(tmp_path: Path) -> AsyncIterator[Levels]:
    """Those of an instance behind `tmp_path`/c.sock, where dns has a level of its own."""
    made = Levels()
    made.configure("info", {"dns": "error"})
    server = ControlServer(tmp_path / "c.sock", status=dict, routes=dict, stop=lambda: None, levels=made)
    await server.start()
    yield made
    await server.close()


async def command(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-c", MAIN, "log-level", *arguments, "--socket", str(directory / "c.sock")]
    return await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True)


async def test_the_client_reads_and_changes_them(tmp_path: Path, levels: Levels) -> None:
    client = ControlClient(tmp_path / "c.sock")

    assert await asyncio.to_thread(client.log_levels) == levels.snapshot()
    changed = await asyncio.to_thread(client.set_log_level, "debug", "stack")
    assert changed["components"]["stack"] == "debug"
    assert levels.threshold("stack").value == 10


async def test_what_is_wrong_is_said_and_changes_nothing(tmp_path: Path, levels: Levels) -> None:
    client = ControlClient(tmp_path / "c.sock")
    before = levels.snapshot()
    for level, component, says in (("loud", None, "'loud' is no level"), ("debug", "stak", "no component 'stak'")):
        with pytest.raises(ConfigError, match=says):
            await asyncio.to_thread(client.set_log_level, level, component)
    assert levels.snapshot() == before


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "7", "{}", '{"level": 5}', '{"level": []}', '{"level": "info", "component": {}}']
)
async def test_a_body_that_is_none_is_refused(tmp_path: Path, levels: Levels, body: str) -> None:
    before = levels.snapshot()
    done = await asyncio.to_thread(
        subprocess.run,
        [*CURL, str(tmp_path / "c.sock"), "--data-binary", body, "http://x/log-level"],
        capture_output=True,
        text=True,
    )

    answer, code = done.stdout.rsplit("\n", 1)
    assert code == "400"
    assert json.loads(answer).keys() == {"error"}
    assert levels.snapshot() == before


async def test_the_command_shows_them(tmp_path: Path, levels: Levels) -> None:
    done = await command(tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]

    assert lines[0] == ["level", "info"]
    assert [line[0] for line in lines[2:]] == list(COMPONENTS)
    assert ["dns", "error", "its", "own"] in lines
    assert ["stack", "info"] in lines


async def test_the_command_changes_one_all_and_back(tmp_path: Path, levels: Levels) -> None:
    for arguments, expected in (
        (("debug", "stack"), {"stack": "debug", "udp": "info", "dns": "error"}),
        (("warning",), {"stack": "debug", "udp": "warning", "dns": "error"}),
        (("default", "stack"), {"stack": "warning", "udp": "warning", "dns": "error"}),
        (("default",), {"stack": "info", "udp": "info", "dns": "error"}),
    ):
        done = await command(tmp_path, *arguments, "--json")
        assert expected.items() <= json.loads(done.stdout)["components"].items()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("debug", "stak"), "ztun: there is no component 'stak'; did you mean stack? known: app, classifier, control,"),
        (("loud",), "ztun: Invalid value for '[LEVEL]': "),
    ],
)
async def test_the_command_says_in_a_line_what_is_wrong(
    tmp_path: Path, levels: Levels, arguments: tuple[str, ...], says: str
) -> None:
    done = await command(tmp_path, *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says)
    assert len(done.stderr.splitlines()) == 1


async def test_without_an_instance_it_fails_with_a_line(tmp_path: Path) -> None:
    done = await command(tmp_path)

    assert done.returncode == 1
    assert "not running" in done.stderr
