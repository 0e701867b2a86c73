"""Files that are not there, not JSON, or not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_cases import DESIGN, complaints, parse

from ztun.config import ConfigError, Settings, load


def said(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    assert said(path) == f"{path}: no such file; --config takes the path of a JSON file"


def test_a_directory(tmp_path: Path) -> None:
    assert said(tmp_path) == f"{tmp_path}: cannot be read: is a directory"


def test_a_file_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert said(tmp_path / "file" / "x") == f"{tmp_path}/file/x: cannot be read: not a directory"


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"log": "\xff"}')
    assert said(path) == f"{path}: byte 9 is not UTF-8, which JSON must be"


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    assert isinstance(load(path, {}), Settings)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "line 1, column 1: not JSON: expecting value"),
        ('{\n  "tun": {"mtu": 1500,}\n}', "line 2, column 2"),
        ('{"tun": {"mtu": 1500}\n "log": {}}', "line 2, column 2: not JSON: expecting ',' delimiter"),
        ("{} {}", "line 1, column 4: not JSON: extra data"),
        ("// hello\n{}", "line 1, column 1: not JSON: expecting value"),
        ("[]", "must hold a JSON object, {...}"),
        ('"tun"', "must hold a JSON object, {...}"),
        ('{"timeouts": {"dial": NaN}}', "not JSON: NaN is not JSON"),
        ('{"timeouts": {"dial": -Infinity}}', "not JSON: -Infinity is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"tun": {"mtu": ' + "9" * 5000 + "}}", "not JSON: "),
    ],
)
def test_text_that_is_no_json_object_says_where(text: str, line: str) -> None:
    (complaint,) = complaints(text)
    assert complaint.startswith(line)


def test_keys_that_are_there_twice_are_named_however_deep() -> None:
    text = """{
      "log": {"level": "info", "level": "debug"}, "log": {"format": "json", "format": "json", "format": "json"},
      "outbounds": [{"tag": "a", "tag": "b", "type": "http", "server": "h:1"}]
    }"""
    assert complaints(text) == [
        "outbounds[0].tag: is there more than once; keep one",
        "log: is there more than once; keep one",
        "log.format: is there more than once; keep one",
    ]


def test_the_text_of_the_design_is_taken() -> None:
    assert parse(DESIGN).outbounds[0].tag == "office"


def test_no_file_at_all_gives_what_holds_without_one() -> None:
    assert load(None, {}) == Settings()
