from __future__ import annotations

from collections.abc import Iterator

import pytest
from lan_world import Bench, World


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
