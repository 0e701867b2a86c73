"""Documents that name tests: whether these exist, always run, and are run by `make test`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SKIPS = re.compile(r"\bpytest\.(?:mark\.)?(?:skip|xfail|importorskip)")  # nowhere in a file that is named

_NODE = re.compile(r"`(tests/[\w/]+\.py(?:::Test\w+)?::test_\w+(?:\[[^`]*\])?)`")
_ANY_NODE = re.compile(r"`[^`]*::[^`]*`")


def nodes_in(text: str) -> list[str]:
    """The node ids that a text names between backquotes."""
    return _NODE.findall(text)


def has_unreadable(text: str) -> bool:
    """Whether it names something that looks like a test and is no node id."""
    return len(nodes_in(text)) != len(_ANY_NODE.findall(text))


@cache
def functions_of(path: str) -> set[str]:
    """The names of a file's functions, and of the methods of its classes with the class in front."""
    names = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = (each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}::{each.name}" for each in inner}
    return names


def missing(node: str) -> str | None:
    """Why a node id names no test that always runs, or None."""
    path, _, name = node.partition("::")
    name = name.partition("[")[0]
    if not (ROOT / path).is_file():
        return "no such file"
    if name not in functions_of(path):
        return "no such test"
    folders = [folder for folder in (ROOT / path).parents if folder.is_relative_to(ROOT / "tests")]
    for file in [ROOT / path, *(folder / "conftest.py" for folder in folders)]:
        if file.is_file() and SKIPS.search(file.read_text()):
            return "may be skipped, or is expected to fail"
    return None


def not_collected(nodes: Iterable[str]) -> set[str]:
    """Those that `make test` would not run. pytest is asked, with its arguments (none). Raises AssertionError."""
    wanted = set(nodes)
    paths = sorted({node.partition("::")[0] for node in wanted})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *paths]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert listing.returncode == 0, listing.stdout[-2000:]
    assert "deselected" not in listing.stdout
    collected = set(listing.stdout.splitlines())
    plain = {node.partition("[")[0] for node in collected}
    return {node for node in wanted if node not in (collected if "[" in node else plain)}
