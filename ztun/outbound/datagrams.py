"""Datagrams without a proxy: one unconnected socket per address family, open to answers from anywhere (full cone)."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ztun.outbound.batch import Run
from ztun.outbound.errors import os_error, unreachable
from ztun.outbound.resolving import Resolve, resolved
from ztun.outbound.tcp import family_of, is_literal
from ztun.outbound.udp import Address, UdpSocket
from ztun.ports import Buffer, DatagramHandler, Destination, OutboundError, Poller, SocketFactory, UnreachableHandler

_MAX_TARGETS = 4096  # destinations remembered per link
_MAX_WAITING = 16  # datagrams that wait for one name to be resolved


class _Target(NamedTuple):
    family: int
    address: tuple[str, int]


class DirectLink:
    """See `ztun.ports.DatagramLink`. Answers from the address that a name resolved to are reported under the name.

    on_unreachable(destination, error): called when ICMP says that a destination cannot be reached; without it the next
    `send` to that destination raises. drops: reason -> datagrams that were not sent, counted up.
    """

    def __init__(
        self,
        poller: Poller,
        factory: SocketFactory,
        resolve: Resolve,
        on_datagram: DatagramHandler,
        on_unreachable: UnreachableHandler | None,
        drops: Counter[str],
    ) -> None:
        self.closed = False
        self._poller = poller
        self._factory = factory
        self._resolve = resolve
        self._on_datagram = on_datagram
        self._on_unreachable = on_unreachable
        self._drops = drops
        self._sockets: dict[int, UdpSocket] = {}
        self._targets: dict[Destination, _Target] = {}
        self._hosts: dict[tuple[str, int], str] = {}  # real address -> the host that it was sent to as
        self._senders: dict[Any, tuple[str, int]] = {}  # what the socket calls a sender -> its real address
        self._waiting: dict[Destination, list[bytes]] = {}
        self._resolving: set[asyncio.Task[None]] = set()
        self._noted: dict[Destination, OutboundError] = {}

    def send(self, destination: Destination, payload: Buffer) -> None:
        """See `ztun.ports.DatagramLink.send`. A datagram to a new name waits for the name's address."""
        self.send_run(destination, (payload,))

    def send_run(self, destination: Destination, payloads: Sequence[Buffer]) -> None:
        """See `ztun.ports.DatagramLink.send_run`."""
        if self.closed:
            return
        if self._noted and (error := self._noted.pop(destination, None)):
            raise error
        target = self._targets.get(destination) or self._find_target(destination, payloads)
        if target is None:
            return
        try:
            self._socket(target.family).send_run(b"", payloads, target.address)
        except OSError as error:
            raise unreachable(destination, error) from None

    def close(self) -> None:
        self.closed = True
        for task in self._resolving:
            task.cancel()
        for sock in self._sockets.values():
            sock.close()

    def _socket(self, family: int) -> UdpSocket:
        return self._sockets.get(family) or self._add_socket(family)

    def _add_socket(self, family: int) -> UdpSocket:
        raw = self._factory(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock = UdpSocket(self._poller, raw, lambda run: self._received(sock, run), self._failed, self._drops)
        self._sockets[family] = sock
        return sock

    def _find_target(self, destination: Destination, payloads: Sequence[Buffer]) -> _Target | None:
        """The target of a new destination; None when its name has to be resolved first."""
        if is_literal(destination.host):
            return self._add_target(destination, destination.host)
        waiting = self._waiting.get(destination)
        if waiting is None:
            waiting = self._waiting[destination] = []
            task = asyncio.get_running_loop().create_task(self._resolve_target(destination))
            self._resolving.add(task)
            task.add_done_callback(self._resolving.discard)
        room = _MAX_WAITING - len(waiting)
        waiting += map(bytes, payloads[:room])
        if len(payloads) > room:
            self._drops["name pending"] += len(payloads) - room
        return None

    def _add_target(self, destination: Destination, address: str) -> _Target:
        if len(self._targets) >= _MAX_TARGETS:
            self._targets.clear()
            self._hosts.clear()
        target = self._targets[destination] = _Target(family_of(address), (address, destination.port))
        self._hosts[target.address] = destination.host
        return target

    async def _resolve_target(self, destination: Destination) -> None:
        try:
            addresses = await resolved(self._resolve, destination.host)
            self._add_target(destination, self._reachable(addresses))
            for payload in self._waiting.pop(destination):
                self.send(destination, payload)
        except OutboundError as error:
            self._waiting.pop(destination, None)
            self._tell(destination, error)

    def _reachable(self, addresses: list[str]) -> str:
        """The first address that there is a route to, IPv4 before IPv6; the first at all where there is none."""
        ordered = sorted(addresses, key=lambda address: ":" in address)
        for address in ordered:
            with self._factory(family_of(address), socket.SOCK_DGRAM) as probe:
                if probe.connect_ex((address, 9)) == 0:  # connecting a UDP socket sends nothing
                    return address
        return ordered[0]

    def _received(self, sock: UdpSocket, run: Run) -> None:
        sender = self._senders.get(run.name)
        if sender is None:
            if len(self._senders) >= _MAX_TARGETS:
                self._senders.clear()
            sender = self._senders[run.name] = sock.reader.sender_of(run)
        self._on_datagram(self._hosts.get(sender, sender[0]), sender[1], run.payload, run.size)

    def _failed(self, number: int, address: Address | None) -> None:
        if address is None or not address:
            return
        host, port = str(address[0]), int(address[1])
        destination = Destination(self._hosts.get((host, port), host), port)
        self._tell(destination, unreachable(destination, os_error(number)))

    def _tell(self, destination: Destination, error: OutboundError) -> None:
        if self.closed:
            return
        if self._on_unreachable is not None:
            self._on_unreachable(destination, error)
            return
        if len(self._noted) >= _MAX_TARGETS:
            self._noted.clear()
        self._noted[destination] = error
