"""Real peers for the DNS service: dnsmasq and dig, and servers that misbehave as no real one would on request."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import NamedTuple, cast

from dnslib import EDNS0, QTYPE, RR, A, DNSRecord

from ztun.config.values import join_endpoint
from ztun.gateway.dns import DnsOptions, DnsService
from ztun.names.pool import FakeIpPool
from ztun.rules import Rule, Rules

RULES = (
    Rule("direct", domain_suffix=("direct.example",)),
    Rule("block", domain_suffix=("blocked.example",)),
    Rule("office", domain=("nas",)),
)

RANGE6 = IPv6Network("2001:2::/48")

DNSMASQ_CONF = """
no-resolv
no-hosts
keep-in-foreground
bind-interfaces
listen-address=127.0.0.1
local=/example/
local=/example.net/
local=/10.in-addr.arpa/
local-ttl=60
log-queries
host-record=direct.example,192.0.2.7,2001:db8::7
cname=alias.direct.example,direct.example
host-record=printer.lan,10.0.0.9
host-record=printer,10.0.0.9
host-record=dns.example.net,127.0.0.1
address=/loop.direct.example/198.18.0.99
address=/loop6.direct.example/2001:2::99
mx-host=mail.example,mx.mail.example,10
{big}
dns-rr=direct.example,65,00010000040004c0000263
"""


class Dnsmasq:
    """The real program, listening on 127.0.0.1. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        conf = directory / "dnsmasq.conf"
        big = "\n".join(f"txt-record=big.direct.example,{letter * 250}" for letter in "abcdefgh")
        conf.write_text(DNSMASQ_CONF.replace("{big}", big) + f"port={self.port}\npid-file={directory}/pid\nuser=root\n")
        self.log = directory / "dnsmasq.log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(["dnsmasq", f"--conf-file={conf}", "--log-facility=-"], stderr=log)

    def __enter__(self) -> Dnsmasq:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as sock:
                if sock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.02)
        self.__exit__()
        raise RuntimeError(f"dnsmasq did not start: {self.log.read_text()}")

    def __exit__(self, *_exc: object) -> None:
        self._process.terminate()
        self._process.wait()

    @property
    def url(self) -> str:
        return f"udp://127.0.0.1:{self.port}"

    def queries(self, name: str) -> list[str]:
        """The types for which the name was asked so far."""
        return re.findall(rf"query\[([^]]+)\] {re.escape(name)} ", self.log.read_text(), re.IGNORECASE)


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def plain_sockets(family: int, kind: int) -> socket.socket:
    return socket.socket(family, kind | socket.SOCK_NONBLOCK)


class Learnt(NamedTuple):
    address: str
    ttl: int
    rule: int


class Bench:
    """A service with its pool, and what it learnt."""

    def __init__(
        self,
        servers: Sequence[str],
        rules: Iterable[Rule] = RULES,
        default: str = "office",
        sockets: Callable[[int, int], socket.socket] = plain_sockets,
        pool_size: int = 100,
        range6: IPv6Network | None = RANGE6,
        **options: object,
    ) -> None:
        self.learnt: list[Learnt] = []
        self.pool = FakeIpPool(IPv4Network("198.18.0.0/15"), range6, pool_size, 300)
        self.service = DnsService(
            Rules(rules, default),
            self.pool,
            servers,
            sockets,
            lambda address, ttl, rule: self.learnt.append(Learnt(str(ip_address(address)), ttl, rule)),
            DnsOptions(**options),  # type: ignore[arg-type]
        )
        self.counters = self.service.counters
        self.port = 0

    async def listen(self, *hosts: str) -> None:
        self.port = free_port()
        await self.service.start([f"{host}:{self.port}" for host in hosts or ("127.0.0.1",)])

    async def ask(self, name: str, kind: str = "A", *, over_tcp: bool = True, edns: int | None = None) -> DNSRecord:
        """Ask the service itself, without a socket between."""
        query = DNSRecord.question(name, kind)
        if edns is not None:
            query.add_ar(EDNS0(udp_len=edns))
        packed = await self.service.answer(query.pack(), over_tcp=over_tcp)
        assert packed is not None
        reply = DNSRecord.parse(packed)
        assert reply.header.id == query.header.id
        return reply

    async def dig(self, *arguments: str, server: str = "127.0.0.1") -> str:
        """What dig prints."""
        command = ["dig", f"@{server}", "-p", str(self.port), "+time=5", "+tries=1", *arguments]
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        output, _ = await process.communicate()
        return output.decode()

    async def dig_short(self, *arguments: str) -> list[str]:
        return (await self.dig("+short", *arguments)).split()


def told(reply: DNSRecord) -> list[str]:
    """The answers of a reply, as text."""
    return [str(record.rdata) for record in reply.rr]


def rcode(reply: DNSRecord) -> str:
    return {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}[reply.header.rcode]


def extended_error(reply: DNSRecord) -> int | None:
    codes = [int.from_bytes(option.data) for record in reply.ar for option in record.rdata if option.code == 15]
    return codes[0] if codes else None


Script = Callable[[DNSRecord, bool], Sequence[bytes]]


class ScriptedServer:
    """A server on one address, by UDP and TCP on one port. The script gives the messages to send for a query.

    delay: seconds before it answers. peers: who asked, with "udp" or "tcp".
    """

    def __init__(self, script: Script, delay: float = 0.0, host: str = "127.0.0.1") -> None:
        self.script = script
        self.host = host
        self.delay = delay
        self.queries: list[DNSRecord] = []
        self.peers: list[tuple[str, str]] = []
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> ScriptedServer:
        self._tcp = await asyncio.start_server(self._accepted, self.host, 0)
        self.port = self._tcp.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        self._udp, _ = await loop.create_datagram_endpoint(lambda: _Datagrams(self), local_addr=(self.host, self.port))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self._udp.close()
        self._tcp.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    @property
    def url(self) -> str:
        return f"udp://{join_endpoint(self.host, self.port)}"

    @property
    def tcp_url(self) -> str:
        return f"tcp://{join_endpoint(self.host, self.port)}"

    async def reply(self, message: bytes, over_tcp: bool) -> Sequence[bytes]:
        query = DNSRecord.parse(message)
        self.queries.append(query)
        await asyncio.sleep(self.delay)
        return self.script(query, over_tcp)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        self.peers.append(("tcp", writer.get_extra_info("peername")[0]))
        await self._serve(reader, writer)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                length = int.from_bytes(await reader.readexactly(2))
                for message in await self.reply(await reader.readexactly(length), True):
                    writer.write(len(message).to_bytes(2) + message)
        except (asyncio.IncompleteReadError, OSError):
            writer.close()


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._server.peers.append(("udp", addr[0]))
        self._task = asyncio.get_running_loop().create_task(self._answer(data, addr))

    async def _answer(self, data: bytes, addr: tuple[str, int]) -> None:
        for message in await self._server.reply(data, False):
            self._transport.sendto(message, addr)


def good_answer(query: DNSRecord, address: str = "192.0.2.1", ttl: int = 60) -> bytes:
    reply = query.reply()
    reply.add_answer(RR(query.q.qname, QTYPE.A, ttl=ttl, rdata=A(address)))
    return bytes(reply.pack())
