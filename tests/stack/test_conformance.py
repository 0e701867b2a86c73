"""docs/conformance.md is true to the tests: what it names exists and runs, and nothing of RFC 9293 is left out."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

import pytest
from documented import ROOT, SKIPS, has_unreadable, missing, nodes_in, not_collected

_DOCUMENT = ROOT / "docs" / "conformance.md"
_REASON = re.compile(r"^(n/a|differs): \S+(?: \S+){2,}")
_NUMBERED = re.compile(r"^(MUST|SHLD|MAY|REC)-\d+$")
_LEVEL = re.compile(r"^(MUST|SHOULD|MAY|RECOMMENDED|must|should|may)( NOT| not)?( exceed)?$")
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
        return nodes_in(self.evidence)


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
    if has_unreadable(row.evidence):
        wrong.append("has a test that cannot be read")
    return wrong


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
    assert not not_collected(node for row in rows() for node in row.nodes)


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
    assert SKIPS.search(f"    pytest.{how}")
