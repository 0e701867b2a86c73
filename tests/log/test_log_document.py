"""docs/logging.md says what there is; the fields of flows are compared with a running gateway in tests/e2e."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ztun.cli.up import log_options
from ztun.config import load
from ztun.log.components import COMPONENTS
from ztun.log.repeats import WINDOW
from ztun.log.system import LogOptions

TEXT = (Path(__file__).parents[2] / "docs" / "logging.md").read_text()


def test_the_components_are_those_there_are() -> None:
    assert dict(re.findall(r"^\| `(\w+)` \| (.+?) \|$", TEXT.partition("\n## Where")[0], re.MULTILINE)) == COMPONENTS


def test_the_defaults_are_those_there_are(tmp_path: Path) -> None:
    block = re.search(r"```json\n(.*?)```", TEXT, re.DOTALL)
    assert block is not None
    path = tmp_path / "ztun.json"
    path.write_text(block[1])
    written, default = load(path, {}), load(None, {})

    assert written.log == default.log
    keys = json.loads(block[1])["log"].keys()
    assert list(keys) == list(type(default.log).model_fields)


def test_the_options_of_the_system_have_the_same_defaults() -> None:
    assert log_options(load(None, {})) == LogOptions(levels={}, credentials=[])


def test_the_passwords_of_all_outbounds_are_told_to_the_log() -> None:
    environ = {"ZTUN_OUTBOUNDS": json.dumps([{"tag": "a", "type": "http", "server": "h:1"}])}
    settings = load(None, environ, proxy="socks5://user:p%40ss@192.0.2.1:1080")

    assert list(log_options(settings).credentials) == [("user", "p@ss")]


def test_counts_come_when_it_says() -> None:
    assert WINDOW == 10
    assert "Ten seconds after" in TEXT
