"""What compiled code must not do (docs/compiling.md), found in the sources; and that `make test` tests what it says."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztun.compiled import is_compiled

ROOT = Path(__file__).parents[1]


def _modules() -> dict[Path, ast.Module]:
    """Those that packaging/compiling.py names. It is read, not run: what it needs is only there for making a wheel."""
    listed: set[Path] = set()
    left_out: set[Path] = set()
    for node in ast.parse((ROOT / "packaging" / "compiling.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULES":
            listed = {path for pattern in ast.literal_eval(node.value) for path in ROOT.glob(pattern)}
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_LEFT_OUT":
            names = [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
            left_out = {ROOT / "ztun" / "outbound" / f"{name}.py" for name in names}
    assert len(listed) > 50
    assert listed & left_out
    return {path: ast.parse(path.read_text()) for path in sorted(listed - left_out)}


MODULES = _modules()


def _classes() -> dict[str, ast.ClassDef]:
    return {node.name: node for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _declared(node: ast.ClassDef) -> set[str]:
    """The attributes that a class gives a type."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.AnnAssign):
            target = each.target
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                found.add(target.attr)
            elif isinstance(target, ast.Name) and each in node.body:
                found.add(target.id)
    return found


def _bases(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    for base in node.bases:
        if (found := classes.get(ast.unparse(base))) is not None:
            yield found
            yield from _bases(found, classes)


def test_no_class_gives_a_type_again_to_what_its_base_has() -> None:
    """mypyc tells the garbage collector of it twice then, and no cycle through it is ever found to be dead."""
    classes = _classes()
    again = {
        (name, base.name): both
        for name, node in classes.items()
        for base in _bases(node, classes)
        if (both := _declared(node) & _declared(base))
    }
    assert again == {}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_compiled_code_gets_wrong(path: Path) -> None:
    text = path.read_text()
    assert "cached_property" not in text  # it is an ordinary property there
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).startswith("Final["):
            assert "None" not in ast.unparse(node.annotation), "such a Final is read wrongly"
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Final":
            parts = node.value.elts if isinstance(node.value, ast.Tuple) else []
            floats = [part for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, float)]
            assert not floats, "such a Final is found not to be set: Final[tuple[float, ...]]"


def test_no_tuple_with_names_speaks_of_what_comes_later() -> None:
    for path, tree in MODULES.items():
        later: set[str] = set()
        for node in reversed(tree.body):
            if isinstance(node, ast.ClassDef):
                if "NamedTuple" in map(ast.unparse, node.bases):
                    fields = " ".join(
                        ast.unparse(each.annotation) for each in node.body if isinstance(each, ast.AnnAssign)
                    )
                    assert not [name for name in later if name in fields], (path, node.name)
                later.add(node.name)


def test_what_is_meant_to_be_compiled_is() -> None:
    """`make test` names the directory of the compiled modules; `make test-interpreted` does not."""
    assert is_compiled() == ("build/compiled" in os.environ.get("PYTHONPATH", ""))
