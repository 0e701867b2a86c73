"""Loops: ztun's own packets that come back into its TUN.

The kernel cuts them where BPF guards the TUN; where it does not, the first packet of a flow is found to be that of a
socket of ours, and the flow refused. Either is counted, and said in the log here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

import structlog

from ztun.assembly import Assembly

log = structlog.get_logger("ztun.network")

_INTERVAL = 2.0  # seconds between looks; after each that found something, twice as long
_LONGEST = 640.0
_REMEDY = "no proxy and no DNS server may be behind the TUN: look at their addresses, and at routes and ip rules"


class OwnFlows(Protocol):
    """Knows flows of ztun's own sockets. addresses: those that this host may send from, packed."""

    addresses: frozenset[bytes]

    def __call__(self, protocol: str, source: bytes, source_port: int, destination: bytes, port: int) -> bool: ...

    def close(self) -> None: ...


class LoopWatch:
    """Tells of loops, and rarer the longer it lasts. flows: None where there is no such knowledge."""

    def __init__(self, loop: asyncio.AbstractEventLoop, parts: Assembly, flows: OwnFlows | None) -> None:
        self._loop = loop
        self._parts = parts
        self._flows = flows
        tun = parts.settings.tun
        self._always = [at.ip.packed for at in (tun.address, tun.address6) if at is not None]
        self._seen = 0
        self._wait = _INTERVAL
        self._timer: asyncio.TimerHandle | None = None
        self.follow(())

    @property
    def is_own(self) -> Callable[[str, bytes, int, bytes, int], bool] | None:
        """What the gateway asks about the first packet of a flow: protocol, source, its port, destination, its port."""
        return self._flows

    def follow(self, addresses: Iterable[bytes]) -> None:
        """These are this host's addresses, besides those of the TUN."""
        if self._flows is not None:
            self._flows.addresses = frozenset([*self._always, *addresses])

    def start(self) -> None:
        self._timer = self._loop.call_later(self._wait, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flows is not None:
            self._flows.close()

    def _look(self) -> None:
        count = self._count()
        if count > self._seen:
            self._wait = min(2 * self._wait, _LONGEST)
            log.warning("a loop was cut: our own packets came back", packets=count - self._seen, remedy=_REMEDY)
        self._seen = count
        self.start()

    def _count(self) -> int:
        kernel = self._parts.classifier.counters() if self._parts.classifier is not None else {}
        gateway = self._parts.gateway.statistics()["drops"] if self._parts.gateway is not None else {}
        return kernel.get("drop_loop", {}).get("packets", 0) + int(gateway.get("ip-loop", 0))
