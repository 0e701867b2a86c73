"""The gateway: tells new flows from each other, dials for them and keeps count."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import structlog

from ztun.gateway.dns_stream import DnsStream
from ztun.gateway.engine import Engine
from ztun.gateway.flow import Flow
from ztun.gateway.flowlog import flow_log
from ztun.gateway.isn import make_isn
from ztun.gateway.limits import Limits
from ztun.gateway.offload import Carrier
from ztun.gateway.routing import Decider, NamePool, Origins, OwnFlow, Router, UnmappedError
from ztun.gateway.udp_relay import UdpRelay
from ztun.ports import Failure, Offload, Outbound, OutboundError, PacketDevice, Poller
from ztun.rules import DIRECT
from ztun.stack import BufferPool, Closed, Connection, Datagram, DatagramHeader, Stack, StackSettings, reverse
from ztun.stack.sources import SourceCounts, source_of
from ztun.stack.state import State
from ztun.wire.icmp import Reason

log = structlog.get_logger("ztun.outbound")

_MAX_DNS_TASKS: Final = 512
_MAX_DNS_TASKS_PER_SOURCE: Final = 256
_IDLE: Final = 1.0  # seconds without data, after which a flow may be ended when the gateway stops
_DRAIN_STEP: Final = 0.05
_YOUNG = 5.0  # seconds that a flow lives before its upstream connection is kept alive


class Answerer(Protocol):
    """The DNS service as far as the stack's clients see it."""

    def statistics(self) -> Mapping[str, Any]: ...

    async def answer(self, query: bytes | memoryview, *, over_tcp: bool) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """Times are in seconds, sizes in bytes."""

    mtu: int = 1500
    hijack_dns: bool = True
    tcp_idle: float = 7440.0
    udp_idle: float = 300.0
    buffers: int = 32
    keepalive_interval: int = 75
    limits: Limits = field(default_factory=Limits)


class Gateway:
    """A stack Listener. Start it when the device is up; stop it before the device is closed."""

    def __init__(
        self,
        *,
        loop: asyncio.AbstractEventLoop,
        poller: Poller,
        device: PacketDevice,
        rules: Decider,
        names: NamePool,
        dns: Answerer,
        outbounds: Mapping[str, Outbound],
        options: GatewayOptions,
        origins: Origins | None = None,
        is_own: OwnFlow | None = None,
        offload: Offload | None = None,
    ) -> None:
        settings = options.limits.applied(StackSettings(mtu=options.mtu, tcp_idle=options.tcp_idle))
        self._loop = loop
        self._names = names
        self._dns = dns
        self._buffers = BufferPool(keep=options.buffers)
        self._stack = Stack(self, settings, make_isn(), self._buffers)
        self.engine = Engine(loop, poller, device, self._stack, self._buffers)
        self.carrier = Carrier(self.engine, offload, options.tcp_idle) if offload is not None else None
        self._router = Router(rules, names, outbounds, options.hijack_dns, origins)
        self._origins = origins
        self._is_own = is_own
        self._udp = UdpRelay(self.engine, self._router, names, options.udp_idle, options.limits, self._hijacked, is_own)
        self._keepalive_interval = options.keepalive_interval
        self._dns_tasks: set[asyncio.Task[None]] = set()
        self._dns_tasks_of = SourceCounts(_MAX_DNS_TASKS_PER_SOURCE)
        self._flows: set[Flow] = set()
        self._young: dict[Flow, float] = {}  # flows without keep-alive, the oldest first
        self._look_at_young: asyncio.TimerHandle | None = None
        self._kept_alive = 0  # upstream connections that lived long enough to be probed
        self._ended: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._echoes = 0
        self._paused: str | None = None
        self._draining = False

    def start(self) -> None:
        """Begin to serve packets."""
        self.engine.start()
        if self.carrier is not None:
            self.carrier.start()
        self._keep_alive()

    async def drain(self, seconds: float) -> None:
        """Take no new flows, end the idle ones with a FIN to both sides, and give the others so long to end.

        A flow is idle when nothing went either way for a second: a FIN sooner could look like the end of an answer.
        """
        self._draining = True
        until = self.engine.now() + seconds
        while self._flows and (now := self.engine.now()) < until:
            for flow in list(self._flows):
                flow.drain(now, now - _IDLE)
            self.engine.send()
            await asyncio.sleep(_DRAIN_STEP)

    async def stop(self) -> None:
        """End every flow: clients and upstreams get a reset, as nobody is left to carry the rest."""
        for task in self._dns_tasks:
            task.cancel()
        await asyncio.gather(*self._dns_tasks, return_exceptions=True)
        if self._look_at_young is not None:
            self._look_at_young.cancel()
        if self.carrier is not None:
            self.carrier.stop()
        now = self.engine.now()
        for conn in list(self._stack.connections.values()):
            conn.abort(now)
        self._udp.close()
        self.engine.stop()

    def remember(self, address: bytes, rule: int) -> None:
        """A name that `rule` sends direct has this real address, but some flows to it are to be decided here."""
        self._router.remember(address, rule)

    def replace_rules(self, rules: Decider) -> None:
        """Decide about new flows by these; those that are under way stay where they are."""
        self._router.replace_rules(rules)

    def pause(self, reason: str) -> None:
        """There is no way out: end what waits for one, and refuse what would need one, at once and not when it is due.

        Connections that are established stay, as theirs may come back. Flows of the outbound `direct` are tried: their
        destination may be near.
        """
        self._paused = reason
        now = self.engine.now()
        for conn in list(self._stack.connections.values()):
            if conn.state is State.DIALING:
                conn.refuse(now, Reason.NETWORK)
        self._udp.pause(OutboundError(Failure.NETWORK_UNREACHABLE, reason))
        self.engine.send()

    def resume(self) -> None:
        """There is a way out again."""
        self._paused = None
        self._udp.resume()

    # The stack's Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        if self._draining:
            self._stack.drop("stopping")
            conn.refuse(now)
            return
        if self._is_own is not None and self._is_own(
            "tcp", conn.source, conn.source_port, conn.destination, conn.destination_port
        ):
            self._stack.drop("ip-loop")
            conn.refuse(now)
            return
        try:
            route = self._router.route("tcp", conn.source, conn.destination, conn.destination_port)
        except UnmappedError:
            self._stack.drop("fake-ip-unmapped")
            conn.refuse(now)
            return
        if route.outbound is None:
            conn.accept(DnsStream(self.engine, conn, self._answer_over_tcp, lambda _: None), now)
            return
        if self._paused is not None and route.outbound.type != DIRECT:
            self._failures[Failure.NETWORK_UNREACHABLE.value] += 1
            conn.refuse(now, Reason.NETWORK)
            return
        if route.fake:
            self._names.acquire(conn.destination)
        flow = conn.handler = Flow(self, conn, route, now)
        self._flows.add(flow)
        self._young[flow] = now
        dialling = flow.dialling = route.outbound.dial(route.destination, flow.connected, flow.failed)
        if self.carrier is not None and not dialling.over:
            dialling.carry = flow.carry

    def udp_received(self, datagram: Datagram, now: float) -> None:
        if self._draining:
            self._stack.drop("stopping")
            self._stack.send_unreachable(datagram.packet, Reason.PORT, now)
            return
        self._udp.receive(datagram, now)

    def udp_refused(self, key: bytes, now: float) -> None:
        self._udp.refused(key)

    def echo_requested(self, destination: bytes, now: float) -> bool:
        """A Fake-IP that stands for a name is up as far as ping can tell; nobody else's pings are answered for them."""
        answered = self._names.contains(destination) and self._names.name_of(destination) is not None
        self._echoes += answered
        return answered

    # TCP.

    def ended(self, flow: Flow, how: Closed, now: float) -> None:
        """Nothing is left of a flow. how: the client's side of it."""
        self._flows.discard(flow)
        self._young.pop(flow, None)
        route, conn = flow.route, flow.conn
        if route.fake:
            self._names.release(conn.destination)
        if flow.relay is not None:
            self._ended[how._value_] += 1
        elif how is Closed.REFUSED or how is Closed.UNREACHABLE:
            return  # dial_failed has told of it
        flow_log.finished(
            "tcp",
            conn.source,
            conn.source_port,
            route.destination.host,
            route.destination.port,
            route.rule,
            route.outbound.tag if route.outbound is not None else "",
            conn.received,
            conn.sent,
            now - flow.started,
            how._value_,  # what `value` says behind two calls
        )

    def dial_failed(self, flow: Flow, error: OutboundError) -> None:
        """Count and report."""
        self._failures[error.failure.value] += 1
        if error.failure is Failure.EXHAUSTED:
            self._stack.drop("tcp-limit-descriptors")
            times = self._failures[Failure.EXHAUSTED.value]
            if times & (times - 1) == 0:  # at 1, 2, 4, 8 …
                log.warning("no descriptors are left for new flows", times=times, remedy="raise its limit (ulimit -n)")
        conn, route = flow.conn, flow.route
        flow_log.refused(
            "tcp",
            conn.source,
            conn.source_port,
            route.destination.host,
            route.destination.port,
            route.rule,
            route.outbound.tag if route.outbound is not None else "",
            self.engine.now() - flow.started,
            error.failure.value,
            str(error),
        )

    def _keep_alive(self) -> None:
        """Four system calls that most flows do not live long enough to need."""
        self._look_at_young = self._loop.call_later(_YOUNG, self._keep_alive)
        before = self.engine.now() - _YOUNG
        grown_up = itertools.takewhile(lambda flow: self._young[flow] <= before, self._young)
        for flow in [flow for flow in grown_up if flow.relay is not None]:
            assert flow.relay is not None
            flow.relay.keep_alive(self._keepalive_interval)
            self._kept_alive += 1
            del self._young[flow]

    # DNS that clients sent elsewhere.

    async def _answer_over_tcp(self, query: bytes) -> bytes | None:
        return await self._dns.answer(query, over_tcp=True)

    def _hijacked(self, datagram: Datagram) -> None:
        source = source_of(datagram.source)
        if len(self._dns_tasks) >= _MAX_DNS_TASKS:
            self._stack.drop("dns-limit")
            return
        if self._dns_tasks_of.is_full(source):
            self._stack.drop("dns-limit-source")
            return
        self._dns_tasks_of.add(source)
        back = DatagramHeader(reverse(datagram.key))
        task = self._loop.create_task(self._answer_datagram(bytes(datagram.payload), back))
        self._dns_tasks.add(task)
        task.add_done_callback(lambda ended: self._dns_answered(ended, source))

    def _dns_answered(self, task: asyncio.Task[None], source: bytes) -> None:
        self._dns_tasks.discard(task)
        self._dns_tasks_of.remove(source)

    async def _answer_datagram(self, query: bytes, back: DatagramHeader) -> None:
        reply = await self._dns.answer(query, over_tcp=False)
        if reply is not None:
            self._stack.send_udp(back, reply)
            self.engine.send()

    # Statistics.

    def active(self) -> Counter[str]:
        """Outbound's tag -> connections through it that live."""
        outbounds = (flow.route.outbound for flow in self._flows if flow.relay is not None)
        return Counter(outbound.tag for outbound in outbounds if outbound is not None)

    def flows(self) -> list[dict[str, Any]]:
        """The flows that live, the oldest first: the body of GET /flows."""
        now = self.engine.now()
        flows = [(flow.conn.source, flow.describe(now)) for flow in self._flows]
        flows += self._udp.describe(now)
        places = {source: self._describe_origin(source) for source in {source for source, _ in flows}}
        return sorted(({**flow, **places[source]} for source, flow in flows), key=lambda flow: -flow["seconds"])

    def _describe_origin(self, source: bytes) -> dict[str, str | None]:
        origin = self._origins(source) if self._origins is not None else None
        mac = origin.mac.hex(":") if origin is not None and origin.mac is not None else None
        return {"interface": origin.interface if origin is not None else None, "mac": mac}

    def statistics(self) -> dict[str, Any]:
        """The part of `ztun status --json` that the gateway knows: tcp, udp, icmp, dns, buffers, device, drops."""
        stack = self._stack
        return {
            "tcp": {
                "active": len(stack.connections),
                "half_open": stack.half_open,
                "total": stack.opened,
                "offloaded": len(self.carrier) if self.carrier is not None else 0,
                "offloaded_total": self.carrier.total if self.carrier is not None else 0,
                "packets": stack.received["tcp"],
                "families": _families(stack, "tcp"),
                "keepalive": {**stack.keepalive, "upstreams": self._kept_alive},
                "ended": dict(self._ended),
                "failed": dict(self._failures),
            },
            "udp": {
                "active": len(self._udp),
                "total": self._udp.total,
                "packets": stack.received["udp"],
                "families": _families(stack, "udp"),
                "sent": self._udp.sent,
                "received": self._udp.received,
                "rebuilt": self._udp.rebuilt,
            },
            "icmp": {
                "packets": stack.received["icmp"],
                "families": _families(stack, "icmp"),
                "echoes": self._echoes,
            },
            "dns": dict(self._dns.statistics()),
            "buffers": {
                "allocated": self._buffers.allocated,
                "reused": self._buffers.reused,
                "freed": self._buffers.freed,
                "free": len(self._buffers),
            },
            "memory": {"held": stack.memory.used, "limit": stack.memory.limit},
            "device": {
                "read": self.engine.read,
                "written": self.engine.written,
                "refused": self.engine.refused,
                "read_errors": self.engine.read_errors,
            },
            "drops": dict(stack.drops),
        }


def _families(stack: Stack, protocol: str) -> dict[str, int]:
    """Packets received, by IP version."""
    return {"ipv4": stack.received[protocol] - stack.received6[protocol], "ipv6": stack.received6[protocol]}
