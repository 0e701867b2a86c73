"""What all outbounds share: the deadline of a dial, counters, and connections to a proxy."""

from __future__ import annotations

import asyncio
import socket
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ztun.outbound import tcp
from ztun.outbound.datagrams import DirectLink
from ztun.outbound.dial import Dial, Dialogue, Stage
from ztun.outbound.errors import failure_of
from ztun.outbound.pool import WarmPool
from ztun.outbound.resolving import Resolve as Resolve
from ztun.outbound.resolving import resolved
from ztun.outbound.verdict import Datagrams, DatagramVerdict
from ztun.ports import (
    Carry,
    Connected,
    DatagramHandler,
    DatagramLink,
    Destination,
    Dialling,
    Failed,
    Failure,
    OutboundError,
    Poller,
    SocketFactory,
    UnreachableHandler,
)

FailureHandler = Callable[[OutboundError], None]

_REMEMBERED = 1.0  # seconds for which a proxy's addresses are not asked for again; the resolver minds their TTL


class Link(DatagramLink, Protocol):
    closed: bool


@dataclass(frozen=True, slots=True)
class Tools:
    """What outbounds are made with.

    poller: tells of their sockets; factory: makes them; resolve: the real addresses of a name; dial_timeout: seconds
    for a whole dial, resolving and negotiating included; keepalive_interval: seconds, of connections to a
    proxy; warm, warm_most: how many of those wait for a flow, see WarmPool, which 0 turns off.
    """

    poller: Poller
    factory: SocketFactory
    resolve: Resolve
    dial_timeout: float
    keepalive_interval: int = 75
    warm: int = 0
    warm_most: int = 64


class BaseOutbound:
    """Dials, counts, and bounds each dial by the deadline.

    dials: connections and datagram links that were asked for; failures: how those ended that failed; drops: reason ->
    datagrams that could not be carried.
    """

    type = "none"

    def __init__(self, tag: str, tools: Tools, datagrams: Datagrams) -> None:
        self.tag = tag
        self.datagrams = datagrams
        self.dials = 0
        self.failures: Counter[Failure] = Counter()
        self.drops: Counter[str] = Counter()
        self.poller = tools.poller
        self.factory = tools.factory
        self._resolve = tools.resolve
        self._dial_timeout = tools.dial_timeout
        self._deadlines: dict[Dial, float] = {}  # in order, since all have the same time
        self._timer: asyncio.TimerHandle | None = None
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()

    # Connections.

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        """See `ztun.ports.Outbound.dial`."""
        raise NotImplementedError

    def _start(self, dial: Dial, addresses: Sequence[str]) -> Dial:
        """Begin. addresses: of its host, where they are known."""
        self._admit(dial)
        dial.start(addresses, self._addresses_of)
        return dial

    def _admit(self, dial: Dial) -> None:
        self.dials += dial.counted
        self._deadlines[dial] = time.monotonic() + self._dial_timeout
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._dial_timeout, self._look_at_deadlines)

    def _refuse(self, error: OutboundError, failed: Failed) -> Dialling:
        """A dial that failed before it began."""
        self.dials += 1
        self.failures[error.failure] += 1
        failed(error)
        return Nothing()

    async def connect(self, destination: Destination) -> socket.socket:
        """`dial` for who would rather wait: the socket is watched no more. Raises OutboundError."""
        return await self._wait_for(lambda connected, failed: self.dial(destination, connected, failed))

    async def _wait_for(self, begin: Callable[[Connected, Failed], Dialling]) -> socket.socket:
        answer: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()

        def connected(sock: socket.socket, more: bool) -> None:
            self.poller.unwatch(sock.fileno())
            if answer.done():  # cancelled a moment ago
                sock.close()
            else:
                answer.set_result(sock)

        def failed(error: OutboundError) -> None:
            if not answer.done():
                answer.set_exception(error)

        dialling = begin(connected, failed)
        try:
            return await answer
        except asyncio.CancelledError:
            dialling.cancel()
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                answer.result().close()
            raise

    async def _addresses_of(self, host: str) -> list[str]:
        return await resolved(self._resolve, host)

    def _look_at_deadlines(self) -> None:
        self._timer = None
        now = time.monotonic()
        try:
            while self._deadlines and next(iter(self._deadlines.values())) <= now:
                next(iter(self._deadlines)).fail(TimeoutError())
        finally:  # a defect in one that is told costs the others nothing
            if self._deadlines and self._timer is None:
                wait = next(iter(self._deadlines.values())) - now
                self._timer = asyncio.get_running_loop().call_later(max(wait, 0.0), self._look_at_deadlines)

    # The Dialler of its dials.

    def ended(self, dial: Dial) -> None:
        """See `dial.Dialler.ended`."""
        del self._deadlines[dial]

    def describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        """See `dial.Dialler.describe`; every failure passes here once."""
        late = isinstance(error, TimeoutError) and error.errno is None  # the kernel's has a number
        described = self._too_late(dial) if late else self._describe(dial, error)
        if dial.counted:
            self.failures[described.failure] += 1
        return described

    def _describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        raise NotImplementedError

    def _too_late(self, dial: Dial) -> OutboundError:
        raise NotImplementedError

    def warm_up(self) -> None:
        """See `ztun.ports.Outbound.warm_up`."""

    def forget_connections(self) -> None:
        """See `ztun.ports.Outbound.forget_connections`."""

    def server_addresses(self) -> Sequence[str] | None:
        """See `ztun.ports.Outbound.server_addresses`."""
        return None

    # Datagrams.

    async def open_datagrams(
        self,
        on_datagram: DatagramHandler,
        on_failure: FailureHandler,
        on_unreachable: UnreachableHandler | None = None,
    ) -> DatagramLink:
        """See `ztun.ports.Outbound.open_datagrams`."""

        def failed(error: OutboundError) -> None:
            self.datagrams.lost += 1
            on_failure(error)

        self.dials += 1
        try:
            if (refusal := self.datagrams.refusal(time.monotonic())) is not None:
                raise refusal
            link = await self._open_link(on_datagram, failed, on_unreachable)
        except OutboundError as error:
            self.failures[error.failure] += 1
            raise
        self.datagrams.granted()
        self._links.add(link)
        return link

    def refuse_datagrams(self) -> OutboundError | None:
        """See `ztun.ports.Outbound.refuse_datagrams`."""
        refusal = self.datagrams.refusal(time.monotonic())
        self.datagrams.refused += refusal is not None
        return refusal

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        """Raises OutboundError."""
        raise NotImplementedError

    def _open_direct_link(self, on_datagram: DatagramHandler, on_unreachable: UnreachableHandler | None) -> Link:
        return DirectLink(self.poller, self.factory, self._resolve, on_datagram, on_unreachable, self.drops)

    async def close(self) -> None:
        """End the dials and close the datagram links. Connections belong to who asked for them."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for dial in list(self._deadlines):
            dial.cancel()
        for link in list(self._links):
            link.close()

    def statistics(self) -> dict[str, Any]:
        """For `status --json`: type, dials, dialling, datagram_links, udp (see Datagrams), failures, drops."""
        return {
            "type": self.type,
            "dials": self.dials,
            "dialling": len(self._deadlines),
            "datagram_links": sum(1 for link in list(self._links) if not link.closed),
            "udp": self.datagrams.describe(time.monotonic()),
            "failures": {failure.value: count for failure, count in self.failures.items()},
            "drops": dict(self.drops),
        }

    def _error(self, failure: Failure, what: str) -> OutboundError:
        return OutboundError(failure, f"outbound {self.tag}: {what}")


class ProxyOutbound(BaseOutbound):
    """Reaches everything through one proxy.

    host, port: where it listens, the host a name or a literal; udp: what becomes of datagrams, see `Datagrams`.
    """

    def __init__(
        self,
        tag: str,
        host: str,
        port: int,
        credentials: tuple[str, str] | None,
        tools: Tools,
        udp: DatagramVerdict,
    ) -> None:
        reason = f"outbound {tag}: {self._why_rejected()}" if udp == "reject" else None
        super().__init__(tag, tools, Datagrams(tag, udp, reason))
        self._host = host
        self._port = port
        self._credentials = credentials
        self._keepalive_interval = tools.keepalive_interval
        self._addresses: list[str] = [host] if tcp.is_literal(host) else []
        self._known_until = float("inf") if self._addresses else 0.0
        self._server = f"proxy [{host}]:{port}" if ":" in host else f"proxy {host}:{port}"
        self._pool: WarmPool | None = None
        if tools.warm:
            self._pool = WarmPool(tools.poller, tools.warm, tools.warm_most, self._begin_warm, self._probe)

    def dial(self, destination: Destination, connected: Connected, failed: Failed) -> Dialling:
        """See `ztun.ports.Outbound.dial`."""
        warm = self._pool.take() if self._pool is not None else None
        try:
            dialogue = self._dialogue(destination, greeted=warm is not None)
        except OutboundError as error:  # no name that a proxy could take
            if warm is not None:
                self.poller.closing(warm.fileno())
                warm.close()
            return self._refuse(self._error(error.failure, f"{self._server}: {error}"), failed)
        if warm is None:
            return self._dial(dialogue, connected, failed)
        dial = Dial(self, self._host, self._port, dialogue, connected, failed)
        dial.cold = lambda: self._begin_again(dial, self._dialogue(destination))
        self._admit(dial)
        dial.adopt(warm)
        return dial

    def _begin_again(self, dial: Dial, dialogue: Dialogue) -> None:
        """The connection that had waited was one that the proxy had given up: make another one."""
        dial.dialogue = dialogue
        dial.start(self._known_addresses(), self._addresses_of)

    def _why_rejected(self) -> str:
        return 'its "udp" is "reject"'

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        if self.datagrams.verdict == "direct":
            return self._open_direct_link(on_datagram, on_unreachable)
        return await self._open_proxied_link(on_datagram, on_failure)

    async def _open_proxied_link(self, on_datagram: DatagramHandler, on_failure: FailureHandler) -> Link:
        """Ask the proxy for a link. Raises OutboundError."""
        raise NotImplementedError

    def _known_addresses(self) -> Sequence[str]:
        return self._addresses if time.monotonic() < self._known_until else ()

    def _dial(self, dialogue: Dialogue, connected: Connected, failed: Failed, *, counted: bool = True) -> Dial:
        dial = Dial(self, self._host, self._port, dialogue, connected, failed, counted=counted)
        return self._start(dial, self._known_addresses())

    def _dialogue(self, destination: Destination, *, greeted: bool = False) -> Dialogue:
        """What to say to the proxy. greeted: the dialogue of `_greeting` went before."""
        raise NotImplementedError

    def _greeting(self) -> Dialogue | None:
        """What can be said to the proxy before the destination is known, if anything."""
        return None

    def warm_up(self) -> None:
        """See `ztun.ports.Outbound.warm_up`."""
        if self._pool is not None:
            self._pool.fill()

    def forget_connections(self) -> None:
        """See `ztun.ports.Outbound.forget_connections`."""
        self.datagrams.forget()
        self._forget_waiting()

    def _forget_waiting(self) -> None:
        """Those that wait lead nowhere, or are not as they should be now: greeted, or not."""
        if self._pool is not None:
            self._pool.drop()

    def server_addresses(self) -> Sequence[str]:
        """See `ztun.ports.Outbound.server_addresses`. A name's are those that it had last."""
        return ["127.0.0.1"] if self._host == "localhost" else self._addresses

    async def close(self) -> None:
        """See BaseOutbound.close."""
        if self._pool is not None:
            self._pool.close()
        await super().close()

    def statistics(self) -> dict[str, Any]:
        """As BaseOutbound.statistics, and pool: waiting, hits, misses, lost, expired."""
        statistics = super().statistics()
        if (pool := self._pool) is not None:
            statistics["pool"] = {
                "waiting": len(pool), "hits": pool.hits, "misses": pool.misses, "lost": pool.lost,
                "expired": pool.expired,
            }  # fmt: skip
        return statistics

    def _begin_warm(self, connected: Connected, failed: Failed) -> Dialling:
        dial = Dial(self, self._host, self._port, self._greeting(), connected, failed, counted=False)
        return self._start(dial, self._known_addresses())

    async def _negotiated(self, dialogue: Dialogue) -> socket.socket:
        """A connection to the proxy on which `dialogue` was carried out, as a part of something else that is counted.

        Raises OutboundError."""
        sock = await self._wait_for(lambda connected, failed: self._dial(dialogue, connected, failed, counted=False))
        self._probe(sock)
        return sock

    def _probe(self, sock: socket.socket) -> None:
        tcp.keep_alive(sock, self._keepalive_interval)

    async def _addresses_of(self, host: str) -> list[str]:
        """The addresses of a proxy given by name. When the name server fails, those of last time are tried."""
        if host == "localhost":  # never asked of a name server (RFC 6761, section 6.3)
            return ["127.0.0.1", "::1"]
        try:
            self._addresses = list(await self._resolve(host)) or self._addresses
            self._known_until = time.monotonic() + _REMEMBERED
        except OutboundError as error:
            if not self._addresses:
                raise OutboundError(Failure.PROXY_UNREACHABLE, f"its name does not resolve: {error}") from None
        if not self._addresses:
            raise OutboundError(Failure.PROXY_UNREACHABLE, "its name has no address")
        return self._addresses

    def _describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        if isinstance(error, OSError):
            if failure_of(error) is Failure.EXHAUSTED:
                return self._error(Failure.EXHAUSTED, f"{error.strerror}")
            return self._error(Failure.PROXY_UNREACHABLE, f"{self._server}: cannot be reached: {error.strerror}")
        return self._error(error.failure, f"{self._server}: {error}")

    def _too_late(self, dial: Dial) -> OutboundError:
        within = f"within {self._dial_timeout:g} s"
        if dial.stage is not Stage.NEGOTIATING:
            return self._error(Failure.PROXY_UNREACHABLE, f"{self._server} did not accept a connection {within}")
        if dial.dialogue is not None and not dial.dialogue.asked:
            return self._error(Failure.PROXY_FAILED, f"{self._server} did not answer the greeting {within}")
        return self._error(Failure.TIMED_OUT, f"{self._server} did not reach the destination {within}")


class Nothing:
    """A dial that was over before it began."""

    over = True
    carry: Carry | None = None

    def cancel(self) -> None:
        pass
