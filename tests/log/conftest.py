"""A log of its own for each test, written to a file in its directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from ztun.log.system import LogOptions, LogSystem


class Log:
    """A LogSystem and what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.system = LogSystem()

    def configure(self, **options: Any) -> None:
        self.system.configure(LogOptions(**{"file": self.path, "format": "json"} | options))

    def get(self, name: str = "ztun.app") -> Any:
        return self.system.bound(name)

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def said(self, key: str = "event") -> list[Any]:
        return [event.get(key) for event in self.events]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    """At info, as JSON; `configure` again for something else. What is global is as before afterwards."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    made = Log(tmp_path / "ztun.log")
    made.configure()
    yield made
    made.system.close()
    root.handlers[:], root.level = handlers, level
    structlog.configure(**before)


@pytest.fixture
def console(log: Log) -> Callable[..., str]:
    """The one line that a call makes in the console format, without its time."""

    def line(event: str, **values: Any) -> str:
        log.configure(format="console")
        log.get().info(event, **values)
        return log.text.splitlines()[-1][len("2026-11-22 21:35:12 ") :]

    return line
