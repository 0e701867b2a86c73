"""Resetting ztun's own connections that a change of the network left behind.

They are found among our descriptors by their mark, so that nobody has to keep a list for the one day it is needed.
A connection is ended by connecting it to AF_UNSPEC (connect(2)): the kernel resets it, and whoever reads or writes it
gets ECONNRESET as if the other side had.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from typing import NamedTuple

from ztun.platform.linux import netstate
from ztun.platform.linux.sockets import disconnect
from ztun.ports import NetworkState

_SLICE = 256  # descriptors that are looked at before the loop gets its turn
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


class Connection(NamedTuple):
    """One TCP socket, addresses as text. remote: None while it is being connected."""

    fd: int
    local: str
    remote: str | None


async def reset_stranded(mark: int, before: NetworkState, now: NetworkState, former: Collection[str]) -> int:
    """See ztun.ports.NetworkMonitor.reset_stranded. mark: of ztun's own sockets."""
    homes = _homes(now)
    gone = _homes(before).keys() - homes.keys()
    uncertain = {local for local, names in homes.items() if names & set(former)}
    if not gone and not uncertain:
        return 0  # as with every interface that has nothing to do with us
    mine = [one async for one in _own_connections(mark) if one.local in gone or one.local in uncertain]
    ways = {(one.local, one.remote) for one in mine if one.local in uncertain and one.remote is not None}
    leaving = await asyncio.to_thread(netstate.find_interfaces, mark, ways) if ways else {}
    stranded = [one for one in mine if one.local in gone or _is_astray(one, homes[one.local], leaving, now)]
    return sum(_reset(one, mark) for one in stranded)


def _is_astray(
    connection: Connection,
    home: Collection[str],
    leaving: Mapping[tuple[str, str], str | None],
    now: NetworkState,
) -> bool:
    """Whether packets of a connection leave where their source is nobody's address, so that no answer will come.

    One without any way, or with a link that lost its carrier, waits for it to come back. One that is only being
    connected does not: the client waits.
    """
    if connection.remote is not None:
        leaves_by = leaving[connection.local, connection.remote]
        return leaves_by is not None and leaves_by not in home
    return not any(path is not None and path.up and path.ifname in home for path in now.paths.values())


def _homes(state: NetworkState) -> dict[str, set[str]]:
    """Our addresses -> the interfaces that have them."""
    homes: dict[str, set[str]] = {}
    for ifname, packed, _length in state.addresses:
        text = socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
        homes.setdefault(text, set()).add(ifname)
    return homes


async def _own_connections(mark: int) -> AsyncIterator[Connection]:
    for number, entry in enumerate(os.listdir("/proc/self/fd")):
        if number % _SLICE == _SLICE - 1:
            await asyncio.sleep(0)
        connection = _describe(int(entry), mark)
        if connection is not None:
            yield connection


def _describe(fd: int, mark: int) -> Connection | None:
    """The connection behind a descriptor, None if it is not one of ours."""
    try:
        borrowed = socket.socket(fileno=fd)
    except OSError:  # no socket, or closed since
        return None
    try:
        if borrowed.family not in _FAMILIES or borrowed.type != socket.SOCK_STREAM:
            return None
        if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) != mark:
            return None
        if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None
        local = _text(borrowed.getsockname())
        remote = None
        with suppress(OSError):  # ENOTCONN until the handshake is done
            remote = _text(borrowed.getpeername())
        return Connection(fd, local, remote)
    except OSError:
        return None
    finally:
        borrowed.detach()


def _text(address: tuple[str, ...]) -> str:
    return address[0].partition("%")[0]


def _reset(connection: Connection, mark: int) -> bool:
    """Reset it, unless its descriptor is something else by now."""
    if _describe(connection.fd, mark) != connection:
        return False
    return disconnect(connection.fd)
