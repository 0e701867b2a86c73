from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import pytest

from ztun import platform

from . import netns, peers
from .netns import Namespace
from .support import Sockets


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every test runs on ztun's own loop, and on one that has the poller beside it."""
    return {"poller": platform.make_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    """A SocketFactory. After the test every socket that it made must be marked and closed."""
    factory = Sockets(socket.socket)
    yield factory
    factory.check()


@pytest.fixture(scope="session")
def microsocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.microsocks(tmp_path_factory.mktemp("microsocks")) as port:
        yield port


@pytest.fixture(scope="session")
def microsocks_auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.microsocks(tmp_path_factory.mktemp("microsocks"), auth=True) as port:
        yield port


@pytest.fixture(scope="session")
def socks_udp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.socks_udp(tmp_path_factory.mktemp("socks_udp")) as port:
        yield port


@pytest.fixture(scope="session")
def socks_udp_auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.socks_udp(tmp_path_factory.mktemp("socks_udp"), auth=True) as port:
        yield port


@pytest.fixture(scope="session")
def sing_box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.sing_box_udp(tmp_path_factory.mktemp("sing_box")) as port:
        yield port


@pytest.fixture(scope="session")
def sing_box_auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.sing_box_udp(tmp_path_factory.mktemp("sing_box"), auth=True) as port:
        yield port


@pytest.fixture(scope="session")
def tinyproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.tinyproxy(tmp_path_factory.mktemp("tinyproxy")) as port:
        yield port


@pytest.fixture(scope="session")
def tinyproxy_auth(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with peers.tinyproxy(tmp_path_factory.mktemp("tinyproxy"), auth=True) as port:
        yield port


@pytest.fixture(scope="session")
def cable() -> Iterator[tuple[Namespace, Namespace]]:
    with netns.cable() as both:
        yield both


@pytest.fixture
def client(cable: tuple[Namespace, Namespace]) -> Iterator[Sockets]:
    sockets = Sockets(cable[0].socket)
    yield sockets
    sockets.check()


@pytest.fixture
def router(cable: tuple[Namespace, Namespace]) -> Namespace:
    return cable[1]
