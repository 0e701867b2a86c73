"""One UDP session: what a client endpoint sends through one outbound, and what comes back to it.

The link to the outbound may die while the session lives: the client's next datagram opens another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from ztun.gateway.routing import endpoint, packed, text
from ztun.ports import Buffer, DatagramLink, Destination, Failure, Outbound, OutboundError
from ztun.stack import Datagram, DatagramHeader, reverse

if TYPE_CHECKING:
    from ztun.gateway.udp_relay import UdpRelay

log = structlog.get_logger("ztun.udp")

_MAX_WAITING = 32  # datagrams of a session while its link is being opened
_MAX_WAIT = 5.0  # seconds that they wait for another link; who sent them has sent them again since
_MAX_FLOWS = 1024  # destinations that one session remembers
_MAX_STRANGERS = 64  # senders that one session remembers beside those
_MAX_WAITING_BYTES = 4 << 20  # of all sessions
_QUOTE = 128  # bytes of a packet that are kept to be quoted: its headers and some payload (RFC 792 asks for 8)
_STEADY = 1.0  # seconds; a link that dies sooner is not opened again at once
_FIRST_PAUSE, _MAX_PAUSE = 0.1, 5.0  # seconds before another one then; twice as long each time
# Failures that do not pass: the session is over, and its client is told.
_FINAL = (Failure.UNSUPPORTED, Failure.PROHIBITED, Failure.PROXY_AUTHENTICATION)


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
        self._opened = 0  # links so far
        self._opened_at = now
        self._open_after = now  # not before then another link
        self._early_ends = 0  # links in a row that died at once, or did not come about
        self._waiting: list[tuple[float, Destination, bytes]] = []
        self._replies: dict[tuple[str, int], DatagramHeader] = {}
        self._refused: set[tuple[str, int]] = set()  # senders for whom the client has no socket any more
        self._waiting_bytes = 0
        self._quotes: dict[Destination, bytes] = {}
        self._opening: asyncio.Task[None] | None = None
        self._open_soon()

    # The link.

    def _open_soon(self) -> None:
        """Open a link, when the pause is over that follows one that did not last."""
        if self._opening is None:
            pause = self._open_after - self._relay.engine.now()
            self._opening = self._relay.engine.loop.create_task(self._open(pause))

    async def _open(self, pause: float) -> None:
        if pause > 0:
            await asyncio.sleep(pause)
        try:
            link = await self.outbound.open_datagrams(self._received, self._lost, self._unreachable)
        except OutboundError as error:
            self._opening = None
            self._not_opened(error)
            return
        self._opening, self._link = None, link
        self._opened_at = self._relay.engine.now()
        self._relay.rebuilt += self._opened > 0
        self._opened += 1
        for _, destination, payload in self._take_waiting():
            self._forward(destination, (payload,))

    def _not_opened(self, error: OutboundError) -> None:
        if not self._opened or error.failure in _FINAL:
            self.end(error)
            return
        self._pause()
        self._drop_late(error)
        if self._waiting:
            self._open_soon()

    def _lost(self, error: OutboundError) -> None:
        """The link died; it has closed itself. Whoever still sends gets another one."""
        self._link = None
        if self._relay.engine.now() - self._opened_at < _STEADY:
            self._pause()
        else:
            self._early_ends = 0
        log.debug("datagram link lost", outbound=self.outbound.tag, reason=str(error))

    def _pause(self) -> None:
        pause = min(_FIRST_PAUSE * 2**self._early_ends, _MAX_PAUSE)
        self._early_ends = min(self._early_ends + 1, 10)
        self._open_after = self._relay.engine.now() + pause

    # What waits for it.

    def _take_waiting(self) -> list[tuple[float, Destination, bytes]]:
        waiting, self._waiting = self._waiting, []
        self._relay.waiting_bytes -= self._waiting_bytes
        self._waiting_bytes = 0
        return waiting

    def _wait(self, destination: Destination, payload: bytes, now: float) -> None:
        relay = self._relay
        if len(self._waiting) >= _MAX_WAITING or relay.waiting_bytes + len(payload) > _MAX_WAITING_BYTES:
            relay.engine.stack.drop("udp-waiting")
            return
        self._waiting.append((now, destination, payload))
        self._waiting_bytes += len(payload)
        relay.waiting_bytes += len(payload)

    def _drop_late(self, error: OutboundError) -> None:
        """Give up what has waited too long, and say so."""
        before = self._relay.engine.now() - _MAX_WAIT
        late: list[Destination] = []
        for since, destination, payload in self._take_waiting():
            if since > before:
                self._wait(destination, payload, since)
            else:
                self._relay.engine.stack.drop("udp-waiting")
                late.append(destination)
        self._tell(late, error)

    def _tell(self, destinations: Sequence[Destination], error: OutboundError) -> None:
        for destination in dict.fromkeys(destinations):
            self._relay.tell(self, self._quotes.get(destination, b""), error)

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
            self._wait(destination, bytes(payload), now)
        self._open_soon()

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

    def end(self, error: OutboundError) -> None:
        """There is no link, nor will there be one: tell those who wait, or else who was there last."""
        waiting = [destination for _, destination, _ in self._waiting]
        if not waiting and self.flows:
            waiting = [next(reversed(self.flows.values())).destination]
        self._tell(waiting, error)
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
        peer = self.first[0] if self.first is not None else Destination("", 0)
        return {
            "protocol": "udp",
            "client": endpoint(text(address), int.from_bytes(port)),
            "destination": endpoint(*peer),
            "destinations": self.destinations,
            "rule": self.first[1] if self.first is not None else None,
            "outbound": self.outbound.tag,
            "state": "open" if self._link is not None else "dialling" if self._opening is not None else "waiting",
            "up": self.up,
            "down": self.down,
            "seconds": round(now - self.started, 3),
            "idle_s": round(now - self.last_used, 3),
        }

    def close(self) -> None:
        self._take_waiting()
        if self._opening is not None:
            self._opening.cancel()
        if self._link is not None:
            self._link.close()
            self._link = None


class UdpFlow(NamedTuple):
    """What one client endpoint sends to one destination. quote: the beginning of its first packet, for ICMP errors."""

    session: UdpSession
    destination: Destination
    quote: bytes
