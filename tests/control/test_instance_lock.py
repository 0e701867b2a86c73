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

from ztun import lockfiles
from ztun.control.claims import Claim
from ztun.control.lock import AlreadyRunning, InstanceLock
from ztun.errors import ZtunError

HOLD = """
import pathlib, sys
from ztun.control import lock
instance = lock.InstanceLock(sys.argv[1], *map(pathlib.Path, sys.argv[2:]))
instance.acquire()
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(*paths: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the locks of a control socket and, if there are two paths, of a store."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, paths)],
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


def test_the_store_of_another_instance_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "names.db"
    with (
        holder(tmp_path / "a.sock", store) as first,
        pytest.raises(AlreadyRunning) as caught,
    ):
        InstanceLock(tmp_path / "sub" / "b.sock", store).acquire()
    assert str(caught.value) == (
        f"dns.fake_ip.store: {store} is in use by another ztun (pid {first.pid}); choose another file"
    )
    assert not (tmp_path / "sub").exists()


def test_a_store_that_cannot_be_written_keeps_nobody_from_starting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    instance = InstanceLock(tmp_path / "control.sock", tmp_path / "file" / "names.db")
    instance.acquire()
    instance.release()


def test_a_claim_of_another_instance_leaves_nothing_behind(tmp_path: Path) -> None:
    claim = Claim("lan", f"test{os.getpid()}", "capture.lan", "")
    one, two = (InstanceLock(tmp_path / name / "control.sock", claims=[claim]) for name in "ab")
    one.acquire()
    with pytest.raises(ZtunError, match=f"capture.lan: test{os.getpid()} is in use by another ztun .pid {os.getpid()}"):
        two.acquire()
    one.release()
    assert list(tmp_path.iterdir()) == []
    two.acquire()
    two.release()


def test_release_leaves_the_file_system_as_it_was(tmp_path: Path) -> None:
    instance = InstanceLock(tmp_path / "a" / "b" / "control.sock", tmp_path / "c" / "names.db")
    instance.acquire()
    assert (tmp_path / "a" / "b" / "control.sock.lock").read_text() == f"{os.getpid()}\n"
    assert instance.paths() == [tmp_path / "a" / "b" / "control.sock.lock", tmp_path / "c" / "names.db.lock"]
    instance.release()
    instance.release()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    instance = InstanceLock(tmp_path / "run" / "control.sock")
    instance.acquire()
    instance.release()
    assert (tmp_path / "run").is_dir()


def test_after_kill_9_the_next_one_simply_starts(tmp_path: Path) -> None:
    socket_path = tmp_path / "control.sock"
    with holder(socket_path) as first:
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
    flock = lockfiles.fcntl.flock

    def unlink_first(fd: int, operation: int) -> None:
        monkeypatch.setattr(lockfiles.fcntl, "flock", flock)
        (tmp_path / "control.sock.lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(lockfiles.fcntl, "flock", unlink_first)
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
