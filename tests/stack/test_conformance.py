"""docs/conformance.md is true to the tests: what it names exists and runs, and nothing of RFC 9293 is left out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

_ROOT = Path(__file__).parents[2]
_DOCUMENT = _ROOT / "docs" / "conformance.md"
_NODE = re.compile(r"`(tests/[\w/]+\.py::test_\w+(?:\[[^`]*\])?)`")
_ANY_NODE = re.compile(r"`[^`]*::[^`]*`")
_REASON = re.compile(r"^(n/a|differs): \S+(?: \S+){2,}")
_NUMBERED = re.compile(r"^(MUST|SHLD|MAY|REC)-\d+$")
_LEVEL = re.compile(r"^(MUST|SHOULD|MAY|RECOMMENDED|must|should|may)( NOT| not)?( exceed)?$")
_SKIPS = re.compile(r"\bpytest\.(?:mark\.)?(?:skip|xfail|importorskip)")  # nowhere in a file that is named
_HEADING = "| Requirement | Level | Shown by, or why not |"

# RFC 9293 appendix B, counted: the numbers run without a gap.
_APPENDIX_B = {
    f"{kind}-{n}" for kind, last in (("MUST", 69), ("SHLD", 31), ("MAY", 18), ("REC", 1)) for n in range(1, last + 1)
}


class Row(NamedTuple):
    line: int
    ident: str
    requirement: str
    level: str
    evidence: str

    @property
    def nodes(self) -> list[str]:
        return _NODE.findall(self.evidence)


@cache
def rows() -> list[Row]:
    found = []
    for number, line in enumerate(_DOCUMENT.read_text().splitlines(), 1):
        if not line.startswith("|") or line.startswith("|---") or line.endswith(_HEADING):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 4, f"line {number} has {len(cells)} cells"
        found.append(Row(number, *cells))
    return found


def faults(row: Row) -> list[str]:
    """What is wrong with a row, in itself."""
    wrong = []
    if not row.ident or not row.requirement:
        wrong.append("says not what it is about")
    if not _LEVEL.match(row.level):
        wrong.append(f"has the level {row.level!r}")
    if not row.nodes and not _REASON.match(row.evidence):
        wrong.append("has neither a test nor a reason")
    if len(row.nodes) != len(_ANY_NODE.findall(row.evidence)):
        wrong.append("has a test that cannot be read")
    return wrong


@cache
def functions_of(path: str) -> set[str]:
    """The names of a file's functions."""
    tree = ast.parse((_ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def missing(node: str) -> str | None:
    """Why a node id names no test that always runs, or None."""
    path, _, name = node.partition("::")
    name = name.partition("[")[0]
    if not (_ROOT / path).is_file():
        return "no such file"
    if name not in functions_of(path):
        return "no such test"
    folders = [folder for folder in (_ROOT / path).parents if folder.is_relative_to(_ROOT / "tests")]
    for file in [_ROOT / path, *(folder / "conftest.py" for folder in folders)]:
        if file.is_file() and _SKIPS.search(file.read_text()):
            return "may be skipped, or is expected to fail"
    return None


def test_there_are_rows() -> None:
    assert len(rows()) > 250
    assert sum(bool(row.nodes) for row in rows()) > 200


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.line}-{row.ident}")
def test_each_row_says_what_shows_it(row: Row) -> None:
    assert not faults(row)
    assert {node: why for node in row.nodes if (why := missing(node))} == {}


def test_appendix_b_is_here_and_nothing_of_it_twice() -> None:
    numbered = [row.ident for row in rows() if _NUMBERED.match(row.ident)]
    assert sorted(numbered) == sorted(_APPENDIX_B)


def test_levels_of_numbered_requirements_are_those_of_their_names() -> None:
    level = {"MUST": {"MUST", "MUST NOT"}, "SHLD": {"SHOULD", "SHOULD NOT"}, "MAY": {"MAY"}, "REC": {"SHOULD"}}
    for row in rows():
        if _NUMBERED.match(row.ident):
            assert row.level in level[row.ident.split("-")[0]], row


def test_every_test_that_is_named_is_run_by_make_test() -> None:
    """pytest is asked, with the arguments of `make test` (none): what it selects is what it runs."""
    paths = sorted({node.partition("::")[0] for row in rows() for node in row.nodes})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    listing = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=100)
    assert listing.returncode == 0, listing.stdout[-2000:]
    collected = set(listing.stdout.splitlines())
    plain = {node.partition("[")[0] for node in collected}
    unknown = {node for row in rows() for node in row.nodes if node not in (collected if "[" in node else plain)}
    assert not unknown
    assert "deselected" not in listing.stdout


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row(1, "MUST-1", "something", "MUST", ""), "neither"),
        (Row(1, "MUST-1", "something", "MUST", "n/a:"), "neither"),
        (Row(1, "MUST-1", "something", "MUST", "see above"), "neither"),
        (Row(1, "MUST-1", "something", "PERHAPS", "n/a: we never send a SYN"), "level"),
        (Row(1, "MUST-1", "", "MUST", "n/a: we never send a SYN"), "about"),
        (Row(1, "MUST-1", "something", "MUST", "`test_tcp_close.py::test_x`"), "read"),
    ],
)
def test_a_fault_is_noticed(row: Row, fault: str) -> None:
    assert any(fault in wrong for wrong in faults(row))


def test_a_test_that_is_not_there_is_noticed() -> None:
    here = "tests/stack/test_conformance.py"
    assert missing(f"{here}::test_there_are_rows") is None
    assert missing(f"{here}::test_there_are_no_rows") == "no such test"
    assert missing("tests/stack/test_nothing.py::test_there_are_rows") == "no such file"


@pytest.mark.parametrize("how", ["mark.skipif(True)", "mark.xfail", "skip('not here')", "importorskip('bcc')"])
def test_a_test_that_may_not_run_is_noticed(how: str) -> None:
    assert _SKIPS.search(f"    pytest.{how}")
