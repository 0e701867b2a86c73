"""`python -m bench.opening`: what a connection costs in this process, from its SYN to its last ACK.

Everything between the TUN and the proxy is ztun's, its rules and its outbound included. A socket pair is the TUN; the
proxy is a listening socket on loopback that is served by hand between the measured parts, so what is measured beside
ztun's own code is its system calls and what the kernel does within them. The lowest figure is the one to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import socket
import statistics
import struct
import sys
import time
from ipaddress import IPv4Network

from bench.path import LINUX_SYN, RESPONSE, segment, stamps
from ztun.app import COLLECT
from ztun.gateway.gateway import Gateway, GatewayOptions
from ztun.names.pool import FakeIpPool
from ztun.outbound import OutboundSpec, Tools, make_outbounds
from ztun.platform import make_event_loop, poller_of
from ztun.platform.linux.sockets import MarkedSockets
from ztun.platform.linux.tun import TunDevice
from ztun.rules import Rules
from ztun.wire import tcp, vnet

_MARK = 0x5A54
_REQUEST = b"GET / HTTP/1.1\r\nHost: 203.0.113.10\r\nConnection: close\r\n\r\n"
_METHOD, _REPLY = b"\x05\x00", b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
_ACK_AT = vnet.LENGTH + 20 + 8  # of the acknowledgment number, behind the IPv4 header; the sequence number is before it


class NoDns:
    def statistics(self) -> dict[str, int]:
        return {}

    async def answer(self, query: bytes | memoryview, *, over_tcp: bool) -> bytes | None:
        return None


async def nobody(name: str) -> list[str]:
    raise AssertionError(name)


class Bench:
    """One gateway with one SOCKS5 proxy. `spent` grows with the seconds that its code took."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        ours, self._wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._proxy = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._poller = poller_of(loop)
        tools = Tools(self._poller, MarkedSockets(_MARK), nobody, 10.0)
        spec = OutboundSpec("bench", "socks5", "127.0.0.1", self._proxy.getsockname()[1])
        self.gateway = Gateway(
            loop=loop,
            poller=self._poller,
            device=TunDevice("bench", 1500, ours.fileno()),
            rules=Rules(default="bench"),
            names=FakeIpPool(IPv4Network("198.18.0.0/15"), None, 8, 0.0),
            dns=NoDns(),
            outbounds=make_outbounds([spec], tools),
            options=GatewayOptions(),
        )
        self._ours = ours
        self._ports = itertools.cycle(range(1024, 65536))
        self.spent = 0.0
        self.gateway.start()

    def _turn(self) -> None:
        """Let it handle what has come."""
        begin = time.perf_counter()
        self._poller.wait(0.0)  # type: ignore[attr-defined]
        self.spent += time.perf_counter() - begin

    def _says(self, packet: bytes) -> None:
        self._wire.send(packet)
        self._turn()

    def connection(self) -> float:
        """One request of a client that wants the connection closed. Returns the microseconds that it took."""
        self.spent = 0.0
        port = next(self._ports)
        self._says(segment(port, 100, 0, tcp.SYN, LINUX_SYN))
        upstream, _ = self._proxy.accept()
        with upstream:
            for heard, answer in ((3, _METHOD), (10, _REPLY)):
                self._turn()
                assert len(upstream.recv(64)) == heard
                upstream.send(answer)
            self._turn()
            seq, ack = 101, self._sequence() + 1
            self._says(segment(port, seq, ack, tcp.ACK, stamps()))
            self._says(segment(port, seq, ack, tcp.ACK | tcp.PSH, stamps(), _REQUEST))
            assert upstream.recv(4096) == _REQUEST
            seq += len(_REQUEST)
            upstream.send(RESPONSE)
        self._turn()
        ack = self._sequence() + len(RESPONSE) + 1
        self._says(segment(port, seq, ack, tcp.ACK, stamps()))
        self._says(segment(port, seq, ack, tcp.ACK | tcp.FIN, stamps()))
        self._wire.recv(4096)
        return self.spent * 1e6

    def _sequence(self) -> int:
        """That of the next segment that the client gets."""
        (number,) = struct.unpack_from("!I", self._wire.recv(4096), _ACK_AT - 4)
        return int(number)

    async def close(self) -> None:
        await self.gateway.stop()
        for sock in (self._ours, self._wire, self._proxy):
            sock.close()


async def measure(count: int) -> int:
    bench = Bench(asyncio.get_running_loop())
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)  # as in the program
    found = [bench.connection() for _ in range(count)]
    print(f"a connection: {min(found):.1f} us at least, {statistics.median(found):.1f} us in the median")
    drops = bench.gateway.statistics()["drops"]
    await bench.close()
    if drops:
        print(f"dropped: {drops}", file=sys.stderr)
    return 1 if drops else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.opening", description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=make_event_loop) as runner:
        return runner.run(measure(options.count))


if __name__ == "__main__":
    sys.exit(main())
