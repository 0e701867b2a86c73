"""What outlives a killed process: the utun and its routes do not; what does has its own marks (see `sweep`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import ztun.platform.darwin as system

__all__ = ["close_journal", "open_journal", "recover", "sweep"]


def open_journal(device: str, files: Iterable[str | Path] = ()) -> None:
    """Nothing needs to be written down."""


def close_journal(device: str) -> None:
    """Nothing was written down."""


def recover(device: str) -> list[str]:
    """Put back what dead instances changed, before this process changes the same; returns a line for each."""
    return system.sweep(device)


def sweep(device: str | None = None) -> list[str]:
    """Remove what belongs to no living instance. device: the utun of this process, which called `recover` before."""
    return system.sweep("") if device is None else []
