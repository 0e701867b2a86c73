"""The packets of tests/stack are built and read here, too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "stack"))

from .kernel import KernelSide


@pytest.fixture(scope="session")
def kernel() -> Iterator[KernelSide]:
    side = KernelSide()
    yield side
    side.close()
