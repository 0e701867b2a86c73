"""Packet scripts: conversations as files, for those who read packetdrill more easily than Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import script_reader
from conversation import Client, Net

_SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.pkt"))
_OPENS = "+0.0 < S 0:0(0) win 1000 <mss 1000>\n+0.0 app accept\n"


@pytest.mark.parametrize("path", _SCRIPTS, ids=lambda path: path.stem)
def test_the_stack_follows_the_script(talk: Callable[..., Client], path: Path) -> None:
    script_reader.play(path, talk(**script_reader.settings(path)))


def test_there_are_scripts() -> None:
    assert len(_SCRIPTS) >= 7


@pytest.mark.parametrize(
    "wrong",
    [
        "0.0 < S 0:0(0) win 1000",
        "+0.0 ? S 0:0(0)",
        "+0.0 < S 0:5(0) win 1000",
        "+0.0 < X 0:0(0)",
        "+0.0 < S 0:0(0) win 1000 <fast 1>",
        "+0.0 app dance",
        _OPENS,
        _OPENS + "+0.0 > S. 0:0(0) ack 2",
        _OPENS + "+0.0 > S 0:0(0) ack 1",
        _OPENS + "+0.0 > S. 0:0(0) ack 1 <mss 99>",
        _OPENS + "+0.0 is silent",
        _OPENS + "+0.0 > S. 0:0(0) ack 1\n+0.0 is finished",
        _OPENS + "+0.0 > S. 0:0(0) ack 1\n+0.0 > . 1:1(0) ack 1",
    ],
)
def test_a_script_that_is_wrong_is_noticed(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "wrong.pkt"
    path.write_text(wrong)
    with pytest.raises(script_reader.ScriptError):
        script_reader.play(path, Client(Net()))
