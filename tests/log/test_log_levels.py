"""Levels: one in general, some of components, changed while the process runs."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from log.conftest import Log
from ztun.config import LogSettings
from ztun.config.models import LevelSettings
from ztun.errors import ConfigError
from ztun.log.components import COMPONENTS, LEVELS, Levels, component_name

SOURCE = Path(__file__).parents[2] / "ztun"


def test_a_line_below_the_level_is_not_written(log: Log) -> None:
    log.get().debug("quiet")
    log.get().info("loud")

    assert log.said() == ["loud"]


def test_a_component_can_be_louder_and_quieter_than_the_others(log: Log) -> None:
    log.configure(level="info", levels={"stack": "debug", "dns": "error"})
    for name in ("ztun.app", "ztun.stack", "ztun.dns", "ztun.dns.upstream"):
        log.get(name).debug("fine")
        log.get(name).info("notable")
        log.get(name).error("bad")

    assert [(event["logger"], event["event"]) for event in log.events] == [
        ("ztun.app", "notable"),
        ("ztun.app", "bad"),
        ("ztun.stack", "fine"),
        ("ztun.stack", "notable"),
        ("ztun.stack", "bad"),
        ("ztun.dns", "bad"),
        ("ztun.dns.upstream", "bad"),
    ]


def test_loggers_made_before_a_change_follow_it(log: Log) -> None:
    logger = log.get("ztun.stack")
    logger.debug("before")
    log.system.levels.set("debug", "stack")
    logger.debug("between")
    log.system.levels.set("default", "stack")
    logger.debug("after")

    assert log.said() == ["between"]


def test_the_general_level_leaves_those_with_their_own_alone() -> None:
    levels = Levels()
    levels.configure("info", {"dns": "error"})

    levels.set("debug")
    assert levels.snapshot()["components"] == dict.fromkeys(COMPONENTS, "debug") | {"dns": "error"}

    levels.set("warning", "dns")
    levels.set("debug", "udp")
    levels.set("default")
    assert levels.snapshot() == {
        "level": "info",
        "components": dict.fromkeys(COMPONENTS, "info") | {"dns": "error"},
        "own": ["dns"],
    }


def test_back_to_default_is_back_to_what_was_configured() -> None:
    levels = Levels()
    levels.configure("warning", {"dns": "error"})
    for component in ("dns", "udp"):
        levels.set("debug", component)
        levels.set("default", component)

    assert levels.snapshot()["components"]["dns"] == "error"
    assert levels.snapshot()["components"]["udp"] == "warning"
    assert levels.snapshot()["own"] == ["dns"]


@pytest.mark.parametrize(
    ("level", "component", "says"),
    [
        ("loud", None, "'loud' is no level; use debug, info, warning, error or default"),
        ("debug", "stak", "there is no component 'stak'; did you mean stack? known: app, classifier, "),
        ("debug", "", "there is no component ''; known: app, classifier, "),
    ],
)
def test_what_is_not_there_is_named_with_what_is(level: str, component: str | None, says: str) -> None:
    levels = Levels()
    with pytest.raises(ValueError, match="^" + says.replace("?", r"\?")):
        levels.set(level, component)
    assert levels.snapshot()["own"] == []


def test_a_level_that_is_none_is_a_configuration_error(log: Log) -> None:
    with pytest.raises(ConfigError, match="'loud' is no level"):
        log.configure(level="loud")


def test_libraries_speak_up_from_warning_on_and_at_debug_from_debug_on(log: Log) -> None:
    def speak() -> None:
        library = logging.getLogger("aiohttp.server")
        library.debug("a detail")
        library.info("news")
        library.warning("trouble with %s", "it")

    speak()
    log.system.levels.set("debug", "libraries")
    speak()
    log.system.levels.set("error", "libraries")
    speak()

    assert log.said() == ["trouble with it", "a detail", "news", "trouble with it"]
    assert set(log.said("logger")) == {"aiohttp.server"}


def test_every_component_can_be_configured() -> None:
    assert list(LevelSettings.model_fields) == list(COMPONENTS)
    assert LogSettings().level in LEVELS


def test_every_logger_in_the_source_belongs_to_a_component() -> None:
    names = {
        node.args[0].value
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", None) in ("get_logger", "bound")
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }

    assert {"ztun.app", "ztun.dns", "ztun.flow"} <= names
    assert [name for name in names if component_name(str(name)) == "libraries"] == []


def test_events_are_fixed_texts() -> None:
    """What differs goes into values: only so repeats are found and lines can be searched for."""
    filled = [
        f"{path.name}:{node.lineno}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("debug", "info", "warning", "error", "exception")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("log", "names_log")
        and not isinstance(node.args[0], ast.Constant)
    ]

    assert filled == []
