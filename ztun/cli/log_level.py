"""`ztun log-level` for a person: the general level, and every component with its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ztun.cli.output import make_console, table


def show_log_levels(answer: Mapping[str, Any]) -> None:
    """Print the body of GET /log-level."""
    console = make_console()
    console.print(f"level {answer['level']}", style="bold")
    own = set(answer["own"])
    rows = [
        {"component": name, "level": level, "": "its own" if name in own else ""}
        for name, level in answer["components"].items()
    ]
    console.print(table(rows))
