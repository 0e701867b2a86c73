"""docs/drops.md tells of every reason in the code, and of no other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from ztun.platform.linux.layout import find_sources, read_shared

_ROOT = Path(__file__).parents[2]
_DOCUMENT = _ROOT / "docs" / "drops.md"
_LOOKS_LIKE_ONE = re.compile(r"(ip|tcp|udp|icmp|memory|dns|fake-ip|internal)(-[a-z]+)+|stopping")


def in_the_code(package: str) -> Iterator[ast.AST]:
    for path in (_ROOT / "ztun" / package).rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def counted_by_the_stack() -> set[str]:
    """Every string that looks like a reason; nothing else in these packages does."""
    nodes = (node for package in ("wire", "stack", "gateway") for node in in_the_code(package))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if _LOOKS_LIKE_ONE.fullmatch(text)}


def said_to_the_stack() -> set[str]:
    """What stands as the argument of a call that counts, or raises what is counted; of these all must look like one."""
    found = set()
    for package in ("wire", "stack", "gateway"):
        for node in in_the_code(package):
            if isinstance(node, ast.Call) and node.args:
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in ("drop", "MalformedError", "ParameterError"):
                    found |= {part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
    return {text for text in found if isinstance(text, str)}


def counted_by_outbounds() -> set[str]:
    """Strings within the subscript of a `_drops`."""
    subscripts = [
        node.slice
        for node in in_the_code("outbound")
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "_drops"
    ]
    constants = (part.value for one in subscripts for part in ast.walk(one) if isinstance(part, ast.Constant))
    return {value for value in constants if isinstance(value, str)}


def counted_by_the_classifier() -> set[str]:
    """Names of counters in the kernel."""
    shared = read_shared(find_sources())
    return {name.lower() for enum in ("drop_reason", "xdp_reason") for name in shared.enums[enum]}


def documented() -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", _DOCUMENT.read_text(), flags=re.MULTILINE)


def test_each_reason_is_documented_once() -> None:
    reasons = documented()
    assert len(reasons) == len(set(reasons))
    assert set(reasons) == counted_by_the_stack() | counted_by_outbounds() | counted_by_the_classifier()


def test_no_reason_escapes_the_search() -> None:
    assert said_to_the_stack() - counted_by_the_stack() == set()
    assert len(said_to_the_stack()) > 40
    assert len(counted_by_the_stack()) > 50
    assert len(counted_by_outbounds()) == 3


def test_each_says_what_to_do() -> None:
    rows = [line for line in _DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4, row
        assert all(cells), row
