"""UDP sessions: one per client endpoint and outbound, with endpoint-independent mapping and filtering (RFC 4787).

A reply from an address that the client reached under a Fake-IP comes back from that Fake-IP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import structlog

from ztun.gateway.engine import Engine
from ztun.gateway.failures import UDP_ANSWER
from ztun.gateway.routing import NamePool, Route, Router, UnmappedError, packed
from ztun.ports import Buffer, DatagramLink, Destination, Outbound, OutboundError
from ztun.stack import Datagram
from ztun.wire.icmp import Reason

log = structlog.get_logger("ztun.udp")

_MAX_WAITING = 32  # datagrams of a session while its link is being opened
_MAX_PEERS = 1024  # destinations that one session remembers
_QUOTE = 128  # bytes of a packet that are kept to be quoted: its headers and some payload (RFC 792 asks for 8)


class Peer(NamedTuple):
    """A destination as the client sees it: packed address and port."""

    address: bytes
    port: int


class UdpSession:
    """One client endpoint on one outbound."""

    def __init__(self, relay: UdpRelay, client: Peer, outbound: Outbound, now: float) -> None:
        self.client = client
        self.outbound = outbound
        self.last_used = now
        self.quote = b""  # the latest packet, for an ICMP error about the whole session
        self.fakes: set[bytes] = set()
        self._relay = relay
        self._link: DatagramLink | None = None
        self._waiting: list[tuple[Destination, bytes]] = []
        self._sent: dict[Destination, Peer] = {}
        self._quotes: dict[Destination, bytes] = {}
        self._seen: dict[tuple[str, int], Peer] = {}
        self._task = relay.engine.loop.create_task(self._open())

    async def _open(self) -> None:
        try:
            self._link = await self.outbound.open_datagrams(self._received, self._failed, self._unreachable)
        except OutboundError as error:
            self._failed(error)
            return
        waiting, self._waiting = self._waiting, []
        for destination, payload in waiting:
            self._forward(destination, payload)

    def send(self, datagram: Datagram, destination: Destination, now: float) -> None:
        self.last_used = now
        self.quote = bytes(datagram.packet[:_QUOTE])
        if destination in self._sent or len(self._sent) < _MAX_PEERS:
            self._sent[destination] = Peer(datagram.destination, datagram.destination_port)
            self._quotes[destination] = self.quote
        if self._link is not None:
            self._forward(destination, datagram.payload)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting.append((destination, bytes(datagram.payload)))
        else:
            self._relay.engine.stack.drop("udp-waiting")

    def _forward(self, destination: Destination, payload: Buffer) -> None:
        assert self._link is not None
        try:
            self._link.send(destination, payload)
        except OutboundError as error:
            self._unreachable(destination, error)

    def _unreachable(self, destination: Destination, error: OutboundError) -> None:
        self._relay.tell(self, self._quotes.get(destination, b""), error)

    def _received(self, host: str, port: int, payload: Buffer) -> None:
        relay = self._relay
        peer = self._peer(host, port)
        if peer is None:
            relay.engine.stack.drop("udp-reply-address")
            return
        self.last_used = relay.engine.now()
        relay.received += 1
        relay.engine.stack.send_udp(*peer, *self.client, memoryview(payload))
        relay.engine.send()

    def _peer(self, host: str, port: int) -> Peer | None:
        """Who the client believes is talking to it when `host`, as the outbound calls it, does."""
        known = self._seen.get((host, port)) or self._sent.get(Destination(host, port))
        if known is not None:
            return known
        address = packed(host)
        if address is None:
            return None
        peer = Peer(address, port)
        taken = set(self._seen.values())
        for destination, candidate in self._sent.items():
            # A name was sent; the answer has an address. The first newcomer with that port is the one.
            if destination.port == port and candidate not in taken and packed(destination.host) is None:
                peer = candidate
                break
        if len(peer.address) != len(self.client.address):
            return None
        if len(self._seen) < _MAX_PEERS:
            self._seen[host, port] = peer
        return peer

    def _failed(self, error: OutboundError) -> None:
        self._relay.tell(self, self.quote, error)
        self._relay.forget(self)

    def close(self) -> None:
        self._task.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None


class UdpRelay:
    def __init__(
        self,
        engine: Engine,
        router: Router,
        names: NamePool,
        idle: float,
        limit: int,
        on_dns: Callable[[Datagram], None],
    ) -> None:
        self.engine = engine
        self.sent = 0
        self.received = 0
        self.total = 0
        self._router = router
        self._names = names
        self._idle = idle
        self._limit = limit
        self._on_dns = on_dns
        self._sessions: dict[tuple[bytes, int, str], UdpSession] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def receive(self, datagram: Datagram, now: float) -> None:
        try:
            route = self._router.route("udp", datagram.source, datagram.destination, datagram.destination_port)
        except UnmappedError:
            self.engine.stack.drop("fake-ip-unmapped")
            self.engine.stack.send_unreachable(datagram.packet, Reason.HOST, now)
            return
        if route.outbound is None:
            self._on_dns(datagram)
            return
        session = self._session(datagram, route, route.outbound, now)
        if session is not None:
            self.sent += 1
            session.send(datagram, route.destination, now)

    def _session(self, datagram: Datagram, route: Route, outbound: Outbound, now: float) -> UdpSession | None:
        key = (datagram.source, datagram.source_port, outbound.tag)
        session = self._sessions.get(key)
        if session is None:
            if len(self._sessions) >= self._limit:
                self.engine.stack.drop("udp-limit")
                self.engine.stack.send_unreachable(datagram.packet, Reason.PORT, now)
                return None
            session = UdpSession(self, Peer(datagram.source, datagram.source_port), outbound, now)
            self._sessions[key] = session
            self.total += 1
            self._sweep_later()
        if route.fake and datagram.destination not in session.fakes:
            session.fakes.add(datagram.destination)
            self._names.acquire(datagram.destination)
        return session

    def tell(self, session: UdpSession, quote: bytes, error: OutboundError) -> None:
        """Answer the client's datagram that begins with `quote` with what went wrong."""
        log.debug("datagram not delivered", outbound=session.outbound.tag, reason=error.failure.value)
        if quote:
            self.engine.stack.send_unreachable(quote, UDP_ANSWER[error.failure], self.engine.now())
            self.engine.send()

    def forget(self, session: UdpSession) -> None:
        key = (*session.client, session.outbound.tag)
        if self._sessions.pop(key, None) is None:
            return
        session.close()
        for address in session.fakes:
            self._names.release(address)

    def _sweep_later(self) -> None:
        if self._sweeper is None:
            self._sweeper = self.engine.loop.call_later(min(self._idle / 4, 15.0), self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        before = self.engine.now() - self._idle
        for session in [s for s in self._sessions.values() if s.last_used <= before]:
            self.forget(session)
        if self._sessions:
            self._sweep_later()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for session in list(self._sessions.values()):
            self.forget(session)
