"""`ztun up` while the compiler runs, or when it fails."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ztun.lab import Lab, Ztun
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.lab.ztun import complete

HANGING = "import pathlib, time; pathlib.Path(__file__).with_name('compiling').touch(); time.sleep(60)"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as made:
        yield made


@pytest.fixture
def launch(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., Ztun]]:
    """launch(text, **capture): `ztun up` with a bcc whose import runs `text`, temporary files under tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()

    def start(text: str, **capture: str) -> Ztun:
        (tmp_path / "bcc.py").write_text(text)
        instance = lab.prepare()
        instance.write(complete({"capture": capture}, instance.directory))
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
        instance.launch("up", "--config", str(instance.config_path), env=environment)
        return instance

    yield start
    for instance in lab.running():
        instance.kill()


def compiler_of(instance: Ztun) -> int:
    return int(Path(f"/proc/{instance.pid}/task/{instance.pid}/children").read_text())


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_crash_of_the_compiler_is_told_wherever_one_looks(launch: Callable[..., Ztun]) -> None:
    instance = launch("import os; os.abort()")
    instance.wait_ready()
    reason = "BPF programs not loaded: the compiler was ended by signal 6 (Aborted)"
    assert f"routes instead of the first choice: {reason}" in instance.output
    for command in ("routes", "status"):
        arguments = (command, "--socket", str(instance.socket_path))
        answer = json.loads(instance.command(*arguments, "--json").stdout)
        assert (answer["backend"], answer["fallback_reason"]) == ("routes", reason)
        told = " ".join(instance.command(*arguments).stdout.split())  # in lines as wide as the terminal
        assert f"instead of the first choice: {reason}" in told
    assert instance.stop() == 0


def test_a_crash_is_the_end_where_bpf_was_asked_for(launch: Callable[..., Ztun]) -> None:
    instance = launch("import os; os.abort()", backend="bpf")
    assert wait_until(lambda: not instance.alive)
    assert instance.returncode == 1
    # Before it, what an instance that was killed here left behind.
    last = instance.output.splitlines()[-1]
    assert last == "ztun: BPF programs not loaded: the compiler was ended by signal 6 (Aborted)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_compiles_ends_all_of_it(
    lab: Lab, tmp_path: Path, launch: Callable[..., Ztun], number: int
) -> None:
    before = snapshot(lab.gateway)
    instance = launch(HANGING)
    assert wait_until((tmp_path / "compiling").exists)
    compiler = compiler_of(instance)
    assert instance.stop(number, timeout=3) == 0
    assert not is_alive(compiler)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert differences(before, snapshot(lab.gateway)) == []


def test_the_terminals_signals_do_not_reach_the_compiler(tmp_path: Path, launch: Callable[..., Ztun]) -> None:
    instance = launch(HANGING)
    assert wait_until((tmp_path / "compiling").exists)
    assert os.getpgid(compiler_of(instance)) != os.getpgid(instance.pid)
    assert instance.request("GET", "/status")["state"] == "starting"  # and the loop is not held up


def test_the_compiler_does_not_outlive_a_killed_gateway(tmp_path: Path, launch: Callable[..., Ztun]) -> None:
    instance = launch(HANGING)
    assert wait_until((tmp_path / "compiling").exists)
    compiler = compiler_of(instance)
    instance.kill()
    assert wait_until(lambda: not is_alive(compiler))
