from __future__ import annotations

import asyncio
from collections.abc import Callable

from contracts.systems import loop_factories


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every asynchronous test runs on each poller, once in its own loop and once beside asyncio's."""
    return loop_factories()
