"""`python -m bench.path`: what a small request costs in this process, between the TUN and the proxy.

The engine, the stack and the relay are ztun's; a socket pair is the TUN, others are the connections to the proxy. All
that is measured is Python and four short system calls: no client's TCP, no proxy's. The lowest figure is the one to
compare, since nothing but the machine makes the others larger.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import statistics
import struct
import sys
import time
from dataclasses import dataclass

from ztun.gateway.engine import Engine
from ztun.gateway.isn import make_isn
from ztun.gateway.tcp_relay import TcpRelay
from ztun.platform import make_event_loop, poller_of
from ztun.platform.linux.tun import TunDevice
from ztun.ports import READABLE
from ztun.stack import BufferPool, Connection, Datagram, Stack, StackSettings
from ztun.wire import ip, tcp, vnet

_CLIENT, _SERVER = b"\x0a\x0a\0\x02", b"\xcb\0\x71\x0a"
_REQUEST, RESPONSE = bytes(44), bytes(222)
_FLOWS = 32
_MSS, _SACK_PERMITTED, _WINDOW_SCALE = bytes((2, 4, 5, 180)), bytes((4, 2)), bytes((1, 3, 3, 7))


def segment(port: int, seq: int, ack: int, flags: int, options: bytes, payload: bytes = b"") -> bytes:
    """What a client sends, as the TUN gives it."""
    offset = (20 + len(options)) // 4
    header = struct.pack("!HHIIHHHH", port, 80, seq % 2**32, ack % 2**32, offset << 12 | flags, 64000, 0, 0) + options
    front = bytes(ip.header(_CLIENT, _SERVER, ip.TCP, len(header) + len(payload)))
    return vnet.pack(vnet.CHECKED) + front + header + payload


def stamps() -> bytes:
    return b"\1\1" + _stamp()


def _stamp() -> bytes:
    return struct.pack("!BBII", 8, 10, int(time.monotonic() * 1000) % 2**32, 1)


LINUX_SYN = _MSS + _SACK_PERMITTED + _stamp() + _WINDOW_SCALE


@dataclass
class Flow:
    """seq, ack: of the client's next segment; proxy: the far end of the relay's socket."""

    port: int
    seq: int
    ack: int
    relay: TcpRelay
    proxy: socket.socket


class Bench:
    """A stack Listener, and the loop that drives it all by hand."""

    def __init__(self) -> None:
        loop = make_event_loop()
        asyncio.set_event_loop(loop)
        ours, self.wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._held = [ours]
        pool = BufferPool()
        self.stack = Stack(self, StackSettings(), make_isn(), pool)
        self.engine = Engine(loop, poller_of(loop), TunDevice("bench", 1500, ours.fileno()), self.stack, pool)
        self.opened: Connection | None = None
        self.flows = [self._open(2000 + number) for number in range(_FLOWS)]

    def _open(self, port: int) -> Flow:
        self._arrives(segment(port, 100, 0, tcp.SYN, LINUX_SYN))
        conn = self.opened
        assert conn is not None
        upstream, proxy = socket.socketpair()
        upstream.setblocking(False)
        self._held.append(upstream)
        self.engine.poller.watch(upstream.fileno(), lambda mask: None)
        relay = TcpRelay(self.engine, conn, upstream, False, lambda relay: None)
        conn.accept(relay, time.monotonic())
        self.engine.send()
        self.wire.recv(4096)
        self._arrives(segment(port, 101, conn.iss + 1, tcp.ACK, stamps()))
        return Flow(port, 101, conn.iss + 1, relay, proxy)

    def _arrives(self, packet: bytes) -> None:
        self.wire.send(packet)
        self.engine._readable(READABLE)

    def requests(self) -> float:
        """One of each flow and its answer. Returns microseconds for each."""
        for flow in self.flows:
            self.wire.send(segment(flow.port, flow.seq, flow.ack, tcp.ACK | tcp.PSH, stamps(), _REQUEST))
            flow.seq += len(_REQUEST)
        begin = time.perf_counter()
        self.engine._readable(READABLE)
        spent = time.perf_counter() - begin
        for flow in self.flows:
            flow.proxy.recv(4096)
            flow.proxy.send(RESPONSE)
            begin = time.perf_counter()
            flow.relay.ready(READABLE)
            spent += time.perf_counter() - begin
            self.wire.recv(4096)
            flow.ack += len(RESPONSE)
        return spent / _FLOWS * 1e6

    # A stack Listener.

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        self.opened = conn

    def udp_received(self, datagram: Datagram, now: float) -> None: ...

    def udp_refused(self, key: bytes, now: float) -> None: ...

    def echo_requested(self, destination: bytes, now: float) -> bool:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.path", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=1500, help=f"of {_FLOWS} requests")
    options = parser.parse_args()
    bench = Bench()
    found = [bench.requests() for _ in range(options.rounds)]
    print(f"a request: {min(found):.2f} us at least, {statistics.median(found):.2f} us in the median")
    if bench.stack.drops:
        print(f"dropped: {bench.stack.drops}", file=sys.stderr)
    return 1 if bench.stack.drops else 0


if __name__ == "__main__":
    sys.exit(main())
