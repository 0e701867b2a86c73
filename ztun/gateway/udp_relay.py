"""UDP sessions: one per client endpoint and outbound, with endpoint-independent mapping and filtering (RFC 4787).

A reply from an address that the client reached under a Fake-IP comes back from that Fake-IP.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog

from ztun.gateway.engine import Engine
from ztun.gateway.failures import UDP_ANSWER
from ztun.gateway.routing import NamePool, Router, UnmappedError, packed
from ztun.ports import Buffer, DatagramLink, Destination, Outbound, OutboundError
from ztun.stack import Datagram, DatagramHeader, reverse
from ztun.wire.icmp import Reason

log = structlog.get_logger("ztun.udp")

_MAX_WAITING = 32  # datagrams of a session while its link is being opened
_MAX_FLOWS = 1024  # destinations, and senders, that one session remembers
_QUOTE = 128  # bytes of a packet that are kept to be quoted: its headers and some payload (RFC 792 asks for 8)


class UdpFlow(NamedTuple):
    """What one client endpoint sends to one destination. quote: the beginning of its first packet, for ICMP errors."""

    session: UdpSession
    destination: Destination
    quote: bytes


class UdpSession:
    """One client endpoint on one outbound. endpoint: the client's packed address and port."""

    def __init__(self, relay: UdpRelay, endpoint: tuple[bytes, bytes], outbound: Outbound, now: float) -> None:
        self.endpoint = endpoint
        self.outbound = outbound
        self.last_used = now
        self.fakes: set[bytes] = set()
        self.flows: dict[bytes, UdpFlow] = {}
        self._relay = relay
        self._link: DatagramLink | None = None
        self._waiting: list[tuple[Destination, bytes]] = []
        self._replies: dict[tuple[str, int], DatagramHeader] = {}
        self._quotes: dict[Destination, bytes] = {}
        self._task = relay.engine.loop.create_task(self._open())

    async def _open(self) -> None:
        try:
            self._link = await self.outbound.open_datagrams(self._received, self._failed, self._unreachable)
        except OutboundError as error:
            self._failed(error)
            return
        waiting, self._waiting = self._waiting, []
        for destination, payload in waiting:
            self._forward(destination, (payload,))

    def add(self, datagram: Datagram, destination: Destination) -> UdpFlow:
        """The first datagram to a destination; the reply to it will come from where the client sent it."""
        flow = UdpFlow(self, destination, bytes(datagram.packet[:_QUOTE]))
        if len(self.flows) < _MAX_FLOWS:
            self.flows[datagram.key] = flow
            self._replies[destination] = DatagramHeader(reverse(datagram.key))
            self._quotes[destination] = flow.quote
        return flow

    def send(self, destination: Destination, payloads: Sequence[Buffer], now: float) -> None:
        """Send a run: datagrams of one size, of which the last may be shorter."""
        self.last_used = now
        self._relay.sent += len(payloads)
        if self._link is not None:
            self._forward(destination, payloads)
            return
        for payload in payloads:
            if len(self._waiting) < _MAX_WAITING:
                self._waiting.append((destination, bytes(payload)))
            else:
                self._relay.engine.stack.drop("udp-waiting")

    def _forward(self, destination: Destination, payloads: Sequence[Buffer]) -> None:
        assert self._link is not None
        try:
            self._link.send_run(destination, payloads)
        except OutboundError as error:
            self._unreachable(destination, error)

    def _unreachable(self, destination: Destination, error: OutboundError) -> None:
        self._relay.tell(self, self._quotes.get(destination, b""), error)

    def _received(self, host: str, port: int, payload: memoryview, size: int) -> None:
        relay = self._relay
        header = self._replies.get((host, port)) or self._stranger(host, port)
        if header is None:
            relay.engine.stack.drop("udp-reply-address")
            return
        self.last_used = relay.engine.now()
        relay.received += -(-len(payload) // size) if size else 1
        relay.engine.stack.send_udp_run(header, payload, size)
        relay.engine.send()  # now: who reads next writes over the payload

    def _stranger(self, host: str, port: int) -> DatagramHeader | None:
        """Somebody the client never wrote to: full cone lets it in, under its own address."""
        address = packed(host)
        own_address, own_port = self.endpoint
        if address is None or len(address) != len(own_address):
            return None
        header = DatagramHeader(address + own_address + port.to_bytes(2, "big") + own_port)
        if len(self._replies) < 2 * _MAX_FLOWS:
            self._replies[host, port] = header
        return header

    def _failed(self, error: OutboundError) -> None:
        latest = next(reversed(self.flows.values()), None)
        self._relay.tell(self, latest.quote if latest else b"", error)
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
        self._sessions: dict[tuple[bytes, bytes, str], UdpSession] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def receive(self, datagram: Datagram, now: float) -> None:
        """A datagram of a flow that the stack has not been told of yet."""
        flow = self._open(datagram, now)
        if flow is not None:
            flow.session.send(flow.destination, (datagram.payload,), now)

    def _open(self, datagram: Datagram, now: float) -> UdpFlow | None:
        """Decide about the first datagram of a flow. None when it ends here."""
        try:
            route = self._router.route("udp", datagram.source, datagram.destination, datagram.destination_port)
        except UnmappedError:
            self.engine.stack.drop("fake-ip-unmapped")
            self.engine.stack.send_unreachable(datagram.packet, Reason.HOST, now)
            return None
        if route.outbound is None:
            self._on_dns(datagram)
            return None
        session = self._session(datagram, route.outbound, now)
        if session is None:
            return None
        flow = session.add(datagram, route.destination)
        if datagram.key in session.flows:
            self.engine.stack.add_udp_flow(datagram.key, functools.partial(session.send, route.destination))
        if route.fake and datagram.destination not in session.fakes:
            session.fakes.add(datagram.destination)
            self._names.acquire(datagram.destination)
        return flow

    def _session(self, datagram: Datagram, outbound: Outbound, now: float) -> UdpSession | None:
        endpoint = (datagram.source, datagram.key[-4:-2])
        session = self._sessions.get((*endpoint, outbound.tag))
        if session is None:
            if len(self._sessions) >= self._limit:
                self.engine.stack.drop("udp-limit")
                self.engine.stack.send_unreachable(datagram.packet, Reason.PORT, now)
                return None
            session = self._sessions[*endpoint, outbound.tag] = UdpSession(self, endpoint, outbound, now)
            self.total += 1
            self._sweep_later()
        return session

    def tell(self, session: UdpSession, quote: bytes, error: OutboundError) -> None:
        """Answer the client's datagram that begins with `quote` with what went wrong."""
        log.debug("datagram not delivered", outbound=session.outbound.tag, reason=error.failure.value)
        if quote:
            self.engine.stack.send_unreachable(quote, UDP_ANSWER[error.failure], self.engine.now())
            self.engine.send()

    def forget(self, session: UdpSession) -> None:
        if self._sessions.pop((*session.endpoint, session.outbound.tag), None) is None:
            return
        session.close()
        for key in session.flows:
            self.engine.stack.udp_flows.pop(key, None)
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
