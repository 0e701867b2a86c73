"""Fixtures for the DNS service: a real dnsmasq for all, a service for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import pytest_asyncio
from dns_support import Bench, Dnsmasq


@pytest.fixture(scope="session")
def dnsmasq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dnsmasq]:
    with Dnsmasq(tmp_path_factory.mktemp("dnsmasq")) as server:
        yield server


@pytest_asyncio.fixture
async def make_bench() -> AsyncIterator[Callable[..., Bench]]:
    """Makes services that are closed in the end."""
    made: list[Bench] = []

    def make(*arguments: Any, **options: Any) -> Bench:
        made.append(Bench(*arguments, **options))
        return made[-1]

    yield make
    for bench in made:
        await bench.service.close()


@pytest.fixture
def bench(make_bench: Callable[..., Bench], dnsmasq: Dnsmasq) -> Bench:
    return make_bench([dnsmasq.url])
