"""What the tests of the outbounds share: a factory that watches its sockets, resolvers, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Iterator

import pytest

from ztun import platform
from ztun.outbound import OutboundSpec, Tools, make_outbounds
from ztun.outbound.base import BaseOutbound, Resolve
from ztun.outbound.verdict import DatagramVerdict
from ztun.ports import Destination, Failure, Outbound, OutboundError, SocketFactory

MARK = 0x2A
DEADLINE = 0.4  # seconds; long enough for loopback, short enough to wait for


class Sockets:
    """A SocketFactory that remembers what it made.

    make: how a socket comes into being, so that it can be one of another network namespace.
    """

    def __init__(self, make: Callable[[int, int], socket.socket]) -> None:
        self._make = make
        self.made: list[socket.socket] = []

    def __call__(self, family: int, type: int) -> socket.socket:
        sock = self._make(family, type)
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        self.made.append(sock)
        return sock

    def check(self) -> None:
        """Nothing is left open."""
        left = [sock for sock in self.made if sock.fileno() >= 0]
        for sock in left:
            sock.close()
        assert not left, f"{len(left)} of {len(self.made)} sockets were left open"


def table(**names: list[str]) -> Resolve:
    """A resolver that knows `names`, an underscore standing for a dot."""
    known = {name.replace("_", "."): addresses for name, addresses in names.items()}

    async def resolve(name: str) -> list[str]:
        await asyncio.sleep(0)
        if name not in known:
            raise OutboundError(Failure.NAME_NOT_FOUND, f"{name} does not exist")
        return known[name]

    return resolve


async def nobody(name: str) -> list[str]:
    """The resolver of tests in which no name may be resolved by us."""
    raise AssertionError(f"{name} was to be handed to the proxy")


def tools(sockets: SocketFactory, resolve: Resolve, deadline: float) -> Tools:
    return Tools(platform.poller_of(asyncio.get_running_loop()), sockets, resolve, deadline)


def outbound(
    sockets: Sockets,
    type: str,
    port: int = 0,
    *,
    host: str = "127.0.0.1",
    username: str | None = None,
    password: str | None = None,
    deadline: float = 5,
    resolve: Resolve = nobody,
    udp: DatagramVerdict | None = None,
) -> BaseOutbound:
    """One outbound, made as the program makes it."""
    spec = OutboundSpec("it", type, host, port, username, password, udp)
    made: Outbound = make_outbounds([spec], tools(sockets, resolve, deadline))["it"]
    assert isinstance(made, BaseOutbound)
    return made


async def refused(way: Outbound, host: str, port: int = 80) -> OutboundError:
    """The error of a connect that must fail."""
    with pytest.raises(OutboundError) as caught:
        (await asyncio.wait_for(way.connect(Destination(host, port)), 20)).close()
    return caught.value


async def until(condition: Callable[[], object], seconds: float = 5) -> None:
    """Wait for something that other parts of the loop bring about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 (what is awaited is often the kernel's state)
            await asyncio.sleep(0.005)


def open_sockets() -> int:
    """The number of open sockets. Loops open files of other kinds as they need them, and keep them."""
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links)


@contextlib.contextmanager
def same_descriptors() -> Iterator[None]:
    """What happens inside leaves as many open sockets behind as there were."""
    before = open_sockets()
    yield
    if open_sockets() != before:
        gc.collect()  # slow, and needed only where a reference cycle holds a socket of the test itself
    assert open_sockets() == before
