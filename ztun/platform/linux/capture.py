"""What is to be captured, as the classifiers of all backends get it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Capture(NamedTuple):
    """device: the TUN's name; lan: interface names; mark: of our own sockets; own_addresses: packed addresses of
    this host; fail_closed: drop what a dead gateway would have tunnelled; xdp: drop what is blocked by XDP already;
    host: capture what this host sends, too; tun_addresses: the packed addresses of the TUN; offload: carry connections
    without us.
    """

    device: str
    lan: Sequence[str]
    mark: int
    hijack_dns: bool
    fail_closed: bool
    own_addresses: Sequence[bytes]
    xdp: bool | str = True  # or the one form that is wanted, "native" or "generic"
    host: bool = False
    tun_addresses: Sequence[bytes] = ()
    offload: bool = False
