"""Routes by the hundred thousand: many rtnetlink messages in one system call, an answer only where one fails.

pyroute2 asks for an answer to each message and takes 0.3 ms for it. The kernel itself takes some microseconds.
Sources: rtnetlink(7), netlink(7), include/uapi/linux/rtnetlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from ztun.platform.linux.netlink import NetlinkError

UNICAST, BLACKHOLE, THROW = 1, 6, 9  # RTN_*

_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26  # RTM_*
_REQUEST, _ACK, _REPLACE, _DUMP, _CREATE = 0x001, 0x004, 0x100, 0x300, 0x400  # NLM_F_*
_DST, _OIF, _PRIORITY, _TABLE = 1, 4, 6, 15  # RTA_*
_ERROR, _DONE = 2, 3  # NLMSG_*
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_NOWHERE = 0, 253, 255
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, lengths, tos, table, protocol, scope, type, flags
_NUMBER = struct.Struct("=HHI")  # struct rtattr and 32 bits
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=iIHHI")  # struct nlmsgerr: the error, then the header of the message it is about
_BATCH = 256  # messages; none is longer than 80 octets, and a failed one comes back with its error
_BUFFER = 1 << 20
_PATIENCE = 30.0  # seconds; the kernel answers at once, unless somebody holds the lock of the network


class Route(NamedTuple):
    """One route of a table. network: packed; kind: UNICAST into `oif`, or BLACKHOLE or THROW; metric 0: the usual."""

    network: bytes
    length: int
    kind: int
    metric: int = 0


class Table(NamedTuple):
    """Where routes go. oif: index of the interface for UNICAST, 0 for any (to delete); protocol: who installed them."""

    number: int
    protocol: int
    oif: int


def replace(table: Table, routes: Iterable[Route]) -> None:
    """Add routes, in the place of those with the same destination and metric. Raises NetlinkError."""
    _change(table, routes, _NEWROUTE, _REQUEST | _CREATE | _REPLACE, ())


def delete(table: Table, routes: Iterable[Route]) -> None:
    """Delete routes; those that are not there are no error. Raises NetlinkError."""
    _change(table, routes, _DELROUTE, _REQUEST, (errno.ESRCH, errno.ENOENT, errno.ENODEV, errno.EAFNOSUPPORT))


def list_all(protocol: int) -> Iterator[tuple[int, Route]]:
    """(table, route) of every IPv4 and IPv6 route of this protocol. A metric is what the kernel says, never 0 for IPv6.

    Raises NetlinkError.
    """
    with _opened() as sock:
        for family in (socket.AF_INET, socket.AF_INET6):
            body = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
            sock.send(_HEADER.pack(_HEADER.size + len(body), _GETROUTE, _REQUEST | _DUMP, family, 0) + body)
            yield from _dumped(sock, protocol)


def _dumped(sock: socket.socket, protocol: int) -> Iterator[tuple[int, Route]]:
    while True:
        data = sock.recv(_BUFFER)
        for kind, _number, at, end in _messages(data):
            if kind == _DONE:
                return
            if kind == _ERROR:
                code = -_CODE.unpack_from(data, at)[0]
                raise NetlinkError(code, os.strerror(code))
            if kind == _NEWROUTE and data[at + 5] == protocol:
                yield _read(data, at, end)


def _read(data: bytes, at: int, end: int) -> tuple[int, Route]:
    family, length, _, _, table, _, _, kind, _ = _ROUTE.unpack_from(data, at)
    network, metric = bytes(4 if family == socket.AF_INET else 16), 0
    at += _ROUTE.size
    while at + _ATTRIBUTE.size <= end:
        size, name = _ATTRIBUTE.unpack_from(data, at)
        value = data[at + _ATTRIBUTE.size : at + size]
        if name == _DST:
            network = value
        elif name == _TABLE:
            table = int.from_bytes(value, sys.byteorder)
        elif name == _PRIORITY:
            metric = int.from_bytes(value, sys.byteorder)
        at += max((size + 3) & ~3, _ATTRIBUTE.size)
    return table, Route(network, length, kind, metric)


def _messages(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(type, sequence number, where its body begins, where it ends) of each message in a datagram."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _flags, number, _port = _HEADER.unpack_from(data, at)
        yield kind, number, at + _HEADER.size, at + length
        at += max((length + 3) & ~3, _HEADER.size)


def _opened() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    sock.settimeout(_PATIENCE)
    sock.bind((0, 0))
    return sock


def _change(table: Table, routes: Iterable[Route], kind: int, flags: int, ignored: Collection[int]) -> None:
    with _opened() as sock:
        try:
            for some in _batched(routes):
                last = len(some) - 1
                messages = [_message(table, route, kind, flags | _ACK * (n == last), n) for n, route in enumerate(some)]
                sock.send(b"".join(messages))
                _await(sock, last, ignored)
        except OSError as error:
            code = error.errno or errno.EIO
            raise NetlinkError(code, os.strerror(code)) from error


def _batched(routes: Iterable[Route]) -> Iterator[Sequence[Route]]:
    iterator = iter(routes)
    while some := list(islice(iterator, _BATCH)):
        yield some


def _message(table: Table, route: Route, kind: int, flags: int, number: int) -> bytes:
    size = len(route.network)
    family = socket.AF_INET if size == 4 else socket.AF_INET6
    scope = _SCOPE_NOWHERE if kind == _DELROUTE else _SCOPE_LINK if route.kind == UNICAST else _SCOPE_UNIVERSE
    body = _ROUTE.pack(family, route.length, 0, 0, 0, table.protocol, scope, route.kind, 0)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + size, _DST) + route.network
    body += _NUMBER.pack(_NUMBER.size, _TABLE, table.number)
    if route.kind == UNICAST and table.oif:
        body += _NUMBER.pack(_NUMBER.size, _OIF, table.oif)
    if route.metric:
        body += _NUMBER.pack(_NUMBER.size, _PRIORITY, route.metric)
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, number, 0) + body


def _await(sock: socket.socket, last: int, ignored: Collection[int]) -> None:
    """Read answers up to that of message `last`. Raises NetlinkError for the first error that is not ignored."""
    failed = 0
    while True:
        data = sock.recv(_BUFFER)
        for kind, number, at, _end in _messages(data):
            if kind != _ERROR:
                continue
            code = -_CODE.unpack_from(data, at)[0]
            failed = failed or (code if code not in ignored else 0)
            if number == last:
                if failed:
                    raise NetlinkError(failed, os.strerror(failed))
                return
