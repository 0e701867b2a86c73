"""Fixtures for conversations with the stack, over IPv4 and IPv6."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conversation import Client, Net

from ztun.stack import StackSettings


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def talk(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """A function that makes a client of a new stack; its arguments are StackSettings. Nothing may be left unheard."""
    nets: list[Net] = []

    def make(isn: int = 1_000_000, iss: int = 5_000_000, **settings: Any) -> Client:
        nets.append(Net(StackSettings(**settings), iss))
        return Client(nets[-1], request.param, isn=isn)

    yield make
    for net in nets:
        net.is_silent()


@pytest.fixture
def client(talk: Callable[..., Client]) -> Client:
    return talk()
