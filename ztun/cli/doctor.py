"""`ztun doctor`: one line for each check, with the remedy behind it where there is something to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ztun.cli.output import make_console, print_paragraph
from ztun.cli.streams import to_json
from ztun.cli.up import option_environment
from ztun.config import load
from ztun.doctor import Finding, Level, Scene, examine

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}


def run_doctor(
    config: Path | None,
    *,
    proxy: str | None,
    lan: Sequence[str],
    host: bool,
    socket: Path | None,
    log_level: str | None,
    json: bool,
) -> int:
    """Print what was found. Returns 0 when nothing is a problem, else 1. Raises ConfigError for wrong settings."""
    settings = load(config, option_environment(socket), proxy=proxy, lan=lan, host=host)
    from ztun.log.system import LogOptions, log_system

    log_system.configure(LogOptions(level=log_level or "error"))
    scene = Scene(settings, config, timeout=min(settings.timeouts.dial, 5.0))
    findings = asyncio.run(examine(scene))
    counts = Counter(finding.level for finding in findings)
    if json:
        print(to_json(_describe(findings, counts)))
    else:
        _show(make_console(), findings, counts)
    return 1 if counts[Level.PROBLEM] else 0


def _describe(findings: Sequence[Finding], counts: Counter[Level]) -> dict[str, Any]:
    return {
        "findings": [{**finding._asdict(), "level": finding.level.value} for finding in findings],
        **{level.value: counts[level] for level in Level},
    }


def _show(console: Console, findings: Sequence[Finding], counts: Counter[Level]) -> None:
    for finding in findings:
        first = f"{finding.level.value:<8} {finding.name:<15} "
        line = Text.assemble((first[:8], _STYLES[finding.level]), first[8:], finding.detail)
        remedy = f"-> {finding.remedy}" if finding.remedy else ""
        if not console.is_terminal:
            console.print(f"{line.plain} {remedy}".rstrip(), soft_wrap=True)
            continue
        print_paragraph(console, line, hang=len(first))
        if remedy:
            print_paragraph(console, remedy, indent=" " * len(first), hang=3)
    said = [f"{counts[level]} {level.value}" for level in Level]
    console.print(f"{len(findings)} checks: {', '.join(said)}")
