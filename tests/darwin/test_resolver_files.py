"""Files for the directory of resolver(5), in a directory of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ztun.errors import ZtunError
from ztun.platform.darwin import instances
from ztun.platform.darwin.resolver import ResolverFiles, left_over, sweep, tag


def dead_pid() -> int:
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def test_a_file_for_each_domain_and_none_at_the_end(tmp_path: Path) -> None:
    directory = tmp_path / "resolver"
    files = ResolverFiles("198.18.0.2", ["corp.example", "corp.example", "xn--bcher-kva.example"], directory)
    files.up()
    assert sorted(path.name for path in directory.iterdir()) == ["corp.example", "xn--bcher-kva.example"]
    assert (directory / "corp.example").read_text() == f"{tag(os.getpid())}\nnameserver 198.18.0.2\n"
    assert (directory / "corp.example").stat().st_mode & 0o777 == 0o644
    files.down()
    files.down()
    assert not directory.exists()


def test_somebody_elses_file_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "corp.example").write_text("nameserver 10.0.0.1\n")
    files = ResolverFiles("198.18.0.2", ["corp.example", "other.example"], tmp_path)
    files.up()
    assert (tmp_path / "corp.example").read_text() == "nameserver 10.0.0.1\n"
    files.down()
    assert [path.name for path in tmp_path.iterdir()] == ["corp.example"]


def test_no_domain_can_name_another_place(tmp_path: Path) -> None:
    ResolverFiles("198.18.0.2", ["../x", "a/b", ".", "", "UPPER", "a..b"], tmp_path / "r").up()
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "x").exists()


def test_only_what_a_dead_process_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / "dead.example").write_text(f"{tag(dead_pid())}\nnameserver 198.18.0.2\n")
    (tmp_path / "alive.example").write_text(f"{tag(os.getppid())}\nnameserver 198.18.0.2\n")
    (tmp_path / "foreign.example").write_text("nameserver 10.0.0.1\n")
    assert [path.name for path in left_over(tmp_path)] == ["dead.example"]
    assert sweep(tmp_path) == [f"resolver file {tmp_path / 'dead.example'}"]
    assert sweep(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive.example", "foreign.example"]
    assert sweep(tmp_path / "absent") == []


def test_a_number_that_another_process_got_since_is_no_instance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut: the files in /etc are still there, and most numbers are somebody's."""
    claims, files = tmp_path / "claims", tmp_path / "resolver"
    monkeypatch.setattr(instances, "DIRECTORY", claims)
    files.mkdir()
    (files / "old.example").write_text(f"{tag(os.getppid())}\nnameserver 198.18.0.2\n")
    (files / "mine.example").write_text(f"{tag(os.getpid())}\nnameserver 198.18.0.2\n")
    assert sweep(files) == [f"resolver file {files / 'old.example'}"]
    hold = "import sys; from ztun.lockfiles import *; h = LockFiles(Path(sys.argv[1])); print(h.acquire('a', 'b'))"
    with subprocess.Popen(
        [sys.executable, "-c", f"{hold}; sys.stdout.flush(); sys.stdin.read()", str(claims)],
        stdin=-1,
        stdout=-1,
        text=True,
    ) as living:
        assert living.stdout is not None
        assert living.stdout.readline() == "True\n"
        (files / "living.example").write_text(f"{tag(living.pid)}\nnameserver 198.18.0.2\n")
        assert sweep(files) == []
        living.kill()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ZtunError, match=r"cannot write .*not a directory"):
        ResolverFiles("198.18.0.2", ["corp.example"], tmp_path / "file" / "resolver").up()
