"""UDP sessions: one per client endpoint and outbound, with endpoint-independent mapping and filtering (RFC 4787).

A reply from an address that the client reached under a Fake-IP comes back from that Fake-IP.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import structlog

from ztun.gateway.engine import Engine
from ztun.gateway.failures import UDP_ANSWER
from ztun.gateway.flowlog import flow_log
from ztun.gateway.limits import Limits
from ztun.gateway.routing import NamePool, Router, UnmappedError, packed, text
from ztun.ports import RULE_DEFAULT, Buffer, DatagramLink, Destination, Outbound, OutboundError
from ztun.rules import DIRECT
from ztun.stack import Datagram, DatagramHeader, reverse
from ztun.stack.sources import SourceCounts, source_of
from ztun.wire.icmp import Reason

log = structlog.get_logger("ztun.udp")

_MAX_WAITING = 32  # datagrams of a session while its link is being opened
_MAX_FLOWS = 1024  # destinations that one session remembers
_MAX_STRANGERS = 64  # senders that one session remembers beside those
_FLOWS_PER_SESSION = 4  # destinations that all sessions together remember, for each session there may be
_MAX_WAITING_BYTES = 4 << 20  # of all sessions
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
        self.started = now
        self.last_used = now
        self.first: tuple[Destination, int] | None = None  # where the first datagram went, and by which rule
        self.destinations = 0
        self.up = 0  # bytes of payload from the client
        self.down = 0
        self.fakes: set[bytes] = set()
        self.flows: dict[bytes, UdpFlow] = {}
        self._relay = relay
        self._link: DatagramLink | None = None
        self._waiting: list[tuple[Destination, bytes]] = []
        self._replies: dict[tuple[str, int], DatagramHeader] = {}
        self._refused: set[tuple[str, int]] = set()  # senders for whom the client has no socket any more
        self._waiting_bytes = 0
        self._quotes: dict[Destination, bytes] = {}
        self._task = relay.engine.loop.create_task(self._open())

    async def _open(self) -> None:
        try:
            self._link = await self.outbound.open_datagrams(self._received, self._failed, self._unreachable)
        except OutboundError as error:
            self._failed(error)
            return
        waiting = self._take_waiting()
        for destination, payload in waiting:
            self._forward(destination, (payload,))

    def _take_waiting(self) -> list[tuple[Destination, bytes]]:
        waiting, self._waiting = self._waiting, []
        self._relay.waiting_bytes -= self._waiting_bytes
        self._waiting_bytes = 0
        return waiting

    def _wait(self, destination: Destination, payload: bytes) -> None:
        relay = self._relay
        if len(self._waiting) >= _MAX_WAITING or relay.waiting_bytes + len(payload) > _MAX_WAITING_BYTES:
            relay.engine.stack.drop("udp-waiting")
            return
        self._waiting.append((destination, payload))
        self._waiting_bytes += len(payload)
        relay.waiting_bytes += len(payload)

    def add(self, datagram: Datagram, destination: Destination, rule: int) -> UdpFlow:
        """The first datagram to a destination; the reply to it will come from where the client sent it."""
        self.first = self.first or (destination, rule)
        self.destinations += 1
        flow = UdpFlow(self, destination, bytes(datagram.packet[:_QUOTE]))
        self._refused.discard(destination)
        if len(self.flows) < _MAX_FLOWS and self._relay.has_room_for_flow():
            self.flows[datagram.key] = flow
            self._replies[destination] = DatagramHeader(reverse(datagram.key))
            self._quotes[destination] = flow.quote
        return flow

    def send(self, destination: Destination, payloads: Sequence[Buffer], now: float) -> None:
        """Send a run: datagrams of one size, of which the last may be shorter."""
        self.last_used = now
        self._relay.sent += len(payloads)
        self.up += (len(payloads) - 1) * len(payloads[0]) + len(payloads[-1])
        if self._link is not None:
            self._forward(destination, payloads)
            return
        for payload in payloads:
            self._wait(destination, bytes(payload))

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
            relay.engine.stack.drop("udp-refused" if (host, port) in self._refused else "udp-reply-address")
            return
        self.last_used = relay.engine.now()
        self.down += len(payload)
        relay.received += -(-len(payload) // size) if size else 1
        relay.engine.stack.send_udp_run(header, payload, size)
        relay.engine.send()  # now: who reads next writes over the payload

    def _stranger(self, host: str, port: int) -> DatagramHeader | None:
        """Somebody the client never wrote to: full cone lets it in, under its own address."""
        if (host, port) in self._refused:
            return None
        address = packed(host)
        own_address, own_port = self.endpoint
        if address is None or len(address) != len(own_address):
            return None
        header = DatagramHeader(address + own_address + port.to_bytes(2, "big") + own_port)
        if len(self._replies) < len(self.flows) + _MAX_STRANGERS:
            self._replies[host, port] = header
        return header

    def _failed(self, error: OutboundError) -> None:
        latest = next(reversed(self.flows.values()), None)
        self._relay.tell(self, latest.quote if latest else b"", error)
        self._relay.forget(self, error.failure.value)

    def refuse(self, key: bytes, sender: tuple[str, int]) -> bool:
        """The client has no socket for what comes from there: neither pass on more of it, nor remember whom to.

        It may have others at the same port, each connected to a peer of its own, so the rest of the session goes on.
        key: of the client's datagrams to the sender; sender: its literal address and port, for one without a flow.
        Returns whether there was a flow.
        """
        flow = self.flows.pop(key, None)
        if flow is not None:
            self._relay.engine.stack.udp_flows.pop(key, None)
            sender = flow.destination
            self._quotes.pop(sender, None)
        self._replies.pop(sender, None)
        if len(self._refused) < _MAX_FLOWS:
            self._refused.add(sender)
        return flow is not None

    def describe(self, now: float) -> dict[str, Any]:
        """A row of `ztun status --flows`. A session may have several destinations; the first one is named."""
        address, port = self.endpoint
        client, peer = text(address), self.first[0] if self.first is not None else Destination("", 0)
        return {
            "protocol": "udp",
            "client": f"[{client}]:{int.from_bytes(port)}" if ":" in client else f"{client}:{int.from_bytes(port)}",
            "destination": f"[{peer.host}]:{peer.port}" if ":" in peer.host else f"{peer.host}:{peer.port}",
            "destinations": self.destinations,
            "rule": self.first[1] if self.first is not None else None,
            "outbound": self.outbound.tag,
            "state": "open" if self._link is not None else "dialling",
            "up": self.up,
            "down": self.down,
            "seconds": round(now - self.started, 3),
            "idle_s": round(now - self.last_used, 3),
        }

    def close(self) -> None:
        self._take_waiting()
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
        limits: Limits,
        on_dns: Callable[[Datagram], None],
    ) -> None:
        self.engine = engine
        self.sent = 0
        self.received = 0
        self.total = 0
        self._router = router
        self._names = names
        self._idle = idle
        self._limit = limits.udp_sessions
        self._of = SourceCounts(limits.udp_sessions_per_source)
        self.waiting_bytes = 0  # of datagrams whose link is being opened
        self._on_dns = on_dns
        self._sessions: dict[tuple[bytes, bytes, str], UdpSession] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._paused = False

    def __len__(self) -> int:
        return len(self._sessions)

    def describe(self, now: float) -> list[dict[str, Any]]:
        """Rows of `ztun status --flows`, one for each session."""
        return [session.describe(now) for session in self._sessions.values()]

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
        if self._paused and route.outbound.type != DIRECT:
            self.engine.stack.send_unreachable(datagram.packet, Reason.NETWORK, now)
            return None
        session = self._session(datagram, route.outbound, now)
        if session is None:
            return None
        flow = session.add(datagram, route.destination, route.rule)
        if datagram.key in session.flows:
            self.engine.stack.add_udp_flow(datagram.key, functools.partial(session.send, route.destination))
        if route.fake and datagram.destination not in session.fakes:
            session.fakes.add(datagram.destination)
            self._names.acquire(datagram.destination)
        return flow

    def pause(self, error: OutboundError) -> None:
        """No way out: end the sessions, telling their clients `error`, and refuse new ones except to `direct`."""
        self._paused = True
        for session in list(self._sessions.values()):
            session._failed(error)

    def resume(self) -> None:
        self._paused = False

    def _session(self, datagram: Datagram, outbound: Outbound, now: float) -> UdpSession | None:
        endpoint = (datagram.source, datagram.key[-4:-2])
        session = self._sessions.get((*endpoint, outbound.tag))
        if session is None:
            reason = self._objection(datagram.source)
            if reason is not None:
                self.engine.stack.drop(reason)
                self.engine.stack.send_unreachable(datagram.packet, Reason.PORT, now)
                return None
            session = self._sessions[*endpoint, outbound.tag] = UdpSession(self, endpoint, outbound, now)
            self._of.add(source_of(datagram.source))
            self.total += 1
            self._sweep_later()
        return session

    def _objection(self, address: bytes) -> str | None:
        """The drop reason for which this client gets no session more, or None."""
        if len(self._sessions) >= self._limit:
            return "udp-limit"
        return "udp-limit-source" if self._of.is_full(source_of(address)) else None

    def has_room_for_flow(self) -> bool:
        """Whether one more destination can be remembered."""
        return len(self.engine.stack.udp_flows) < _FLOWS_PER_SESSION * self._limit

    def refused(self, key: bytes) -> None:
        """A client answered a datagram with Port Unreachable. key: of its own datagrams of that flow."""
        half = (len(key) - 4) // 2
        sender = (text(key[half:-4]), int.from_bytes(key[-2:], "big"))
        for tag in self._router.tags:
            session = self._sessions.get((key[:half], key[-4:-2], tag))
            if session is not None and session.refuse(key, sender) and not session.flows:
                self.forget(session, "refused by client")

    def tell(self, session: UdpSession, quote: bytes, error: OutboundError) -> None:
        """Answer the client's datagram that begins with `quote` with what went wrong."""
        log.debug("datagram not delivered", outbound=session.outbound.tag, reason=error.failure.value)
        if quote:
            self.engine.stack.send_unreachable(quote, UDP_ANSWER[error.failure], self.engine.now())
            self.engine.send()

    def forget(self, session: UdpSession, how: str) -> None:
        """A session is over. how: it ended, for the log."""
        if self._sessions.pop((*session.endpoint, session.outbound.tag), None) is None:
            return
        session.close()
        self._of.remove(source_of(session.endpoint[0]))
        for key in session.flows:
            self.engine.stack.udp_flows.pop(key, None)
        for address in session.fakes:
            self._names.release(address)
        self._log(session, how)

    def _log(self, session: UdpSession, how: str) -> None:
        address, port = session.endpoint
        destination, rule = session.first or (Destination("", 0), RULE_DEFAULT)
        flow_log.finished(
            "udp",
            address,
            int.from_bytes(port, "big"),
            destination.host,
            destination.port,
            rule,
            session.outbound.tag,
            session.up,
            session.down,
            self.engine.now() - session.started,
            how,
            destinations=session.destinations,
        )

    def _sweep_later(self) -> None:
        if self._sweeper is None:
            self._sweeper = self.engine.loop.call_later(min(self._idle / 4, 15.0), self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        before = self.engine.now() - self._idle
        for session in [s for s in self._sessions.values() if s.last_used <= before]:
            self.forget(session, "idle")
        if self._sessions:
            self._sweep_later()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for session in list(self._sessions.values()):
            self.forget(session, "aborted")
