"""`ztun routes` for a person: what is installed in the kernel, and how often each part of it was hit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from ztun.cli.output import heading, make_console, say, say_bytes, table

# What the ids in the tables mean (ztun/ports.py).
RULE_NAMES = {-1: "default", -2: "built in", -3: "fake ip", -4: "dns hijack"}

_NUMBERS = ("id", "rule", "hits", "packets", "bytes", "value")
_BACKENDS = {
    "tcx": "BPF on TCX links; they vanish with the process",
    "clsact": "BPF in clsact filters; a heartbeat lets traffic pass when the process is gone",
    "routes": "no BPF: routes alone decide",
}


def show_routes(answer: Mapping[str, Any]) -> None:
    """Print the body of GET /routes."""
    console = make_console()
    backend = str(answer.get("backend", "unknown"))
    console.print(f"backend {backend}", style="bold", end="")
    console.print(f"  {_BACKENDS[backend]}" if backend in _BACKENDS else "", style="dim")
    if answer.get("fallback_reason"):
        console.print(f"  instead of the first choice: {answer['fallback_reason']}", style="yellow", soft_wrap=True)
    _show_lines(console, "Routes", answer.get("routes"))
    _show_lines(console, "IP rules", answer.get("ip_rules"))
    rules = list(answer.get("rules") or ())
    if rules:
        heading(console, "Rules")
        console.print(table(rules, numbers=["rule"]))
    programs = [dict(program) for program in answer.get("programs") or ()]
    heading(console, "Programs", "" if programs else "none")
    if programs:
        console.print(table(programs, numbers=["id"]))
    for entry in answer.get("maps") or ():
        _show_map(console, entry)
    _show_counters(console, answer.get("counters") or {})


def _show_lines(console: Console, title: str, entries: Any) -> None:
    entries = list(entries or ())
    heading(console, title, "" if entries else "none")
    for entry in entries:
        console.print("  " + _line(entry))


def _line(entry: Any) -> str:
    """A route or rule as iproute2 would write it: the destination first, then `key value` pairs."""
    if not isinstance(entry, Mapping):
        return say(entry)
    first = next((key for key in ("destination", "dst", "prefix", "route") if key in entry), None)
    words = [say(entry[first])] if first else []
    words += [
        f"{key.replace('_', ' ')} {say(value)}" for key, value in entry.items() if key != first and value is not None
    ]
    return " ".join(words)


def _show_map(console: Console, entry: Mapping[str, Any]) -> None:
    rows = [_map_row(row) for row in _entries(entry.get("entries"))]
    count = "1 entry" if len(rows) == 1 else f"{len(rows)} entries"
    heading(console, f"Map {entry.get('name', '?')}", f"{entry.get('type', '')}, {count}")
    if rows:
        console.print(table(rows, numbers=_NUMBERS))


def _entries(entries: Any) -> list[Any]:
    if isinstance(entries, Mapping):
        return [{"key": key, "value": value} for key, value in entries.items()]
    return list(entries or ())


def _map_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        return {"entry": row}
    shown = dict(row)
    value = shown.get("value")
    if isinstance(value, Mapping):
        del shown["value"]
        shown |= value
    if "rule" in shown:
        shown["rule"] = RULE_NAMES.get(shown["rule"], shown["rule"])
    return shown


def _show_counters(console: Console, counters: Mapping[str, Any]) -> None:
    seen = {
        name: figures for name, figures in counters.items() if not isinstance(figures, Mapping) or any(figures.values())
    }
    heading(console, "Counters", "" if seen else "nothing seen yet")
    rows = []
    for name, figures in seen.items():
        if isinstance(figures, Mapping):
            size = {"size": say_bytes(figures["bytes"])} if "bytes" in figures else {}
            rows.append({"verdict": name, **figures, **size})
        else:
            rows.append({"verdict": name, "packets": figures})
    if rows:
        console.print(table(rows, numbers=("packets", "bytes", "size")))
