"""One instance at a time, shown with real processes: a lock that vanishes with its holder, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ztun.control import lock
from ztun.control.lock import AlreadyRunning, InstanceLock
from ztun.errors import ZtunError

HOLD = """
import pathlib, sys
from ztun.control import lock
lock.NAMESPACE_DIRECTORY = pathlib.Path(sys.argv[2])
instance = lock.InstanceLock(sys.argv[1])
instance.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def namespace(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the locks of network namespaces lie: not where those of real instances do."""
    directory = tmp_path_factory.mktemp("namespace")
    monkeypatch.setattr(lock, "NAMESPACE_DIRECTORY", directory)
    return directory


@contextmanager
def holder(path: Path, namespace: str | Path = "/nonexistent") -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `path`, and that of our network namespace if told where it lies."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(namespace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_instance_is_told_the_pid_of_the_first_and_changes_nothing(tmp_path: Path) -> None:
    socket_path = tmp_path / "run" / "control.sock"
    with holder(socket_path) as first:
        before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
        with pytest.raises(AlreadyRunning, match=f"already running as pid {first.pid}; stop it"):
            InstanceLock(socket_path).acquire()
        assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_another_socket_in_the_same_network_namespace_is_refused_too(tmp_path: Path, namespace: Path) -> None:
    with (
        holder(tmp_path / "a.sock", namespace) as first,
        pytest.raises(AlreadyRunning, match=f"in this network namespace as pid {first.pid};"),
    ):
        InstanceLock(tmp_path / "sub" / "b.sock").acquire()
    assert not (tmp_path / "sub").exists()


def test_release_leaves_the_file_system_as_it_was(tmp_path: Path, namespace: Path) -> None:
    instance = InstanceLock(tmp_path / "a" / "b" / "control.sock")
    instance.acquire()
    assert (tmp_path / "a" / "b" / "control.sock.lock").read_text() == f"{os.getpid()}\n"
    assert len(list(namespace.iterdir())) == 1
    instance.release()
    instance.release()
    assert list(tmp_path.iterdir()) == []
    assert list(namespace.iterdir()) == []


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    instance = InstanceLock(tmp_path / "run" / "control.sock")
    instance.acquire()
    instance.release()
    assert (tmp_path / "run").is_dir()


def test_after_kill_9_the_next_one_simply_starts(tmp_path: Path, namespace: Path) -> None:
    socket_path = tmp_path / "control.sock"
    with holder(socket_path, namespace) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        instance = InstanceLock(socket_path)
        instance.acquire()
        assert (tmp_path / "control.sock.lock").read_text() == f"{os.getpid()}\n"
        instance.release()


def test_a_lock_file_removed_between_open_and_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former holder unlinks its file while we wait at the door: locking the orphan would let a third one in."""
    socket_path = tmp_path / "control.sock"
    flock = lock.fcntl.flock

    def unlink_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(lock.fcntl, "flock", flock)
        (tmp_path / "control.sock.lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(lock.fcntl, "flock", unlink_first)
    instance = InstanceLock(socket_path)
    instance.acquire()
    with pytest.raises(AlreadyRunning, match=f"as pid {os.getpid()}"):
        InstanceLock(socket_path).acquire()
    instance.release()


def test_a_place_that_cannot_be_written_is_one_line_naming_the_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ZtunError, match=r"cannot make the lock file .*File exists; set control\.socket") as caught:
        InstanceLock(tmp_path / "file" / "control.sock").acquire()
    assert "\n" not in str(caught.value)
