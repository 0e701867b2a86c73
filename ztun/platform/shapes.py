"""What looking at a machine gives, the same on every system."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

Network = IPv4Network | IPv6Network


class BpfFacts(NamedTuple):
    """What loading the programs showed. reason: why they did not load, else None; tcx, xdp: None where not known."""

    reason: str | None
    tcx: bool | None
    xdp: bool | None
    xdp_reason: str | None = None


class TunFacts(NamedTuple):
    """reason: why there can be no TUN; uso: UDP segmentation offload, None where it could not be tried."""

    reason: str | None
    uso: bool | None


class Route(NamedTuple):
    """A route of any table but `local`. device: None for those that go nowhere."""

    network: Network
    device: str | None
    table: int
    is_ours: bool


class Diversion(NamedTuple):
    """An ip rule that somebody else made."""

    priority: int
    family: str
    table: int | None
    iif: str | None
    fwmark: int | None


class Instance(NamedTuple):
    """A living ztun of this network namespace."""

    device: str
    pid: int
