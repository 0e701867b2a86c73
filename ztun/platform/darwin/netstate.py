"""What the network is like now, read from the kernel: interfaces, addresses, and the ways that our packets take.

Our own packets do not follow the routes into our utun, so the kernel cannot be asked for their way: it is looked up
here, in a copy of its table that leaves those routes out.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import NamedTuple

from ztun.platform.darwin import instances, messages, numbers
from ztun.platform.darwin.calls import Calls
from ztun.platform.darwin.utun import opened
from ztun.ports import Link, NetworkState, Path

# Of one neighbour, of one interface only, or no way at all.
_NO_WAY = numbers.RTF_IFSCOPE | numbers.RTF_LLINFO | numbers.RTF_WASCLONED | numbers.RTF_REJECT | numbers.RTF_BLACKHOLE


class Way(NamedTuple):
    """A route. gateway: packed, None where the network is the link's own."""

    network: bytes
    length: int
    ifindex: int
    gateway: bytes | None


def read_state(calls: Calls, destinations: Iterable[str]) -> NetworkState:
    """Read all of it. Raises OSError. destinations: address literals."""
    found = list(messages.parse(calls.dump(numbers.NET_RT_IFLIST)))
    links = list_links(found)
    addresses = list_addresses(found)
    finder = WayFinder(list_ways(calls), addresses, links.values())
    return NetworkState(links, addresses, {to: finder.path(to) for to in destinations}, finder.exits())


def interface_addresses(calls: Calls) -> list[tuple[str, bytes, int]]:
    """(interface name, packed address, prefix length) for every address of this host. Raises OSError."""
    return list_addresses(list(messages.parse(calls.dump(numbers.NET_RT_IFLIST))))


def list_links(found: Iterable[messages.Message]) -> dict[str, Link]:
    """The interfaces of a dump, by name."""
    links = {}
    for message in found:
        if isinstance(message, messages.InterfaceMessage):
            name = messages.link_name(message.addresses.get(numbers.RTA_IFP))
            enabled = bool(message.flags & numbers.IFF_UP)
            up = enabled and bool(message.flags & numbers.IFF_RUNNING)
            if name:
                links[name] = Link(name, message.ifindex, enabled, up)
    return links


def list_addresses(found: Iterable[messages.Message]) -> list[tuple[str, bytes, int]]:
    """The addresses of a dump, in which those of an interface follow it."""
    names: dict[int, str] = {}
    addresses = []
    for message in found:
        if isinstance(message, messages.InterfaceMessage):
            names[message.ifindex] = messages.link_name(message.addresses.get(numbers.RTA_IFP))
        elif isinstance(message, messages.AddressMessage):
            ours = message.addresses.get(numbers.RTA_IFA)
            packed = messages.address_of(ours)
            if ours is not None and packed is not None:
                length = messages.length_of(message.addresses.get(numbers.RTA_NETMASK), ours[1])
                addresses.append((names.get(message.ifindex, ""), packed, length))
    return addresses


def list_ways(calls: Calls) -> list[Way]:
    """The routes that our own packets may take: those into our utun, or another instance's, are left out."""
    ours = {_index_of(name) for name in list(opened)}  # it may change meanwhile: the monitor reads in a thread
    ours |= {_index_of(other.device) for other in instances.others()}
    return [way for way in list_routes(calls) if way.ifindex not in ours]


def list_routes(calls: Calls) -> list[Way]:
    """The routes that lead somewhere, without those of single neighbours. Raises OSError."""
    ways = []
    for message in messages.parse(calls.dump(numbers.NET_RT_DUMP)):
        if isinstance(message, messages.RouteMessage) and not message.flags & _NO_WAY:
            way = _way(message)
            if way is not None and message.flags & numbers.RTF_UP:
                ways.append(way)
    return ways


def find_route(calls: Calls, network: bytes, length: int) -> int | None:
    """The index of the interface that the route to exactly this network leads to; None when there is no such route."""
    for way in list_routes(calls):
        if (way.network, way.length) == (network, length):
            return way.ifindex
    return None


def _way(message: messages.RouteMessage) -> Way | None:
    destination = message.addresses.get(numbers.RTA_DST)
    network = messages.address_of(destination)
    if destination is None or network is None:
        return None
    if message.flags & numbers.RTF_HOST:
        length = len(network) * 8
    else:
        length = messages.length_of(message.addresses.get(numbers.RTA_NETMASK), destination[1])
    gateway = messages.address_of(message.addresses.get(numbers.RTA_GATEWAY))
    return Way(network, length, message.ifindex, gateway if message.flags & numbers.RTF_GATEWAY else None)


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


class WayFinder:
    """By which interface our own packets leave: the longest match among the routes that are not ours."""

    def __init__(self, ways: Iterable[Way], addresses: Iterable[tuple[str, bytes, int]], links: Iterable[Link]) -> None:
        self._links = {link.ifindex: link for link in links}
        self._addresses = list(addresses)
        self._own = {packed for _, packed, _ in self._addresses}
        self._tables: dict[int, dict[int, dict[int, Way]]] = {4: {}, 16: {}}
        for way in ways:
            value = int.from_bytes(way.network) >> len(way.network) * 8 - way.length
            self._tables[len(way.network)].setdefault(way.length, {}).setdefault(value, way)
        self._lengths = {size: sorted(table, reverse=True) for size, table in self._tables.items()}

    def is_local(self, address: bytes) -> bool:
        """Whether a packet to it never leaves this host."""
        loopback = address[0] == 127 if len(address) == 4 else address == bytes(15) + b"\1"
        return loopback or address in self._own or not any(address)

    def find(self, address: bytes) -> Way | None:
        """The route to a packed address that is not local."""
        value, bits = int.from_bytes(address), len(address) * 8
        for length in self._lengths[len(address)]:
            way = self._tables[len(address)][length].get(value >> bits - length)
            if way is not None:
                return way
        return None

    def exits(self) -> dict[str, list[int]]:
        """Interface -> the IP versions whose default route leads by it."""
        found: dict[str, list[int]] = {}
        for version, size in ((4, 4), (6, 16)):
            default = self._tables[size].get(0, {}).get(0)
            link = self._links.get(default.ifindex) if default is not None else None
            if link is not None:
                found.setdefault(link.name, []).append(version)
        return found

    def path(self, destination: str) -> Path | None:
        """The way to an address literal; None when there is none."""
        family = socket.AF_INET6 if ":" in destination else socket.AF_INET
        try:
            packed = socket.inet_pton(family, destination.partition("%")[0])
        except OSError:
            return None
        if self.is_local(packed):
            return self._local_path(destination)
        way = self.find(packed)
        link = self._links.get(way.ifindex) if way is not None else None
        if way is None or link is None:
            return None
        source = self._source(link.name, way, packed)
        gateway = _text(way.gateway) if way.gateway is not None else None
        return Path(link.name, source, gateway, link.up) if source is not None else None

    def _local_path(self, destination: str) -> Path | None:
        loopback = next((link for link in self._links.values() if link.name.startswith("lo")), None)
        return Path(loopback.name, destination, None, loopback.up) if loopback is not None else None

    def _source(self, ifname: str, way: Way, destination: bytes) -> str | None:
        """The address that a packet gets as its source: one on the network of the next hop, else the first that is
        not link-local, else any (RFC 6724 in short)."""
        mine = [
            (packed, length)
            for name, packed, length in self._addresses
            if name == ifname and len(packed) == len(destination)
        ]
        hop = way.gateway or destination
        near = [packed for packed, length in mine if _same_network(packed, hop, length)]
        wide = [packed for packed, _ in mine if not _is_link_local(packed)]
        near = [packed for packed in near if not _is_link_local(packed)]
        chosen = next(iter([*near, *wide, *(packed for packed, _ in mine)]), None)
        return _text(chosen) if chosen is not None else None


def _same_network(one: bytes, other: bytes, length: int) -> bool:
    shift = len(one) * 8 - length
    return len(one) == len(other) and int.from_bytes(one) >> shift == int.from_bytes(other) >> shift


def _is_link_local(packed: bytes) -> bool:
    if len(packed) == 4:
        return packed[:2] == b"\xa9\xfe"
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
