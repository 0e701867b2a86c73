"""How the commands print for people: tables of at most the terminal's width, numbers with units."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDE = 240  # columns; two IPv6 addresses with their ports and all that is beside them


def make_console(*, wide: bool = False) -> Console:
    """Plain text in a pipe, 80 columns wide there; colours and the real width in a terminal.

    wide: in a pipe a row stays on its line, for `grep` and the like.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=False)
    if wide and not console.is_terminal:
        console.width = _WIDE
    return console


def heading(console: Console, title: str, note: str = "") -> None:
    """Print the title of a section, with a blank line above."""
    console.print()
    console.print(Text.assemble((title, "bold"), ("  " + note if note else "", "dim")))


def table(rows: Iterable[Mapping[str, Any]], *, numbers: Iterable[str] = ()) -> Table:
    """A table without lines whose columns are the keys of `rows` in order of appearance."""
    kept = list(rows)
    columns = list(dict.fromkeys(key for row in kept for key in row))
    result = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    right = set(numbers)
    result.add_column("", width=0)  # the indentation of every section
    for column in columns:
        result.add_column(
            column.replace("_", " "), justify="right" if column in right else "left", overflow="fold", no_wrap=False
        )
    for row in kept:
        result.add_row("", *(say(row.get(column)) for column in columns))
    return result


def say(value: Any) -> str:
    """A value as a person would write it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, Mapping):
        return " ".join(f"{key}={say(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(say(item) for item in value)
    return str(value)


def say_bytes(count: int) -> str:
    """A number of bytes with a binary unit, e.g. "1.5 MiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def say_duration(seconds: float) -> str:
    """A time span in its two largest units, e.g. "3 h 12 min"."""
    left = int(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])
