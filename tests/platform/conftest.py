from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from lan_world import Bench, World

from ztun import platform


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every asynchronous test runs on ztun's own loop, and on one that has the poller beside it."""
    return {"poller": platform.make_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def world() -> Iterator[World]:
    """The three namespaces; the test runs in the gateway's."""
    made = World()
    try:
        made.create()
        with made.gateway.entered():
            yield made
    finally:
        made.delete()


@pytest.fixture(params=["tcx", "clsact"])
def bpf_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["tcx", "clsact", "routes"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)
