"""One TCP flow, from its SYN to its end."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

from ztun.gateway.failures import TCP_ANSWER
from ztun.gateway.offload import KernelRelay
from ztun.gateway.routing import Route, endpoint, text
from ztun.gateway.tcp_relay import TcpRelay
from ztun.ports import Dialling, OutboundError
from ztun.stack import Closed, Connection, State

if TYPE_CHECKING:
    from ztun.gateway.gateway import Gateway

_MAY_FINISH: Final = (State.ESTABLISHED, State.CLOSE_WAIT, State.OFFLOADED)


class Flow:
    """A stack Handler while the outbound is dialled, and what is known of the flow after that."""

    __slots__ = ("_gateway", "conn", "dialling", "relay", "route", "started")

    def __init__(self, gateway: Gateway, conn: Connection, route: Route, now: float) -> None:
        self._gateway = gateway
        self.conn = conn
        self.route = route
        self.dialling: Dialling | None = None
        self.relay: TcpRelay | KernelRelay | None = None
        self.started = now

    def established(self, now: float) -> None:
        raise AssertionError("established before it was accepted")

    def data(self, payload: memoryview, now: float) -> int:
        raise AssertionError("data before it was accepted")

    def eof(self, now: float) -> None:
        raise AssertionError("FIN before it was accepted")

    def writable(self, now: float) -> None:
        pass

    def closed(self, how: Closed, now: float) -> None:
        """The client gave up, or was refused."""
        if self.dialling is not None:
            self.dialling.cancel()
        self._gateway.ended(self, how, now)

    def connected(self, sock: socket.socket, more: bool) -> None:
        """The outbound is there: answer the client."""
        gateway = self._gateway
        if self.conn.is_closed:
            gateway.engine.poller.closing(sock.fileno())
            sock.close()
            return
        if gateway.carrier is not None and not more and self.dialling is None and self.carry(sock, "", 0, 0):
            return  # it was connected before anybody could say how it may go on
        relay = TcpRelay(gateway.engine, self.conn, sock, more, self.relay_closed)
        self.relay = relay
        self.conn.accept(relay, gateway.engine.now())
        gateway.engine.send()

    def carry(self, sock: socket.socket, address: str, port: int, unread: int) -> bool:
        """The outbound is there: have the kernel carry the flow, if it can. See ztun.ports.Carry."""
        gateway = self._gateway
        if self.conn.is_closed:
            return False
        assert gateway.carrier is not None
        self.relay = gateway.carrier.take(self.conn, sock, address, port, unread, self.relay_closed)
        if self.relay is None:
            return False
        gateway.engine.send()
        return True

    def failed(self, error: OutboundError) -> None:
        """The outbound is not to be had: say so to the client."""
        gateway = self._gateway
        gateway.dial_failed(self, error)
        self.conn.refuse(gateway.engine.now(), TCP_ANSWER[error.failure])
        gateway.engine.send()

    def relay_closed(self, relay: TcpRelay | KernelRelay) -> None:
        self._gateway.ended(self, relay.how, self._gateway.engine.now())

    def drain(self, now: float, before: float) -> None:
        """The gateway stops: refuse what is not answered yet, end what was idle since `before`."""
        if self.relay is None:
            self.conn.refuse(now)
        elif self.conn.state in _MAY_FINISH and self.relay.is_idle(before):
            self.relay.finish(now)

    def describe(self, now: float) -> dict[str, Any]:
        """A row of `ztun status --flows`."""
        conn, route = self.conn, self.route
        if isinstance(self.relay, KernelRelay):
            self.relay.refresh()
        host, port = route.destination
        return {
            "protocol": "tcp",
            "client": endpoint(text(conn.source), conn.source_port),
            "destination": endpoint(host, port),
            "address": text(conn.destination),
            "rule": route.rule,
            "outbound": route.outbound.tag if route.outbound is not None else "",
            "state": conn.state.name.lower().replace("_", "-"),
            "up": conn.received,
            "down": conn.sent,
            "waiting_up": self.relay.pending if self.relay is not None else 0,
            "waiting_down": conn.queued,
            "seconds": round(now - self.started, 3),
            "idle_s": round(now - conn.last_data, 3),
        }
