"""The gateway: tells new flows from each other, dials for them and keeps count."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from ztun.gateway.dns_stream import DnsStream
from ztun.gateway.engine import Engine
from ztun.gateway.failures import TCP_ANSWER
from ztun.gateway.isn import make_isn
from ztun.gateway.routing import Decider, NamePool, Route, Router, UnmappedError, text
from ztun.gateway.tcp_relay import TcpRelay
from ztun.gateway.udp_relay import UdpRelay
from ztun.ports import Outbound, OutboundError, PacketDevice
from ztun.stack import BufferPool, Closed, Connection, Datagram, DatagramHeader, Stack, StackSettings, reverse

log = structlog.get_logger("ztun.flow")

_MAX_DNS_TASKS = 512
_MAX_UDP_SESSIONS = 16384


class Answerer(Protocol):
    """The DNS service as far as the stack's clients see it."""

    @property
    def counters(self) -> Mapping[str, int]: ...

    async def answer(self, query: bytes | memoryview, *, over_tcp: bool) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Times are in seconds, sizes in bytes."""

    mtu: int = 1500
    hijack_dns: bool = True
    tcp_idle: float = 7440.0
    udp_idle: float = 300.0
    buffers: int = 32


class Dial:
    """A flow between its SYN and the outbound's answer: a stack Handler that only waits for the client to give up."""

    __slots__ = ("task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task

    def established(self, now: float) -> None:
        raise AssertionError("established before it was accepted")

    def data(self, payload: memoryview, now: float) -> int:
        raise AssertionError("data before it was accepted")

    def eof(self, now: float) -> None:
        raise AssertionError("FIN before it was accepted")

    def writable(self, now: float) -> None:
        pass

    def closed(self, how: Closed, now: float) -> None:
        if how is not Closed.REFUSED and how is not Closed.UNREACHABLE:
            self.task.cancel()


class Gateway:
    """A stack Listener. Start it when the device is up; stop it before the device is closed."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        device: PacketDevice,
        rules: Decider,
        names: NamePool,
        dns: Answerer,
        outbounds: Mapping[str, Outbound],
        options: GatewayOptions,
    ) -> None:
        settings = StackSettings(mtu=options.mtu, tcp_idle=options.tcp_idle)
        self._loop = loop
        self._names = names
        self._dns = dns
        self._buffers = BufferPool(keep=options.buffers)
        self._stack = Stack(self, settings, make_isn(), self._buffers)
        self.engine = Engine(loop, device, self._stack, self._buffers)
        self._router = Router(rules, names, outbounds, options.hijack_dns)
        self._udp = UdpRelay(self.engine, self._router, names, options.udp_idle, _MAX_UDP_SESSIONS, self._hijacked)
        self._dials: set[asyncio.Task[None]] = set()
        self._dns_tasks: set[asyncio.Task[None]] = set()
        self._relays: set[TcpRelay] = set()
        self._ended: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._echoes = 0

    def start(self) -> None:
        """Begin to serve packets."""
        self.engine.start()

    async def stop(self) -> None:
        """End every flow: clients and upstreams get a reset, as nobody is left to carry the rest."""
        for task in (*self._dials, *self._dns_tasks):
            task.cancel()
        await asyncio.gather(*self._dials, *self._dns_tasks, return_exceptions=True)
        now = self.engine.now()
        for conn in list(self._stack.connections.values()):
            conn.abort(now)
        self._udp.close()
        self.engine.stop()

    def remember(self, address: bytes, rule: int) -> None:
        """A name that `rule` sends direct has this real address, but some flows to it are to be decided here."""
        self._router.remember(address, rule)

    # The stack's Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        try:
            route = self._router.route("tcp", conn.source, conn.destination, conn.destination_port)
        except UnmappedError:
            self._stack.drop("fake-ip-unmapped")
            conn.refuse(now)
            return
        if route.outbound is None:
            conn.accept(DnsStream(self.engine, conn, self._answer_over_tcp, lambda _: None), now)
            return
        if route.fake:
            self._names.acquire(conn.destination)
        task = self._loop.create_task(self._dial(conn, route, route.outbound))
        conn.handler = Dial(task)
        self._dials.add(task)
        task.add_done_callback(lambda ended: self._dial_ended(ended, conn, route))

    def udp_received(self, datagram: Datagram, now: float) -> None:
        self._udp.receive(datagram, now)

    def echo_requested(self, destination: bytes, now: float) -> bool:
        """A Fake-IP that stands for a name is up as far as ping can tell; nobody else's pings are answered for them."""
        answered = self._names.contains(destination) and self._names.name_of(destination) is not None
        self._echoes += answered
        return answered

    # TCP.

    async def _dial(self, conn: Connection, route: Route, outbound: Outbound) -> None:
        try:
            sock = await outbound.connect(route.destination)
        except OutboundError as error:
            self._dial_failed(conn, route, outbound, error)
            self._release(conn, route)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):  # then _dial_ended does
                self._release(conn, route)
            conn.abort(self.engine.now())
            self.engine.send()
            raise
        else:
            self._connected(conn, route, outbound, sock)

    def _dial_ended(self, task: asyncio.Task[None], conn: Connection, route: Route) -> None:
        """A task that is cancelled before it began never runs: only here can what it would release be released."""
        self._dials.discard(task)
        if task.cancelled():
            self._release(conn, route)

    def _connected(self, conn: Connection, route: Route, outbound: Outbound, sock: socket.socket) -> None:
        if conn.is_closed:
            sock.close()
            self._release(conn, route)
            return
        started = self.engine.now()

        def closed(relay: TcpRelay) -> None:
            self._relays.discard(relay)
            self._ended[relay.how.value] += 1
            self._release(conn, route)
            self._log_flow(conn, route, outbound, relay.how, self.engine.now() - started)

        relay = TcpRelay(self.engine, conn, sock, closed)
        self._relays.add(relay)
        conn.accept(relay, started)
        self.engine.send()

    def _dial_failed(self, conn: Connection, route: Route, outbound: Outbound, error: OutboundError) -> None:
        self._failures[error.failure.value] += 1
        log.info(
            "flow refused",
            client=f"{text(conn.source)}:{conn.source_port}",
            destination=f"{route.destination.host}:{route.destination.port}",
            outbound=outbound.tag,
            reason=error.failure.value,
            detail=str(error),
        )
        conn.refuse(self.engine.now(), TCP_ANSWER[error.failure])
        self.engine.send()

    def _release(self, conn: Connection, route: Route) -> None:
        if route.fake:
            self._names.release(conn.destination)

    def _log_flow(self, conn: Connection, route: Route, outbound: Outbound, how: Closed, duration: float) -> None:
        log.debug(
            "flow ended",
            client=f"{text(conn.source)}:{conn.source_port}",
            destination=f"{route.destination.host}:{route.destination.port}",
            rule=route.rule,
            outbound=outbound.tag,
            up=conn.received,
            down=conn.sent,
            seconds=round(duration, 3),
            how=how.value,
        )

    # DNS that clients sent elsewhere.

    async def _answer_over_tcp(self, query: bytes) -> bytes | None:
        return await self._dns.answer(query, over_tcp=True)

    def _hijacked(self, datagram: Datagram) -> None:
        if len(self._dns_tasks) >= _MAX_DNS_TASKS:
            self._stack.drop("dns-limit")
            return
        back = DatagramHeader(reverse(datagram.key))
        task = self._loop.create_task(self._answer_datagram(bytes(datagram.payload), back))
        self._dns_tasks.add(task)
        task.add_done_callback(self._dns_tasks.discard)

    async def _answer_datagram(self, query: bytes, back: DatagramHeader) -> None:
        reply = await self._dns.answer(query, over_tcp=False)
        if reply is not None:
            self._stack.send_udp(back, reply)
            self.engine.send()

    # Statistics.

    def statistics(self) -> dict[str, Any]:
        """The part of `ztun status --json` that the gateway knows: tcp, udp, icmp, dns, buffers, device, drops."""
        stack = self._stack
        return {
            "tcp": {
                "active": len(stack.connections),
                "half_open": stack.half_open,
                "total": stack.opened,
                "packets": stack.received["tcp"],
                "ended": dict(self._ended),
                "failed": dict(self._failures),
            },
            "udp": {
                "active": len(self._udp),
                "total": self._udp.total,
                "packets": stack.received["udp"],
                "sent": self._udp.sent,
                "received": self._udp.received,
            },
            "icmp": {"packets": stack.received["icmp"], "echoes": self._echoes},
            "dns": dict(self._dns.counters),
            "buffers": {
                "allocated": self._buffers.allocated,
                "reused": self._buffers.reused,
                "freed": self._buffers.freed,
                "free": len(self._buffers),
            },
            "device": {"read": self.engine.read, "written": self.engine.written, "refused": self.engine.refused},
            "drops": dict(stack.drops),
        }
