"""What all outbounds share: the deadline of a dial, counters, and connections to a proxy."""

from __future__ import annotations

import asyncio
import socket
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from ztun.outbound import tcp
from ztun.outbound.negotiation import Dialogue, negotiate
from ztun.ports import (
    DatagramHandler,
    DatagramLink,
    Destination,
    Failure,
    OutboundError,
    SocketFactory,
    UnreachableHandler,
)

Resolve = Callable[[str], Awaitable[Iterable[str]]]
FailureHandler = Callable[[OutboundError], None]


class Link(DatagramLink, Protocol):
    closed: bool


class BaseOutbound:
    """Counts what `_dial` of a subclass does, and bounds it by the dial deadline.

    dials: connections and datagram links that were asked for; failures: how those ended that failed; drops: reason ->
    datagrams that could not be carried.
    """

    type = "none"

    def __init__(self, tag: str, dial_timeout: float) -> None:
        self.tag = tag
        self.dials = 0
        self.failures: Counter[Failure] = Counter()
        self.drops: Counter[str] = Counter()
        self._dial_timeout = dial_timeout
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()

    async def connect(self, destination: Destination) -> socket.socket:
        """See `ztun.ports.Outbound.connect`. Cancelling closes what was opened."""
        self.dials += 1
        try:
            sock = await self._dial(destination)
        except OutboundError as error:
            self.failures[error.failure] += 1
            raise
        self._sockets.add(sock)
        return sock

    async def open_datagrams(
        self,
        on_datagram: DatagramHandler,
        on_failure: FailureHandler,
        on_unreachable: UnreachableHandler | None = None,
    ) -> DatagramLink:
        """See `ztun.ports.Outbound.open_datagrams`."""
        self.dials += 1
        try:
            link = await self._open_link(on_datagram, on_failure, on_unreachable)
        except OutboundError as error:
            self.failures[error.failure] += 1
            raise
        self._links.add(link)
        return link

    async def close(self) -> None:
        """Close the datagram links. Connections belong to who asked for them."""
        for link in list(self._links):
            link.close()

    def statistics(self) -> dict[str, Any]:
        """For `status --json`: type, dials, active (connections that live), datagram_links, failures, drops."""
        return {
            "type": self.type,
            "dials": self.dials,
            "active": sum(1 for sock in list(self._sockets) if sock.fileno() >= 0),
            "datagram_links": sum(1 for link in list(self._links) if not link.closed),
            "failures": {failure.value: count for failure, count in self.failures.items()},
            "drops": dict(self.drops),
        }

    async def _dial(self, destination: Destination) -> socket.socket:
        raise NotImplementedError

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        raise self._error(Failure.UNSUPPORTED, f"{self.type} carries no datagrams")

    def _error(self, failure: Failure, what: str) -> OutboundError:
        return OutboundError(failure, f"outbound {self.tag}: {what}")


class ProxyOutbound(BaseOutbound):
    """Reaches everything through one proxy.

    host, port: where the proxy listens, the host a name or a literal; keepalive_interval: seconds.
    """

    def __init__(
        self,
        tag: str,
        host: str,
        port: int,
        credentials: tuple[str, str] | None,
        factory: SocketFactory,
        resolve: Resolve,
        dial_timeout: float,
        keepalive_interval: int,
    ) -> None:
        super().__init__(tag, dial_timeout)
        self._host = host
        self._port = port
        self._credentials = credentials
        self._factory = factory
        self._resolve = resolve
        self._keepalive_interval = keepalive_interval
        self._addresses: list[str] = [host] if tcp.is_literal(host) else []
        self._server = f"proxy [{host}]:{port}" if ":" in host else f"proxy {host}:{port}"

    async def _negotiated(self, dialogue: Dialogue) -> socket.socket:
        """A connection to the proxy on which `dialogue` was carried out. Raises OutboundError."""
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(self._dial_timeout):
                sock = await self._connect_to_proxy()
                await negotiate(sock, dialogue)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, TimeoutError):
                raise self._too_late(sock is not None, dialogue.asked) from None
            if isinstance(error, OutboundError):
                raise self._error(error.failure, f"{self._server}: {error}") from None
            raise
        return sock

    async def _connect_to_proxy(self) -> socket.socket:
        addresses = self._addresses if self._addresses[:1] == [self._host] else await self._proxy_addresses()
        try:
            sock = await tcp.connect(self._factory, addresses, self._port)
        except OSError as error:
            raise OutboundError(Failure.PROXY_UNREACHABLE, f"cannot be reached: {error.strerror}") from None
        tcp.keep_alive(sock, self._keepalive_interval)
        return sock

    async def _proxy_addresses(self) -> list[str]:
        """The addresses of a proxy given by name. When the name server fails, those of last time are tried."""
        if self._host == "localhost":  # never asked of a name server (RFC 6761, section 6.3)
            return ["127.0.0.1", "::1"]
        try:
            self._addresses = list(await self._resolve(self._host)) or self._addresses
        except OutboundError as error:
            if not self._addresses:
                raise OutboundError(Failure.PROXY_UNREACHABLE, f"its name does not resolve: {error}") from None
        if not self._addresses:
            raise OutboundError(Failure.PROXY_UNREACHABLE, "its name has no address")
        return self._addresses

    def _too_late(self, connected: bool, asked: bool) -> OutboundError:
        within = f"within {self._dial_timeout:g} s"
        if not connected:
            return self._error(Failure.PROXY_UNREACHABLE, f"{self._server} did not accept a connection {within}")
        if not asked:
            return self._error(Failure.PROXY_FAILED, f"{self._server} did not answer the greeting {within}")
        return self._error(Failure.TIMED_OUT, f"{self._server} did not reach the destination {within}")


async def resolved(resolve: Resolve, host: str) -> list[str]:
    """The addresses to dial for `host`, a name or a literal. Raises OutboundError where there are none."""
    if tcp.is_literal(host):
        return [host]
    addresses = list(await resolve(host))
    if not addresses:
        raise OutboundError(Failure.NAME_NOT_FOUND, f"{host} has no address")
    return addresses
