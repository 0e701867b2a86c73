"""What the network is like now, read from the kernel: interfaces, addresses, and the ways that packets would take."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ztun.platform.linux import netlink
from ztun.platform.linux.addresses import list_addresses
from ztun.platform.linux.exits import find_exits
from ztun.platform.linux.routes import PROTOCOL
from ztun.ports import Link, NetworkState, Path

T = TypeVar("T")

_IFF_UP = 0x1
_IFF_RUNNING = 0x40  # the operational state of RFC 2863 is up, or nobody knows (netdevice(7))
_TRIES = 5


def read_state(mark: int, destinations: Iterable[str]) -> NetworkState:
    """Read it. Blocks for some milliseconds. Raises OSError when the kernel does not answer.

    destinations: address literals; their ways are those of sockets with `mark`.
    """

    def read(ip: Any) -> NetworkState:
        links = _list_links(ip)
        by_index = {link.ifindex: link for link in links.values()}
        paths = {destination: find_path(ip, destination, mark, by_index) for destination in destinations}
        addresses = list_addresses(ip, tentative=False)
        return NetworkState(links, addresses, paths, find_exits(ip, by_index, addresses), _count_rules(ip))

    return _insist(read)


def _count_rules(ip: Any) -> int:
    """Some programs remove every ip rule that is not theirs, and with the routes backend these are all there is."""
    found = (rule for family in (socket.AF_INET, socket.AF_INET6) for rule in ip.get_rules(family=family))
    return sum(netlink.attribute(rule, "FRA_PROTOCOL") == PROTOCOL for rule in found)


def find_interfaces(mark: int, ways: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str | None]:
    """(our address, remote address) -> the interface by which a packet with both would leave; None where by none."""

    def find(ip: Any) -> dict[tuple[str, str], str | None]:
        by_index = {link.ifindex: link for link in _list_links(ip).values()}
        found = {}
        for way in ways:
            path = find_path(ip, way[1], mark, by_index, source=way[0])
            found[way] = path.ifname if path is not None else None
        return found

    return _insist(find)


def _insist(read: Callable[[Any], T]) -> T:
    """Dumps of a network that changes meanwhile are cut short (NLM_F_DUMP_INTR, netlink(7)): begin anew."""
    for remaining in reversed(range(_TRIES)):
        try:
            return netlink.run(read)
        except netlink.NetlinkError as error:
            if not remaining:
                raise OSError(max(error.code, 0), f"rtnetlink: {netlink.explain(error)}") from error
    raise AssertionError("not reached")


def _list_links(ip: Any) -> dict[str, Link]:
    links: dict[str, Link] = {}
    masters: dict[str, int] = {}
    for message in ip.get_links():
        name, flags = netlink.attribute(message, "IFLA_IFNAME"), message["flags"]
        enabled = bool(flags & _IFF_UP)
        links[name] = Link(name, message["index"], enabled, enabled and bool(flags & _IFF_RUNNING))
        information = netlink.attribute(message, "IFLA_LINKINFO")
        if information is not None and netlink.attribute(information, "IFLA_INFO_SLAVE_KIND") == "bridge":
            masters[name] = netlink.attribute(message, "IFLA_MASTER")
    by_index = {link.ifindex: name for name, link in links.items()}
    for name, master in masters.items():
        links[name] = links[name]._replace(bridge=by_index.get(master, ""))
    return links


def find_path(
    ip: Any, destination: str, mark: int, links: Mapping[int, Link], source: str | None = None
) -> Path | None:
    """Ask the kernel (RTM_GETROUTE) how a packet with `mark` would leave. None where it says that it would not.

    source: bound to that address.
    """
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    bound = {"src": source} if source else {}
    try:
        [message] = ip.route("get", family=family, dst=destination, mark=mark, **bound)
    except netlink.NetlinkDumpInterrupted:
        raise
    except (netlink.NetlinkError, ValueError):
        return None
    link = links.get(netlink.attribute(message, "RTA_OIF"))
    chosen = source or netlink.attribute(message, "RTA_PREFSRC")
    if link is None or chosen is None:
        return None
    return Path(link.name, chosen, netlink.attribute(message, "RTA_GATEWAY"), link.up)
