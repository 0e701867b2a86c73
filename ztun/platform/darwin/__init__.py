"""The seams on macOS: utun, PF_ROUTE. Nothing of it is there yet, and each seam says so."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import NoReturn

from ztun.errors import ZtunError
from ztun.ports import Classifier, NetworkMonitor, PacketDevice, Poller, Routes, SocketFactory

__all__ = [
    "interface_addresses",
    "make_classifier",
    "make_event_loop",
    "make_monitor",
    "make_routes",
    "make_socket_factory",
    "open_device",
    "poller_of",
    "sweep",
]


def _not_yet(what: str) -> NoReturn:
    raise ZtunError(f"{what}: not yet on macOS; run ztun on Linux")


def open_device(name: str, mtu: int) -> PacketDevice:
    _not_yet(f"TUN device {name}")


def make_routes(
    device: str, *, mtu: int, address: str, address6: str | None = None, ranges: Iterable[str] = ()
) -> Routes:
    _not_yet(f"routes of {device}")


async def make_classifier(
    backend: str,
    device: str,
    lan: Sequence[str],
    *,
    mark: int,
    hijack_dns: bool,
    fail: str,
    own_addresses: Iterable[bytes],
    xdp: bool = True,
) -> Classifier:
    _not_yet("capture of LAN traffic")


def make_monitor(mark: int) -> NetworkMonitor:
    _not_yet("watching the network")


def make_socket_factory(mark: int) -> SocketFactory:
    _not_yet("sockets that are never captured")


def interface_addresses() -> list[tuple[str, bytes, int]]:
    _not_yet("the list of interface addresses")


def sweep(device: str) -> list[str]:
    _not_yet("removing left-overs")


def make_event_loop() -> asyncio.AbstractEventLoop:
    _not_yet("the event loop")


def poller_of(loop: asyncio.AbstractEventLoop) -> Poller:
    _not_yet("the poller")
