"""What outlives a killed process, before and after: the journal of this one, and the left-overs of dead ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ztun.platform.linux import journal
from ztun.platform.linux.sweep import find_leftovers, recover, sweep

__all__ = ["close_journal", "find_leftovers", "open_journal", "recover", "sweep"]


def open_journal(device: str, files: Iterable[str | Path] = ()) -> None:
    """Write down from now on what this process changes for the TUN `device`. Raises ZtunError when its owner lives.

    files: what else stays in the file system should this process be killed.
    """
    journal.of(device).open(files)


def close_journal(device: str) -> None:
    """Everything is undone, or cannot be. Idempotent."""
    journal.of(device).close()
