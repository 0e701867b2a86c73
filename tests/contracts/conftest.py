from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from contracts.systems import loop_factories


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests of the poller run on each poller, once in its own loop and once beside asyncio's; the others once."""
    return loop_factories() if "test_poller" in item.nodeid else {"asyncio": asyncio.new_event_loop}
