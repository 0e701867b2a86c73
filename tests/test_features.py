"""docs/features.md is true to the tests: what it names exists and always runs, and no promise stands without."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import pytest
from documented import ROOT, has_unreadable, missing, nodes_in, not_collected

_DOCUMENT = ROOT / "docs" / "features.md"
_SECTION = re.compile(r"^## (\d+)\. (.+)$")
_REASON = re.compile(r"^(differs: \S+(?: \S+){4,}|measured: `python -m (bench\.\w+)`)$")
_TITLES = [
    "TCP connections", "UDP through SOCKS5", "Graceful shutdown", "Network monitor", "HTTP CONNECT", "Configuration",
    "Fake-IP and DNS", "Rules", "IPv6", "Pool", "Log system", "Statistics", "The LAN and its neighbours",
    "Without BPF, and XDP",
]  # fmt: skip


class Row(NamedTuple):
    section: str
    promise: str
    evidence: str


@cache
def rows() -> list[Row]:
    found, section = [], ""
    for line in _DOCUMENT.read_text().splitlines():
        if heading := _SECTION.match(line):
            section = heading[1]
        elif line.startswith("|") and not line.startswith(("|---", "| Promise |")):
            promise, evidence = (cell.strip() for cell in line.strip("|").split("|"))
            found.append(Row(section, promise, evidence))
    return found


def faults(row: Row) -> list[str]:
    """What is wrong with a row."""
    nodes, reason = nodes_in(row.evidence), _REASON.match(row.evidence)
    wrong = [f"{node}: {why}" for node in nodes if (why := missing(node))]
    if not row.promise:
        wrong.append("promises nothing")
    if has_unreadable(row.evidence):
        wrong.append("has a test that cannot be read")
    if not nodes and not reason:
        wrong.append("has neither a test nor a reason")
    if reason and reason[2] and not (ROOT / f"{reason[2].replace('.', '/')}.py").is_file():
        wrong.append("is measured by nothing")
    return wrong


def test_every_section_is_here_in_order_with_its_promises() -> None:
    headings = [found.groups() for line in _DOCUMENT.read_text().splitlines() if (found := _SECTION.match(line))]
    assert headings == [(str(number), title) for number, title in enumerate(_TITLES, 1)]
    for number, title in headings:
        assert sum(row.section == number for row in rows()) >= 5, title


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.section}-{row.promise[:40]}")
def test_each_promise_has_what_shows_it(row: Row) -> None:
    assert faults(row) == []


def test_every_test_that_is_named_is_run_by_make_test() -> None:
    assert not not_collected(node for row in rows() for node in nodes_in(row.evidence))


@pytest.mark.parametrize(
    ("evidence", "fault"),
    [
        ("", "neither"),
        ("measured: somehow", "neither"),
        ("measured: `python -m bench.nothing`", "measured by nothing"),
        ("differs: no", "neither"),
        ("`tests/test_features.py::test_nothing`", "no such test"),
        ("`tests/nothing.py::test_nothing`", "no such file"),
        ("`test_features.py::test_nothing`", "cannot be read"),
    ],
)
def test_a_fault_is_noticed(evidence: str, fault: str) -> None:
    assert any(fault in wrong for wrong in faults(Row("1", "something", evidence)))
