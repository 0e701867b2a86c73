"""The seams on Linux: TUN, rtnetlink, BPF."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ztun.platform.linux.addresses import interface_addresses
from ztun.platform.linux.backends import Chosen, choose
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.loops import OwnFlows
from ztun.platform.linux.netmon import LinuxNetworkMonitor
from ztun.platform.linux.poller import make_event_loop, poller_of
from ztun.platform.linux.routes import TunRoutes
from ztun.platform.linux.sockets import MarkedSockets
from ztun.platform.linux.tun import TunDevice, open_tun

__all__ = [
    "interface_addresses",
    "make_classifier",
    "make_event_loop",
    "make_monitor",
    "make_own_flows",
    "make_routes",
    "make_socket_factory",
    "open_device",
    "poller_of",
]


def open_device(name: str, mtu: int) -> TunDevice:
    """Create the TUN. Raises ZtunError when the name is taken or we may not."""
    return open_tun(name, mtu)


def make_routes(
    device: str, *, mtu: int, address: str, address6: str | None = None, ranges: Iterable[str] = ()
) -> TunRoutes:
    """Addresses (with prefix length), MTU and Fake-IP `ranges` (networks as text) of the open device `device`."""
    return TunRoutes(device, mtu, [one for one in (address, address6) if one], ranges)


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
) -> Chosen:
    """Load the classifier for the open device `device`; it captures nothing before `attach`.

    backend: "auto", "bpf", "tcx", "clsact" or "routes"; fail: "open" or "closed"; own_addresses: packed;
    xdp: drop what is blocked before there is an skb, where that can be had; host: capture what this host sends, too;
    tun_addresses: packed, of `device`; offload: have the kernel carry connections, where it can. Raises ZtunError.
    """
    own, tun = tuple(own_addresses), tuple(tun_addresses)
    capture = Capture(device, tuple(lan), mark, hijack_dns, fail == "closed", own, xdp, host, tun, offload)
    return await choose(backend, capture)


def make_monitor(mark: int) -> LinuxNetworkMonitor:
    """Watch this network namespace, as sockets with SO_MARK `mark` see it. Raises OSError."""
    return LinuxNetworkMonitor(mark)


def make_own_flows(mark: int) -> OwnFlows | None:
    """What knows flows of sockets with `mark`; None where the kernel does not tell."""
    try:
        return OwnFlows(mark)
    except OSError:
        return None


def make_socket_factory(mark: int) -> MarkedSockets:
    """A maker of non-blocking sockets with SO_MARK `mark`."""
    return MarkedSockets(mark)
