"""Messages of routing sockets and of sysctl's dumps of interfaces and routes: bytes to values.

Layouts, all in host order, from XNU: struct rt_msghdr (bsd/net/route.h), struct if_msghdr and ifa_msghdr
(bsd/net/if.h), struct sockaddr_dl (bsd/net/if_dl.h), sockaddr_in, sockaddr_in6. Behind each header stand the socket
addresses that its `addrs` names, in the order of the bits, each padded to a multiple of 4 bytes; one of length 0 takes
4 (ROUNDUP32 in bsd/net/rtsock.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ztun.platform.darwin import numbers

_START = struct.Struct("=HBB")  # length, version, type: the same in every message
# length, version, type, index, flags, addrs, pid, seq, errno, use, inits; struct rt_metrics with its 14 words
_ROUTE = struct.Struct("=HBBH2xiiiiiiI56x")
_INTERFACE = struct.Struct("=HBBiiH2x96x")  # length, version, type, addrs, flags, index; struct if_data
_ADDRESS = struct.Struct("=HBBiiH2xi")  # length, version, type, addrs, flags, index, metric
_MAC_LENGTH = 6
_LINK_NAME_AT = 8  # struct sockaddr_dl: len, family, index, type, nlen, alen, slen, data
_ADDRESS_AT = {numbers.AF_INET: (4, 4), numbers.AF_INET6: (8, 16)}  # family -> where it stands, how long it is

SocketAddresses = dict[int, bytes]
"""RTA_* -> the socket address, without padding."""


class RouteMessage(NamedTuple):
    """struct rt_msghdr: what became of a route, or one of a dump."""

    type: int
    ifindex: int
    flags: int
    error: int
    addresses: SocketAddresses


class InterfaceMessage(NamedTuple):
    """struct if_msghdr: an interface, its flags (IFF_*), and in a dump its name."""

    type: int
    ifindex: int
    flags: int
    addresses: SocketAddresses


class AddressMessage(NamedTuple):
    """struct ifa_msghdr: an address of an interface."""

    type: int
    ifindex: int
    addresses: SocketAddresses


Message = RouteMessage | InterfaceMessage | AddressMessage

_ROUTES = frozenset({numbers.RTM_ADD, numbers.RTM_DELETE, numbers.RTM_CHANGE, numbers.RTM_GET})
_ADDRESSES = frozenset({numbers.RTM_NEWADDR, numbers.RTM_DELADDR})


def parse(data: bytes) -> Iterator[Message]:
    """The messages in `data`, one behind the other. Other types and versions and what is cut off are left out."""
    start = 0
    while start + _START.size <= len(data):
        length, version, kind = _START.unpack_from(data, start)
        if length < _START.size or start + length > len(data):
            return
        if version == numbers.RTM_VERSION:
            message = _parse_one(kind, data[start : start + length])
            if message is not None:
                yield message
        start += length


def _parse_one(kind: int, data: bytes) -> Message | None:
    if kind in _ROUTES and len(data) >= _ROUTE.size:
        _, _, _, index, flags, addrs, _pid, _seq, error, _use, _inits = _ROUTE.unpack_from(data)
        return RouteMessage(kind, index, flags, error, socket_addresses(addrs, data[_ROUTE.size :]))
    if kind == numbers.RTM_IFINFO and len(data) >= _INTERFACE.size:
        _, _, _, addrs, flags, index = _INTERFACE.unpack_from(data)
        return InterfaceMessage(kind, index, flags, socket_addresses(addrs, data[_INTERFACE.size :]))
    if kind in _ADDRESSES and len(data) >= _ADDRESS.size:
        _, _, _, addrs, _flags, index, _metric = _ADDRESS.unpack_from(data)
        return AddressMessage(kind, index, socket_addresses(addrs, data[_ADDRESS.size :]))
    return None


def socket_addresses(addrs: int, data: bytes) -> SocketAddresses:
    """The socket addresses that the bits of `addrs` name; those that are cut off are left out."""
    found: SocketAddresses = {}
    at = 0
    for position in range(8):
        bit = 1 << position
        if not addrs & bit:
            continue
        if at >= len(data):
            break
        length = data[at]
        if at + length > len(data):
            break
        found[bit] = data[at : at + length]
        at += (length + 3) & ~3 or 4
    return found


def address_of(socket_address: bytes | None) -> bytes | None:
    """The packed address in a sockaddr_in or sockaddr_in6; None where it is none of them.

    Inside the kernel a link-local address carries its scope in the second 16 bits (KAME), which is taken out.
    """
    if socket_address is None or len(socket_address) < 2 or socket_address[1] not in _ADDRESS_AT:
        return None
    at, size = _ADDRESS_AT[socket_address[1]]
    packed = socket_address[at : at + size].ljust(size, b"\0")
    if size == 16 and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80:
        packed = packed[:2] + b"\0\0" + packed[4:]
    return packed


def length_of(netmask: bytes | None, family: int) -> int:
    """The prefix length that a netmask says. Its trailing zeros are cut off, and its family need not be filled in.

    family: of the destination that it belongs to.
    """
    at, size = _ADDRESS_AT[family]
    bits = int.from_bytes((netmask or b"")[at : at + size].ljust(size, b"\0"))
    return bits.bit_count()


def link_address(socket_address: bytes | None) -> bytes | None:
    """The MAC address in a sockaddr_dl, behind the name; None where there is none."""
    if socket_address is None or len(socket_address) < _LINK_NAME_AT or socket_address[1] != numbers.AF_LINK:
        return None
    start = _LINK_NAME_AT + socket_address[5]
    found = socket_address[start : start + socket_address[6]]
    return found if len(found) == _MAC_LENGTH else None


def link_name(socket_address: bytes | None) -> str:
    """The interface's name in a sockaddr_dl; empty where there is none."""
    if socket_address is None or len(socket_address) < _LINK_NAME_AT or socket_address[1] != numbers.AF_LINK:
        return ""
    return socket_address[_LINK_NAME_AT : _LINK_NAME_AT + socket_address[5]].decode(errors="replace")
