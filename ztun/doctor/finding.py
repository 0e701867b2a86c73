"""What a check found."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Level(Enum):
    """Worst last. PROBLEM: ztun does not start, or does not do what the configuration says."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


class Finding(NamedTuple):
    """name: of the check, as docs/doctor.md lists it; remedy: what to do, empty when there is nothing to do."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    return Finding(name, Level.OK, detail)


def warning(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, Level.WARNING, detail, remedy)


def problem(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name, Level.PROBLEM, detail, remedy)


def judge(name: str, level: Level, detail: str, remedy: str) -> Finding:
    """A finding whose level depends on the configuration."""
    return Finding(name, level, detail, "" if level is Level.OK else remedy)
