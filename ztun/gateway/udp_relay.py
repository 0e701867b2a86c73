"""UDP sessions: one per client endpoint and outbound, with endpoint-independent mapping and filtering (RFC 4787).

A reply from an address that the client reached under a Fake-IP comes back from that Fake-IP.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import structlog

from ztun.gateway.engine import Engine
from ztun.gateway.failures import UDP_ANSWER
from ztun.gateway.flowlog import flow_log
from ztun.gateway.limits import Limits
from ztun.gateway.routing import NamePool, OwnFlow, Routing, UnmappedError, text
from ztun.gateway.udp_session import UdpFlow, UdpSession
from ztun.ports import RULE_DEFAULT, Destination, Outbound, OutboundError
from ztun.rules import DIRECT
from ztun.stack import Datagram
from ztun.stack.sources import SourceCounts, source_of
from ztun.wire.icmp import Reason

log = structlog.get_logger("ztun.udp")

_FLOWS_PER_SESSION = 4  # destinations that all sessions together remember, for each session there may be


class UdpRelay:
    def __init__(
        self,
        engine: Engine,
        router: Routing,
        names: NamePool,
        idle: float,
        limits: Limits,
        on_dns: Callable[[Datagram], None],
        is_own: OwnFlow | None = None,
    ) -> None:
        self.engine = engine
        self.sent = 0
        self.received = 0
        self.total = 0
        self.rebuilt = 0  # links that were opened for sessions whose own had died
        self._router = router
        self._names = names
        self._idle = idle
        self._limit = limits.udp_sessions
        self._of = SourceCounts(limits.udp_sessions_per_source)
        self.waiting_bytes = 0  # of datagrams whose link is being opened
        self._on_dns = on_dns
        self._is_own = is_own
        self._sessions: dict[tuple[bytes, bytes, str], UdpSession] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._paused = False

    def __len__(self) -> int:
        return len(self._sessions)

    def describe(self, now: float) -> list[tuple[bytes, dict[str, Any]]]:
        """Rows of `ztun status --flows`, one for each session, with the client's packed address."""
        return [(session.endpoint[0], session.describe(now)) for session in self._sessions.values()]

    def receive(self, datagram: Datagram, now: float) -> None:
        """A datagram of a flow that the stack has not been told of yet."""
        flow = self._open(datagram, now)
        if flow is not None:
            flow.session.send(flow.destination, (datagram.payload,), now)

    def _open(self, datagram: Datagram, now: float) -> UdpFlow | None:
        """Decide about the first datagram of a flow. None when it ends here."""
        source_port = int.from_bytes(datagram.key[-4:-2])
        if self._is_own is not None and self._is_own(
            "udp", datagram.source, source_port, datagram.destination, datagram.destination_port
        ):
            self.engine.stack.drop("ip-loop")
            return None
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
            session.end(error)

    def resume(self) -> None:
        self._paused = False

    def _session(self, datagram: Datagram, outbound: Outbound, now: float) -> UdpSession | None:
        endpoint = (datagram.source, datagram.key[-4:-2])
        session = self._sessions.get((*endpoint, outbound.tag))
        if session is None:
            refusal = outbound.refuse_datagrams()
            if refusal is not None:
                self.engine.stack.send_unreachable(datagram.packet, UDP_ANSWER[refusal.failure], now)
                return None
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
