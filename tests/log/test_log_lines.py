"""Lines: what a person reads and what a program reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from log.conftest import Log
from ztun.log.lines import Console, write_value


def test_a_json_line_is_one_object_with_its_own_fields_first(log: Log) -> None:
    log.get("ztun.dns").warning("DNS server does not answer", server="udp://192.0.2.1:53", tries=3, ok=False, why=None)

    event = log.events[0]
    assert list(event) == ["timestamp", "level", "logger", "event", "server", "tries", "ok", "why"]
    assert datetime.fromisoformat(event.pop("timestamp")).utcoffset() is not None
    assert event == {
        "level": "warning",
        "logger": "ztun.dns",
        "event": "DNS server does not answer",
        "server": "udp://192.0.2.1:53",
        "tries": 3,
        "ok": False,
        "why": None,
    }


def test_a_value_cannot_take_the_place_of_the_lines_own_fields(log: Log) -> None:
    log.get().info("real", level="error", logger="root", timestamp="never")

    event = log.events[0]
    assert (event["level"], event["logger"]) == ("info", "ztun.app")
    assert (event["level_"], event["logger_"]) == ("error", "root")
    assert event["timestamp"] != "never"


def test_numbers_that_json_does_not_know_are_texts(log: Log) -> None:
    log.get().info("odd", a=float("inf"), b=float("nan"), c={"deep": [float("-inf"), 1.5]})

    assert "Infinity" not in log.text
    assert log.events[0]["a"] == "inf"
    assert log.events[0]["c"] == {"deep": ["-inf", 1.5]}


def test_what_is_no_json_is_written_as_text(log: Log) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    log.get().info("odd", a=OSError(2, "gone"), b=b"\xffabc\x00", c={1: {2, 3}.__class__}, d=Broken())

    event = log.events[0]
    assert event["a"] == "[Errno 2] gone"
    assert event["b"] == "\\xffabc\\x00"
    assert event["d"] == "<Broken that cannot be written: RuntimeError>"


def test_a_console_line_is_one_line_for_a_person(console: Callable[..., str]) -> None:
    assert (
        console("it happened", name="www.site.test", count=3, share=0.5, ok=True, nothing=None, said="two words")
        == 'info    app: it happened name=www.site.test count=3 share=0.5 ok=true nothing=- said="two words"'
    )


def test_a_value_cannot_pass_for_several(console: Callable[..., str]) -> None:
    """A name or a reason phrase is whatever somebody sent."""
    assert (
        console("flow ended", name="a outbound=direct how=finished", reason='he said "no"', empty="")
        == 'info    app: flow ended name="a outbound=direct how=finished" reason="he said \\"no\\"" empty=""'
    )


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(st.characters(codec="utf-8")), min_size=1))
def test_console_values_can_be_told_apart_again(values: dict[str, str]) -> None:
    line = " ".join(f"{key}={write_value(value)}" for key, value in values.items())

    found: dict[str, str] = {}
    while line:
        key, _, line = line.partition("=")
        if line.startswith('"'):
            value, end = json.JSONDecoder().raw_decode(line)
            found[key], line = value, line[end:].removeprefix(" ")
        else:
            found[key], _, line = line.partition(" ")
    assert found == values


def test_colours_surround_a_plain_line() -> None:
    class Named:
        name = "ztun.app"

    def event() -> dict[str, Any]:
        return {"timestamp": "now", "level": "error", "logger": "ztun.app", "event": "bad", "why": "so it is"}

    plain = Console(colours=False)(Named(), "error", event())
    coloured = Console(colours=True)(Named(), "error", event())

    assert "\x1b" not in plain
    assert "\x1b[31merror" in coloured
    for mark in ("\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m"):
        coloured = coloured.replace(mark, "")
    assert coloured == plain


def test_an_exception_is_named_and_at_debug_shown_whole(log: Log) -> None:
    def fail() -> None:
        secret_local = "only in a variable"  # noqa: F841
        raise KeyError("boom")

    for level in ("info", "debug"):
        log.system.levels.set(level)
        try:
            fail()
        except KeyError:
            log.get().exception("it failed", where="here")

    short, long = log.events
    assert (short["level"], short["error"], short["where"]) == ("error", "KeyError('boom')", "here")
    assert "exception" not in short
    assert "Traceback" in long["exception"]
    assert "raise KeyError" in long["exception"]
    assert "only in a variable" not in json.dumps(long["exception"].split("raise KeyError")[1])


@pytest.mark.parametrize("given", [None, False])
def test_no_exception_is_no_exception(log: Log, given: Any) -> None:
    log.get().info("fine", exc_info=given)

    assert list(log.events[0]) == ["timestamp", "level", "logger", "event"]


def test_a_record_of_a_library_comes_with_its_exception(log: Log) -> None:
    try:
        raise OSError("wire cut")
    except OSError:
        logging.getLogger("somebody").exception("task died")

    assert log.events[0]["error"] == "OSError('wire cut')"


def test_a_long_value_is_cut(log: Log) -> None:
    log.get().info("much", text="x" * 100_000)

    assert log.events[0]["text"].startswith("x" * 2000 + "…")
    assert len(log.text) < 2500
