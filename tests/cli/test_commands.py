"""The commands as a person types them: what they print, where, and with which exit code."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from ztun import __version__
from ztun.cli.routes import show_routes
from ztun.cli.status import show_status
from ztun.control import DEFAULT_SOCKET

STATUS: dict[str, Any] = {
    "state": "running",
    "uptime_s": 3821.5,
    "tcp": {"active": 3, "total": 90},
    "udp": {"active": 1, "total": 4},
    "icmp": {"echo": 2},
    "dns": {f"counter_number_{number}": number for number in range(6)},
    "pool": {"size": 8192, "used": 5},
    "outbounds": {"office": {"type": "socks5", "active": 3}},
    "drops": {"bad checksum": 7, "too short": 0},
}
ROUTES: dict[str, Any] = {
    "backend": "tcx",
    "routes": [{"dst": "198.18.0.0/15", "dev": "ztun0", "table": "main"}],
    "ip_rules": [],
    "programs": [{"name": "classify_lan", "hook": "tcx/ingress", "ifname": "eth1", "id": 42}],
    "interfaces": [
        {
            "ifname": "eth1",
            "role": "lan",
            "state": "captured",
            "ifindex": 3,
            "link": "up",
            "mtu": 1500,
            "attached": [
                {
                    "hook": "tcx/ingress",
                    "direction": "ingress",
                    "name": "classify_lan",
                    "id": 42,
                    "tag": "0123456789abcdef",
                    "filter": None,
                    "owner": "ztun",
                }
            ],
        }
    ],
    "maps": [
        {
            "name": "prefixes4",
            "type": "lpm_trie",
            "entries": [
                {"prefix": "10.0.0.0/24", "verdict": "direct", "rule": -2, "hits": 3},
                {"prefix": "192.0.2.0/24", "verdict": "tunnel", "rule": 0, "hits": 1234},
            ],
        }
    ],
    "rules": [{"rule": 0, "conditions": "ip_cidr 192.0.2.0/24, port 80", "outbound": "office"}],
    "counters": {"direct": {"packets": 3, "bytes": 300}, "tunnel": {"packets": 1234, "bytes": 3_000_000}},
}
# Stands in for `ztun up`: the real control server with answers that are known.
INSTANCE = """
import asyncio, json, sys
from ztun.control.server import ControlServer

async def run():
    status, routes = json.loads(sys.argv[2])
    stop = asyncio.Event()
    server = ControlServer(sys.argv[1], status=lambda: status, routes=lambda: routes, stop=stop.set)
    await server.start()
    print("ready", flush=True)
    await stop.wait()
    await server.close()

asyncio.run(run())
"""
MAIN = "import sys; from ztun.cli import main; sys.exit(main())"


def ztun(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ZTUN_")}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=30,
        env=kept | {"COLUMNS": "80"} | environment,
        check=False,
    )


def assert_fails(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on stderr that starts with the program's name and holds `words`, nothing on stdout."""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("ztun: ")
    for word in words:
        assert word in lines[0]
    assert done.stdout == ""
    assert done.returncode == code


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "control.sock"
    with subprocess.Popen(
        [sys.executable, "-c", INSTANCE, str(path), json.dumps([STATUS, ROUTES])], stdout=subprocess.PIPE, text=True
    ) as instance:
        assert instance.stdout is not None
        assert instance.stdout.readline() == "ready\n"
        # Reaps it as a service manager would.
        threading.Thread(target=instance.wait, daemon=True).start()
        yield path
        instance.kill()


def test_version() -> None:
    done = ztun("--version")
    assert (done.stdout, done.returncode) == (f"ztun {__version__}\n", 0)


def test_help_names_every_command() -> None:
    done = ztun("--help")
    assert done.returncode == 0
    for command in ("up", "down", "status", "routes", "check", "schema", "doctor", "demo"):
        assert f"  {command} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing command"]),
        (["stauts"], ["No such command 'stauts'"]),
        (["status", "--jsno"], ["No such option: --jsno", "`ztun status --help`"]),
        (["check"], ["Missing argument 'FILE'"]),
        (["up", "--log-level", "loud"], ["--log-level", "loud"]),
        (["status", "extra"], ["unexpected extra argument"]),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], words: list[str]) -> None:
    assert_fails(ztun(*arguments), 2, *words)


@pytest.mark.parametrize("command", ["status", "down"])
def test_not_running_says_so_and_what_to_do(tmp_path: Path, command: str) -> None:
    done = ztun(command, "--json", "--socket", tmp_path / "nobody.sock")
    assert_fails(done, 1, f"not running (no control socket at {tmp_path}/nobody.sock); start it with `ztun up`")


def test_routes_without_an_instance_are_what_the_kernel_has(tmp_path: Path) -> None:
    done = ztun("routes", "--json", "--socket", tmp_path / "nobody.sock")
    assert json.loads(done.stdout)["state"] == "not running"
    assert done.stderr.startswith("ztun: not running (no control socket at ")
    assert (len(done.stderr.splitlines()), done.returncode) == (1, 1)


def test_where_the_socket_is_by_default(tmp_path: Path) -> None:
    from ztun.config import Settings

    assert str(Settings().control.socket) == DEFAULT_SOCKET


def test_the_instance_is_found_by_its_configuration(tmp_path: Path, socket_path: Path) -> None:
    file = tmp_path / "ztun.json"
    file.write_text(json.dumps({"control": {"socket": str(socket_path)}}))
    done = ztun("status", "--json", "--config", file)
    assert json.loads(done.stdout) == STATUS
    assert ztun("status", "--json", ZTUN_CONTROL__SOCKET=str(socket_path)).returncode == 0


def test_json_is_the_answer_of_the_instance(socket_path: Path) -> None:
    assert json.loads(ztun("status", "--json", "--socket", socket_path).stdout) == STATUS
    maps = [{**entry, "count": len(entry["entries"])} for entry in ROUTES["maps"]]
    assert json.loads(ztun("routes", "--json", "--socket", socket_path).stdout) == {**ROUTES, "maps": maps}


def test_status_for_a_person(socket_path: Path) -> None:
    done = ztun("status", "--socket", socket_path)
    assert done.stdout.splitlines()[0] == "running for 1 h 3 min"
    assert "tcp   active 3, total 90" in done.stdout
    assert "dns   counter number 0 0, counter number 1 1, counter number 2 2,\n      counter number 3 3," in done.stdout
    assert "office  socks5" in done.stdout
    assert "bad checksum      7" in done.stdout
    assert "too short" not in done.stdout, "what never happened is left out"


def test_routes_for_a_person(socket_path: Path) -> None:
    done = ztun("routes", "--socket", socket_path)
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "running, backend tcx"
    assert "  198.18.0.0/15 dev ztun0 table main" in lines
    assert "  eth1             LAN, up, MTU 1500, captured" in lines
    assert "    tcx/ingress     classify_lan     id 42       tag 0123456789abcdef" in lines
    assert "  10.0.0.0/24   direct   built in     3" in lines
    assert "  192.0.2.0/24  tunnel          0  1234" in lines
    assert "     0  ip_cidr 192.0.2.0/24, port 80  office" in lines


def test_one_map_alone_or_an_error_that_names_it(socket_path: Path) -> None:
    done = ztun("routes", "--map", "prefixes4", "--socket", socket_path)
    assert "Map prefixes4  lpm_trie, 2 entries" in done.stdout
    assert "Interfaces" not in done.stdout
    assert_fails(ztun("routes", "--map", "prefixes5", "--socket", socket_path), 2, "--map", "'prefixes5'")


def test_watching_by_the_wrong_options(socket_path: Path) -> None:
    assert_fails(ztun("routes", "--interval", "1", "--socket", socket_path), 2, "--interval", "--watch")
    assert_fails(ztun("routes", "--watch", "--interval", "0", "--socket", socket_path), 2, "--interval")


def test_a_fall_back_and_its_reason_are_shown() -> None:
    reason = "bcc is not there for this Python: install python3-bpfcc [sic]"
    fallen = {"backend": "routes", "fallback_reason": reason}
    for show, answer in ((show_status, {**STATUS, **fallen}), (show_routes, {**ROUTES, **fallen})):
        text = io.StringIO()
        with redirect_stdout(text):
            show(answer)
        assert f"instead of the first choice: {reason}" in " ".join(text.getvalue().split())


def test_down_returns_when_the_instance_is_gone(socket_path: Path) -> None:
    done = ztun("down", "--json", "--socket", socket_path)
    assert json.loads(done.stdout)["state"] == "stopped"
    assert not socket_path.exists()


def test_a_reader_that_goes_away_gets_no_traceback(socket_path: Path) -> None:
    command = f"{sys.executable} -c '{MAIN}' routes --socket {socket_path} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""


def test_output_that_cannot_be_written_is_an_error(socket_path: Path) -> None:
    command = f"{sys.executable} -c '{MAIN}' status --json --socket {socket_path}"
    done = subprocess.run(["bash", "-c", command + " >/dev/full"], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("ztun: cannot print: no space left on device\n", 1)
    done = subprocess.run(["bash", "-c", command + " >&-"], capture_output=True, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)


def test_an_unexpected_error_is_one_line_unless_debugging(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import ztun.control.client as c\nc.find_socket = lambda *a: 1 / 0\n")
    done = ztun("status", PYTHONPATH=str(tmp_path))
    assert_fails(done, 1, "unexpected ZeroDivisionError: division by zero; run it with --log-level debug")
    done = ztun("status", "--log-level", "debug", PYTHONPATH=str(tmp_path))
    assert "Traceback" in done.stderr
    assert done.returncode == 1


def test_commands_start_fast(tmp_path: Path) -> None:
    """Half a second of CPU is generous: it guards against importing all of the gateway for a question to it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ztun("status", "--socket", tmp_path / "nobody.sock")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", MAIN, "status", "--socket", "/nonexistent"],
        capture_output=True,
        text=True,
        check=False,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "ztun.control.client" in imported
    assert imported.isdisjoint({"aiohttp", "pyroute2", "structlog", "asyncio", "bcc", "ztun.config"})
