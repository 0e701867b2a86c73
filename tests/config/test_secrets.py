"""Who may read and write the configuration file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ztun.config import ConfigError, Settings, load
from ztun.config.secrets import check_file

SECRET = {"tag": "office", "type": "socks5", "server": "10.1.1.1:1080", "username": "u", "password": "p"}
ANOTHER = {**SECRET, "tag": "web", "type": "http"}
OPEN = {"tag": "free", "type": "socks5", "server": "10.1.1.1:1080"}


def written(tmp_path: Path, mode: int, *outbounds: dict[str, str]) -> tuple[Path, Settings]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"outbounds": outbounds}))
    path.chmod(mode)
    return path, load(path, {})


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o660, 0o750])
def test_nothing_is_said_of_a_private_file(tmp_path: Path, mode: int) -> None:
    assert check_file(*written(tmp_path, mode, SECRET)) == []


def test_passwords_that_others_can_read_are_warned_about(tmp_path: Path) -> None:
    path, settings = written(tmp_path, 0o644, SECRET, OPEN)
    expected = f"{path}: everybody can read the password of office (mode 0644); chmod 0600 {path}"
    assert check_file(path, settings) == [expected]
    assert "passwords of office, web" in check_file(*written(tmp_path, 0o604, SECRET, ANOTHER))[0]


def test_without_passwords_others_may_read_it(tmp_path: Path) -> None:
    assert check_file(*written(tmp_path, 0o644, OPEN)) == []


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o777])
def test_a_file_that_everybody_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    path, settings = written(tmp_path, mode, OPEN)
    with pytest.raises(ConfigError, match=rf"everybody can change it \(mode {mode:04o}\).*: chmod 0600 {path}"):
        check_file(path, settings)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    _, settings = written(tmp_path, 0o600, SECRET)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o666)
    assert check_file(fifo, settings) == []


def test_a_file_that_went_is_none(tmp_path: Path) -> None:
    path, settings = written(tmp_path, 0o644, SECRET)
    path.unlink()
    assert check_file(path, settings) == []
