"""Where lines go: files that rotate and are re-opened, standard error, the journal; full, broken or unread."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from log.conftest import Log
from ztun.errors import ConfigError
from ztun.log.outputs import FileOutput, StreamOutput, is_journal

INFO = 20


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 16 KiB."""
    path = tmp_path / "tiny"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "ztun-test", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# Files.


def test_a_file_is_appended_to_and_others_may_not_read_it(tmp_path: Path) -> None:
    path = tmp_path / "ztun.log"
    path.write_text("from before\n")
    FileOutput(path).write(INFO, "new")
    assert lines_of(path) == ["from before", "new"]

    FileOutput(tmp_path / "fresh.log")
    assert (tmp_path / "fresh.log").stat().st_mode & 0o007 == 0


def test_rotation_keeps_as_many_as_it_should_and_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "ztun.log"
    output = FileOutput(path, limit=1000, keep=3)
    lines = [f"{number:099}" for number in range(35)]  # 100 bytes each with its end
    for line in lines:
        assert output.write(INFO, line)

    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == ["ztun.log", "ztun.log.1", "ztun.log.2", "ztun.log.3"]
    assert [len(lines_of(tmp_path / name)) for name in names] == [5, 10, 10, 10]
    kept = [line for name in reversed(names) for line in lines_of(tmp_path / name)]
    assert kept == lines

    for line in lines:
        output.write(INFO, line)
    assert len(list(tmp_path.iterdir())) == 4


def test_rotation_goes_on_where_an_earlier_run_stopped(tmp_path: Path) -> None:
    path = tmp_path / "ztun.log"
    path.write_text("x" * 950 + "\n")
    output = FileOutput(path, limit=1000, keep=1)
    output.write(INFO, "y" * 99)

    assert lines_of(path) == ["y" * 99]
    assert lines_of(tmp_path / "ztun.log.1") == ["x" * 950]


def test_a_line_longer_than_the_limit_is_still_written_whole(tmp_path: Path) -> None:
    output = FileOutput(tmp_path / "ztun.log", limit=1000, keep=2)
    for letter in "abc":
        output.write(INFO, letter * 3000)

    assert lines_of(tmp_path / "ztun.log") == ["c" * 3000]
    assert lines_of(tmp_path / "ztun.log.1") == ["b" * 3000]


def test_a_file_that_somebody_truncated_is_not_rotated_for_what_it_held(tmp_path: Path) -> None:
    path = tmp_path / "ztun.log"
    output = FileOutput(path, limit=1000, keep=2)
    output.write(INFO, "x" * 900)
    os.truncate(path, 0)  # as logrotate's copytruncate does
    output.write(INFO, "y" * 200)

    assert lines_of(path) == ["y" * 200]
    assert not (tmp_path / "ztun.log.1").exists()


def test_a_rotation_that_fails_costs_no_line(tmp_path: Path) -> None:
    path = tmp_path / "ztun.log"
    (tmp_path / "ztun.log.1" / "in the way").mkdir(parents=True)
    output = FileOutput(path, limit=1000, keep=2)
    (tmp_path / "ztun.log.2" / "too").mkdir(parents=True)
    for number in range(30):
        assert output.write(INFO, f"{number:099}")

    assert lines_of(path) == [f"{number:099}" for number in range(30)]


def test_reopening_follows_a_rename(tmp_path: Path) -> None:
    path = tmp_path / "ztun.log"
    output = FileOutput(path)
    output.write(INFO, "before")
    path.rename(tmp_path / "old")
    output.write(INFO, "between")
    assert output.reopen()
    output.write(INFO, "after")

    assert lines_of(tmp_path / "old") == ["before", "between"]
    assert lines_of(path) == ["after"]


def test_reopening_what_cannot_be_opened_keeps_the_old_file(tmp_path: Path) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    output = FileOutput(directory / "ztun.log")
    directory.rename(tmp_path / "moved")
    assert not output.reopen()
    assert output.fault == "cannot be opened again: No such file or directory"
    assert output.write(INFO, "still here")

    assert lines_of(tmp_path / "moved" / "ztun.log") == ["still here"]


def test_reopening_is_told_in_the_file_that_is_used_then(tmp_path: Path, log: Log) -> None:
    directory = tmp_path / "logs"
    directory.mkdir()
    log.configure(file=directory / "ztun.log")
    assert log.system.reopen()
    moved = directory.rename(tmp_path / "moved")
    assert log.system.reopen()

    events = [json.loads(line) for line in lines_of(moved / "ztun.log")]
    assert [event["event"] for event in events] == ["log file opened again", "log file not opened again"]
    assert events[1]["reason"] == "cannot be opened again: No such file or directory"


def test_without_a_file_there_is_nothing_to_reopen(log: Log) -> None:
    log.configure(file=None)
    assert not log.system.reopen()


def test_descriptors_do_not_pile_up(tmp_path: Path) -> None:
    output = FileOutput(tmp_path / "ztun.log", limit=100, keep=2)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        output.write(INFO, f"{number:060}")
        output.reopen()

    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_cannot_be_opened_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"log.file: cannot write .*/no/such: No such file or directory"):
        FileOutput(tmp_path / "no" / "such")
    with pytest.raises(ConfigError, match="Is a directory"):
        FileOutput(tmp_path)


def test_a_full_disk_costs_lines_and_nothing_else(tiny: Path, log: Log) -> None:
    path = tiny / "ztun.log"
    log.configure(file=path, rotate=None, repeats=None)
    for number in range(400):
        log.get().info("line", number=number, text="x" * 50)

    statistics = log.system.statistics()
    assert statistics["dropped"] > 200
    assert statistics["written"] + statistics["dropped"] == 400
    assert statistics["fault"] == "No space left on device"
    numbers = [json.loads(line)["number"] for line in lines_of(path)]  # every line is whole
    assert numbers == list(range(len(numbers)))

    os.truncate(path, 0)
    log.get().info("line", number=1000)
    log.get().info("line", number=1001)
    events = [json.loads(line) for line in lines_of(path)]
    assert [event.get("number") for event in events] == [1000, None, 1001]
    assert events[1]["event"] == "log lines were lost"
    assert events[1]["count"] == statistics["dropped"]
    assert log.system.statistics()["fault"] is None


def test_rotation_on_a_full_disk_makes_room_again(tiny: Path, log: Log) -> None:
    """Three files of 4 KiB on 16 KiB, with somebody else's 8 KiB."""
    (tiny / "other").write_bytes(bytes(8192))
    log.configure(file=tiny / "ztun.log", rotate=(4096, 1), repeats=None)
    for number in range(500):
        log.get().info("line", number=number)

    newest = json.loads(lines_of(tiny / "ztun.log")[-1])
    assert newest.get("number") == 499 or newest["event"] == "log lines were lost"


def test_a_named_pipe_without_a_reader_does_not_stop_anything(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="No such device or address"):
        FileOutput(path)

    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    output = FileOutput(path, limit=100, keep=1)
    taken = [output.write(INFO, "x" * 999) for _ in range(200)]
    assert 60 <= taken.count(True) <= 65  # a pipe holds 64 KiB
    assert not taken[-1]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["pipe"]
    os.close(reader)
    assert not output.write(INFO, "nobody")
    assert output.fault == "Broken pipe"


# Standard error.


def test_a_pipe_that_nobody_reads_takes_whole_lines_and_then_none() -> None:
    reader, writer = os.pipe()
    output = StreamOutput(writer)
    taken = [output.write(INFO, f"{number:099}") for number in range(2000)]

    assert 600 < taken.count(True) < 700
    assert output.fault == "nobody reads standard error"
    seen = os.read(reader, 1 << 20).decode()
    assert output.write(INFO, "again")
    seen += os.read(reader, 1 << 20).decode()
    whole = [line for line in seen.splitlines() if len(line) == 99]
    assert whole == [f"{number:099}" for number in range(taken.count(True))]
    assert seen.splitlines()[-1] == "again"
    output.close()
    os.close(reader)
    os.close(writer)


def test_the_flag_of_a_shared_descriptor_is_left_alone() -> None:
    reader, writer = os.pipe()
    StreamOutput(writer).close()

    assert os.get_blocking(writer)
    os.close(reader)
    os.close(writer)


def test_a_long_line_that_found_no_room_does_not_join_the_next_one() -> None:
    reader, writer = os.pipe()
    output = StreamOutput(writer)
    assert not output.write(INFO, "long" * 50_000)
    while not output.write(INFO, "short"):
        os.read(reader, 4096)
    text = os.read(reader, 1 << 20).decode()

    assert text.splitlines()[-1] == "short"
    for fd in (reader, writer):
        os.close(fd)


@pytest.mark.parametrize("kind", ["pipe", "socket", "closed"])
def test_a_reader_that_went_away_costs_lines_and_nothing_else(kind: str) -> None:
    if kind == "socket":
        ours, theirs = socket.socketpair()
        theirs.close()
        writer = ours.detach()
    else:
        reader, writer = os.pipe()
        os.close(reader)
    output = StreamOutput(writer)
    if kind == "closed":
        output.close()
        os.close(writer)
        output = StreamOutput(writer)
    assert not output.write(INFO, "anybody?")
    assert output.fault in ("Broken pipe", "Bad file descriptor")


def test_a_terminal_that_was_stopped_does_not_stop_us() -> None:
    keyboard, terminal = pty.openpty()
    output = StreamOutput(terminal)
    taken = [output.write(INFO, "x" * 99) for _ in range(3000)]

    assert taken[0]
    assert not taken[-1]
    os.close(keyboard)
    assert not output.write(INFO, "hung up")
    os.close(terminal)


def test_the_journal_gets_a_priority_with_each_line() -> None:
    ours, journal = socket.socketpair()
    output = StreamOutput(ours.fileno(), with_priority=True)
    for level, line in ((10, "debug"), (20, "info"), (30, "warning"), (40, "bad\nTraceback\nEnd"), (50, "worse")):
        assert output.write(level, line)

    assert journal.recv(1000).decode() == "<7>debug\n<6>info\n<4>warning\n<3>bad\n<3>Traceback\n<3>End\n<2>worse\n"
    ours.close()
    journal.close()


def test_the_journal_is_known_by_device_and_inode() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        status = os.fstat(sock.fileno())
        assert is_journal(sock.fileno(), f"{status.st_dev}:{status.st_ino}")
        assert not is_journal(sock.fileno(), f"{status.st_dev}:{status.st_ino + 1}")
        for strange in (None, "", "8:", "x:y", "8"):
            assert not is_journal(sock.fileno(), strange)


PROGRAM = """
import os, sys
from ztun.log.system import LogOptions, LogSystem
system = LogSystem()
if len(sys.argv) > 2:
    status = os.fstat(2)
    os.environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
system.configure(LogOptions(format=sys.argv[1]))
system.bound("ztun.dns").warning("trouble", name="a b")
"""


def run(*arguments: str, stderr: int, **environment: str) -> None:
    env = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "JOURNAL_STREAM")}
    subprocess.run([sys.executable, "-c", PROGRAM, *arguments], stderr=stderr, env=env | environment, check=True)


def test_colours_are_for_terminals_only() -> None:
    keyboard, terminal = pty.openpty()
    run("console", stderr=terminal, TERM="xterm")
    assert b"\x1b[33mwarning\x1b[0m" in os.read(keyboard, 1000)
    run("console", stderr=terminal, TERM="xterm", NO_COLOR="1")
    run("console", stderr=terminal, TERM="dumb")
    run("json", stderr=terminal, TERM="xterm")
    assert b"\x1b" not in os.read(keyboard, 4000)
    os.close(keyboard)
    os.close(terminal)

    reader, writer = os.pipe()
    run("console", stderr=writer, TERM="xterm")
    assert b"\x1b" not in os.read(reader, 1000)
    os.close(reader)
    os.close(writer)


def test_in_the_journal_lines_have_a_priority_and_no_time() -> None:
    for format, expected in (("console", b'<4>warning dns: trouble name="a b"\n'), ("json", b'<4>{"timestamp":')):
        ours, journal = socket.socketpair()
        run(format, "journal", stderr=ours.fileno())
        assert journal.recv(1000).startswith(expected)
        ours.close()
        journal.close()


def test_without_standard_error_it_goes_on() -> None:
    code = "import os; os.close(2); import sys; sys.stderr = None\n" + PROGRAM
    done = subprocess.run([sys.executable, "-c", code, "console"], check=False)
    assert done.returncode == 0
