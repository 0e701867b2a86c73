"""The parts of one running gateway, in one place for those who make, revive and describe them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TypeVar

from ztun.config import Settings
from ztun.errors import ZtunError
from ztun.gateway.dns import DnsService
from ztun.gateway.gateway import Gateway
from ztun.names.pool import FakeIpPool
from ztun.network import NetworkKeeper
from ztun.placement import Listening, Placement
from ztun.ports import Classifier, Origin, Outbound, PacketDevice, Routes

T = TypeVar("T")


@dataclass
class Assembly:
    """What there is of a gateway so far: a part is None until it was made.

    state: "starting", "running" or "stopping"; listen, servers: where DNS is answered and asked, as in the
    configuration; taken: endpoints that another program holds; notes: lines that `ztun up` prints.
    """

    settings: Settings
    state: str = "starting"
    started: float = field(default_factory=time.monotonic)
    device: PacketDevice | None = None
    routes: Routes | None = None
    classifier: Classifier | None = None
    placement: Placement | None = None
    names: FakeIpPool | None = None
    dns: DnsService | None = None
    listening: Listening | None = None
    outbounds: dict[str, Outbound] = field(default_factory=dict)
    gateway: Gateway | None = None
    keeper: NetworkKeeper | None = None
    listen: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def require_gateway(self) -> Gateway:
        """The gateway. Raises ZtunError when there is none yet."""
        return self._require(self.gateway)

    def require_classifier(self) -> Classifier:
        """The classifier. Raises ZtunError when there is none yet, or none any more."""
        return self._require(self.classifier)

    def origin(self, address: bytes) -> Origin | None:
        """Where packets of a client come in: see Classifier.origin."""
        return self.classifier.origin(address) if self.classifier is not None else None

    def require_routes(self) -> Routes:
        """Addresses and routes. Raises ZtunError when there are none yet."""
        return self._require(self.routes)

    def require_device(self) -> PacketDevice:
        """The TUN. Raises ZtunError when there is none yet."""
        return self._require(self.device)

    def require_placement(self) -> Placement:
        """The rules among this host's networks. Raises ZtunError when they are not placed yet."""
        return self._require(self.placement)

    def _require(self, part: T | None) -> T:
        if part is None:
            raise ZtunError(f"nothing is installed, the instance is {self.state}; try again in a moment")
        return part
