"""The seams on macOS: utun, routing sockets, kqueue, and a classifier in Python."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ztun.errors import ConfigError, ZtunError
from ztun.platform.darwin import forwarding, kqueue, netstate, poller, resolver
from ztun.platform.darwin.calls import Calls, SystemCalls
from ztun.platform.darwin.classifier import Capture, PythonClassifier
from ztun.platform.darwin.neighbours import Neighbours
from ztun.platform.darwin.netmon import DarwinNetworkMonitor
from ztun.platform.darwin.poller import KqueuePoller, Queue
from ztun.platform.darwin.resolver import ResolverFiles
from ztun.platform.darwin.routes import PrefixRoutes, UtunRoutes
from ztun.platform.darwin.sockets import BoundSockets
from ztun.platform.darwin.utun import UtunDevice, open_utun, opened
from ztun.ports import Poller

__all__ = [
    "interface_addresses",
    "make_classifier",
    "make_event_loop",
    "make_monitor",
    "make_own_flows",
    "make_resolver",
    "make_routes",
    "make_socket_factory",
    "open_device",
    "poller_of",
    "sweep",
    "use",
]

_BACKENDS = ("auto", "python")


class _System:
    """What macOS is reached by. Tests on other systems put stand-ins here (see `use`)."""

    def __init__(self, calls: Calls, make_queue: Callable[[], Queue]) -> None:
        self.calls = calls
        self.make_queue = make_queue
        self.sockets: dict[int, BoundSockets] = {}  # by the mark of their instance: the monitor keeps them in step


_system = _System(SystemCalls(), kqueue.KernelQueue)


def use(calls: Calls, make_queue: Callable[[], Queue]) -> None:
    """Reach the system by these from now on."""
    global _system
    _system = _System(calls, make_queue)


def open_device(name: str, mtu: int) -> UtunDevice:
    """Make the utun; "utun" takes a free one. Raises ZtunError when the name is taken or we may not."""
    return open_utun(name, mtu, _system.calls)


def make_routes(
    device: str, *, mtu: int, address: str, address6: str | None = None, ranges: Iterable[str] = ()
) -> UtunRoutes:
    """Addresses (with prefix length), MTU and Fake-IP `ranges` (networks as text) of the open device `device`."""
    return UtunRoutes(device, mtu, [one for one in (address, address6) if one], ranges, _system.calls)


async def make_classifier(
    backend: str,
    device: str,
    lan: Sequence[str],
    *,
    mark: int,
    hijack_dns: bool,
    fail: str,
    own_addresses: Iterable[bytes],
    xdp: bool | str = True,
    host: bool = False,
    tun_addresses: Iterable[bytes] = (),
    offload: bool = False,
) -> PythonClassifier:
    """The classifier of the open device `device`; it captures nothing before `attach`.

    backend: "auto" or "python"; fail: "open"; host: capture what this host sends, too. Raises ConfigError for what
    macOS cannot do.
    """
    if backend not in _BACKENDS:
        raise ConfigError(f"capture.backend: there is no {backend} on macOS; set it to auto")
    if fail == "closed":
        raise ConfigError(
            "capture.fail: on macOS the routes go with the process, so that it always fails open; set it to open"
        )
    capture = Capture(tuple(lan), host, hijack_dns)
    routes = PrefixRoutes(device, _system.calls)
    allow = forwarding.Forwarding(device, _system.calls)
    neighbours = Neighbours(make_socket_factory(mark))
    classifier = PythonClassifier(_device(device), routes, allow, neighbours, capture)
    classifier.replace_own_addresses(own_addresses)
    return classifier


def _device(name: str) -> UtunDevice:
    device = opened.get(name)
    if device is None:
        raise ZtunError(f"there is no open device {name}")
    return device


def make_monitor(mark: int) -> DarwinNetworkMonitor:
    """Watch the network, and keep the sockets of this `mark` in step. Raises OSError."""
    return DarwinNetworkMonitor(_system.calls, make_socket_factory(mark), _disturb)


def make_own_flows(mark: int) -> Any:
    """None: sockets are bound to the interface that they leave by, and do not come back."""
    return None


def make_socket_factory(mark: int) -> BoundSockets:
    """A maker of non-blocking sockets that leave by the interface of the route that is not ours.

    mark: tells instances apart; macOS has no marks.
    """
    return _system.sockets.setdefault(mark, BoundSockets(_system.calls))


def make_resolver(device: str, server: str, domains: Iterable[str]) -> ResolverFiles:
    """What sends this host's own queries for `domains` to `server`, an address that is routed into `device`."""
    return ResolverFiles(server, domains)


def interface_addresses() -> list[tuple[str, bytes, int]]:
    """(interface name, packed address, prefix length) for every address of this host. Raises OSError."""
    return netstate.interface_addresses(_system.calls)


def sweep(device: str) -> list[str]:
    """Remove left-overs of instances that were killed; returns a line for each."""
    return [*resolver.sweep(), *forwarding.sweep(_system.calls)]


def make_event_loop() -> asyncio.AbstractEventLoop:
    """An event loop with a poller of its own."""
    return poller.make_event_loop(_system.make_queue)


def poller_of(loop: asyncio.AbstractEventLoop) -> Poller:
    """The poller beside a loop."""
    return poller.poller_of(loop, _system.make_queue)


def _disturb(fd: int) -> None:
    found = poller_of(asyncio.get_running_loop())
    assert isinstance(found, KqueuePoller)
    found.disturb(fd)
