"""docs/reliability.md is true to the tests: each fault names one that exists and always runs."""

from __future__ import annotations

from documented import ROOT, has_unreadable, missing, nodes_in, not_collected

_TEXT = (ROOT / "docs" / "reliability.md").read_text()
_TABLES = [part.splitlines()[2:] for part in _TEXT.split("\n\n") if part.startswith("| fault |")]
_ROWS = [row for table in _TABLES for row in table]


def test_each_fault_names_tests_that_exist() -> None:
    assert len(_ROWS) > 20
    assert [row for row in _ROWS if not nodes_in(row) or has_unreadable(row)] == []
    problems = {node: why for node in nodes_in(_TEXT) if (why := missing(node)) is not None}
    assert problems == {}


def test_make_test_runs_them() -> None:
    assert not_collected(nodes_in(_TEXT)) == set()
