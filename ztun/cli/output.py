"""How the commands print for people: tables of at most the terminal's width, numbers with units."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

INDENT = "  "  # of every section
_NARROWEST = 6  # columns that a cut text keeps
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


def rows(
    console: Console, entries: Iterable[Mapping[str, Any]], *, numbers: Iterable[str] = (), keep: Iterable[str] = ()
) -> None:
    """Print a table like `table`, but each row on one line: the longest texts are cut, with an ellipsis.

    keep: columns that are never cut; nor are those of `numbers`.
    """
    cells = [{key: say(value) for key, value in entry.items()} for entry in entries]
    columns = list(dict.fromkeys(key for entry in cells for key in entry))
    right, fixed = set(numbers), {*numbers, *keep}
    names = {column: column.replace("_", " ") for column in columns}
    widths = {column: max(len(names[column]), *(len(cell.get(column, "-")) for cell in cells)) for column in columns}
    _narrow(widths, [column for column in columns if column not in fixed], console.width - len(INDENT))
    lines = [
        INDENT + "  ".join(_fit(cell.get(column, "-"), widths[column], column in right) for column in columns).rstrip()
        for cell in [names, *cells]
    ]
    print_line(console, lines[0], style="dim")
    # Past rich, which takes many times as long for the rows of a large table.
    console.file.writelines(f"{_fit(line, console.width, False).rstrip()}\n" for line in lines[1:])


def print_line(console: Console, line: str | Text, style: str = "") -> None:
    """Print one line, cut at the console's width."""
    text = Text(line, style) if isinstance(line, str) else line
    text.rstrip()
    console.print(text, no_wrap=True, overflow="ellipsis", crop=True)


def print_paragraph(console: Console, text: str | Text, *, indent: str = "", hang: int = 2, style: str = "") -> None:
    """Print words over as many lines as it takes, those behind the first indented by `hang` more columns.

    A Text keeps its styles, and the spaces it begins with.
    """
    said = Text(text, style) if isinstance(text, str) else text
    room = max(console.width - len(indent), hang + _NARROWEST)
    lines = textwrap.wrap(
        said.plain, room, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False
    )
    place = 0
    for number, line in enumerate(lines):
        words = line[hang:] if number else line
        place = said.plain.index(words, place)
        piece = said[place : place + len(words)]
        place += len(words)
        front = indent + (" " * hang if number else "")
        console.print(Text.assemble(front, piece), no_wrap=True, overflow="ignore", crop=False)


def _narrow(widths: dict[str, int], cuttable: list[str], room: int) -> None:
    """Take from the widest of the columns that may be cut until all fit."""
    excess = sum(widths.values()) + 2 * (len(widths) - 1) - room
    while excess > 0:
        widest = max(cuttable, key=widths.__getitem__, default=None)
        if widest is None or widths[widest] <= _NARROWEST:
            return
        widths[widest] -= 1
        excess -= 1


def _fit(text: str, width: int, right: bool) -> str:
    if len(text) > width:
        text = text[: width - 1] + "…"
    return text.rjust(width) if right else text.ljust(width)


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


def say_count(count: float) -> str:
    """A number that may be very large, in at most ten characters."""
    if count < 10_000_000_000:
        return str(round(count))
    for unit in ("G", "T", "P"):
        count /= 1000 if unit != "G" else 1e9
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count:.0f} P"


def say_rate(per_second: float) -> str:
    """What happens so often a second: one decimal below ten."""
    return f"{per_second:.1f}" if 0 < per_second < 10 else say_count(per_second)
