"""A host in a namespace of its own, with two links that lead somewhere, and each system's parts on it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from darwin.kqueue_stand_in import EpollQueue
from darwin.stand_in import LinuxStandIn

from contracts.systems import DARWIN
from ztun.lab.namespace import Namespace, wait_until
from ztun.platform import darwin, linux

MARK = 0x7A75
ADDRESS4, ADDRESS6 = "198.18.0.1/15", "2001:2::1/48"
RANGES = ["198.18.0.0/15", "2001:2::/48"]


class Host:
    """`system` in a namespace: `near` has the link `a0` to `far`, and `b0` as well. A context manager's insides."""

    def __init__(self, system: str) -> None:
        stem = f"pc{os.getpid()}"
        self.system = system
        self.near, self.far = Namespace(stem + "n"), Namespace(stem + "f")
        self.tun = "utun7" if system == DARWIN else "ztun0"
        self.calls = LinuxStandIn()

    def create(self) -> None:
        for namespace in (self.near, self.far):
            namespace.create(resolver="127.0.0.1", sysctls={"ipv6/conf/default/accept_dad": "0"})
        for name, net in (("a0", 1), ("b0", 2)):
            self.near.ip(
                f"link add {name} type veth peer name {name} netns {self.far.name}",
                f"address add 10.7.{net}.1/24 dev {name}",
                f"address add fd07:{net}::1/64 dev {name} nodad",
                f"link set {name} up",
            )
            self.far.ip(
                f"address add 10.7.{net}.2/24 dev {name}",
                f"address add fd07:{net}::2/64 dev {name} nodad",
                f"link set {name} up",
            )
        self.far.ip("address add 203.0.113.5/32 dev lo", "address add 2001:db8::5/128 dev lo nodad")
        self.near.ip("route add default via 10.7.1.2", "route add default via fd07:1::2")
        assert wait_until(lambda: self.near.run("ip", "-br", "link").stdout.count("LOWER_UP") >= 3)
        if self.system == DARWIN:
            darwin.use(self.calls, EpollQueue)

    def delete(self) -> None:
        for namespace in (self.near, self.far):
            namespace.delete()

    # The seams.

    @property
    def _platform(self) -> Any:
        return darwin if self.system == DARWIN else linux

    def open_device(self, name: str | None = None) -> Any:
        return self._platform.open_device(name or self.tun, 1500)

    def make_routes(self, device: str, ranges: Sequence[str] = RANGES) -> Any:
        return self._platform.make_routes(device, mtu=1500, address=ADDRESS4, address6=ADDRESS6, ranges=ranges)

    async def make_classifier(self, device: str, lan: Sequence[str] = ("a0",), own: Iterable[bytes] = ()) -> Any:
        return await self._platform.make_classifier(
            "auto", device, lan, mark=MARK, hijack_dns=True, fail="open", own_addresses=own
        )

    def make_monitor(self) -> Any:
        return self._platform.make_monitor(MARK)

    def make_sockets(self) -> Any:
        return self._platform.make_socket_factory(MARK)
