"""Standard output as it comes: a terminal, a pipe whose reader may go away, or nothing at all."""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def to_json(value: Any) -> str:
    """`value` as JSON: indented for a terminal, one line for a program."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    return json.dumps(value, indent=2 if is_terminal else None, ensure_ascii=False)


def flush_stdout() -> None:
    """Bring out what was printed. Raises OSError; does nothing where there is no standard output."""
    if sys.stdout is not None:
        sys.stdout.flush()


def forget_stdout() -> None:
    """Send what was not taken to nowhere, or Python would complain about it once more at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
