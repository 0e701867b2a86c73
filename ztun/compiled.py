"""Whether what packets pass through is compiled, or interpreted as it is written (docs/compiling.md)."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec


def is_compiled() -> bool:
    """True in an installation from a wheel that was made with a compiler at hand."""
    found = find_spec("ztun.stack.stack")
    return found is not None and found.origin is not None and found.origin.endswith(tuple(EXTENSION_SUFFIXES))
