"""DNS over TLS and over HTTPS, through small real servers that hand the queries to dnsmasq."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from certificates import Certificate
from dns_support import Bench, Dnsmasq, plain_sockets, rcode, told
from dnslib import DNSRecord

MakeBench = Callable[..., Bench]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Certificate]:
    return Certificate(tmp_path_factory.mktemp("certificate"), "127.0.0.1", "dns.example.net")


@pytest.fixture(scope="module")
def other_certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Certificate]:
    return Certificate(tmp_path_factory.mktemp("certificate"), "other.example.net")


def from_our_address(family: int, kind: int) -> socket.socket:
    """Stands for the mark: what comes from 127.0.0.9 was made by the factory."""
    sock = plain_sockets(family, kind)
    if kind == socket.SOCK_STREAM:
        sock.bind(("127.0.0.9", 0))
    return sock


class TlsServer:
    """Hands the stream inside TLS on to dnsmasq's TCP. connections: the addresses that it had connections from."""

    def __init__(self, dnsmasq: Dnsmasq) -> None:
        self.port = 0
        self.connections: list[str] = []
        self.lengths: list[int] = []
        self._behind = dnsmasq.port

    @asynccontextmanager
    async def running(self, certificate: Certificate, host: str = "127.0.0.1") -> AsyncIterator[TlsServer]:
        server = await asyncio.start_server(self._serve, host, 0, ssl=certificate.server_context())
        self.port = server.sockets[0].getsockname()[1]
        yield self
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer.get_extra_info("peername")[0])
        behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", self._behind)
        try:
            while True:
                head = await reader.readexactly(2)
                self.lengths.append(int.from_bytes(head))
                behind_writer.write(head + await reader.readexactly(self.lengths[-1]))
                head = await behind_reader.readexactly(2)
                writer.write(head + await behind_reader.readexactly(int.from_bytes(head)))
        except (asyncio.IncompleteReadError, OSError):
            writer.transport.abort()
            behind_writer.close()


class HttpsServer:
    """Answers POSTs to /dns-query with what dnsmasq says. requests: what came, for the tests to look at."""

    def __init__(self, dnsmasq: Dnsmasq) -> None:
        self.port = 0
        self.requests: list[web.Request] = []
        self.queries: list[bytes] = []
        self.connections: set[object] = set()
        self.status, self.content_type = 200, "application/dns-message"
        self._behind = dnsmasq.port

    @asynccontextmanager
    async def running(self, certificate: Certificate, host: str = "127.0.0.1") -> AsyncIterator[HttpsServer]:
        application = web.Application()
        application.router.add_post("/dns-query", self._serve)
        runner = web.AppRunner(application)
        await runner.setup()
        sock = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port = sock.getsockname()[1]
        await web.SockSite(runner, sock, ssl_context=certificate.server_context()).start()
        yield self
        await runner.cleanup()

    async def _serve(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        self.connections.add(request.transport)
        query = await request.read()
        self.queries.append(query)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._behind)
        writer.write(len(query).to_bytes(2) + query)
        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        writer.close()
        await writer.wait_closed()
        return web.Response(body=answer, status=self.status, content_type=self.content_type)


@pytest.fixture
async def tls(dnsmasq: Dnsmasq, certificate: Certificate) -> AsyncIterator[TlsServer]:
    async with TlsServer(dnsmasq).running(certificate) as server:
        yield server


@pytest.fixture
async def https(dnsmasq: Dnsmasq, certificate: Certificate) -> AsyncIterator[HttpsServer]:
    async with HttpsServer(dnsmasq).running(certificate) as server:
        yield server


async def test_tls_server_is_asked_through_one_connection(
    make_bench: MakeBench, tls: TlsServer, certificate: Certificate
) -> None:
    bench = make_bench([f"tls://127.0.0.1:{tls.port}"], tls=certificate.client_context(), sockets=from_our_address)
    assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
    assert told(await bench.ask("direct.example", "AAAA")) == ["2001:db8::7"]
    assert len((await bench.ask("big.direct.example", "TXT")).rr) == 8
    assert tls.connections == ["127.0.0.9"]
    assert [length % 128 for length in tls.lengths] == [0, 0, 0]


async def test_many_questions_at_once_make_one_handshake(
    make_bench: MakeBench, tls: TlsServer, certificate: Certificate
) -> None:
    bench = make_bench([f"tls://127.0.0.1:{tls.port}"], tls=certificate.client_context())
    replies = await asyncio.gather(*(bench.ask(f"n{number}.direct.example") for number in range(20)))
    assert {rcode(reply) for reply in replies} == {"NXDOMAIN"}
    assert len(tls.connections) == 1


async def test_name_of_an_encrypted_server_is_looked_up_by_the_others(
    make_bench: MakeBench, tls: TlsServer, https: HttpsServer, certificate: Certificate, dnsmasq: Dnsmasq
) -> None:
    for url in (f"tls://dns.example.net:{tls.port}", f"https://dns.example.net:{https.port}/dns-query"):
        asked = len(dnsmasq.queries("dns.example.net"))
        bench = make_bench([url, dnsmasq.url], tls=certificate.client_context(), sockets=from_our_address)
        assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
        assert bench.counters["upstream_failures"] == 0
        assert len(dnsmasq.queries("dns.example.net")) == asked + 2
    assert tls.connections == ["127.0.0.9"]
    assert https.requests[0].headers["Host"] == f"dns.example.net:{https.port}"


async def test_https_server_is_asked_as_rfc_8484_has_it(
    make_bench: MakeBench, https: HttpsServer, certificate: Certificate
) -> None:
    url = f"https://127.0.0.1:{https.port}/dns-query"
    bench = make_bench([url], tls=certificate.client_context(), sockets=from_our_address)
    assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
    assert len((await bench.ask("big.direct.example", "TXT")).rr) == 8
    assert len(https.connections) == 1
    (request, _) = https.requests
    assert request.remote == "127.0.0.9"
    assert request.headers["Content-Type"] == request.headers["Accept"] == "application/dns-message"
    assert "User-Agent" not in request.headers
    assert "Cookie" not in request.headers
    assert DNSRecord.parse(https.queries[0]).header.id == 0
    assert len(https.queries[0]) % 128 == 0


@pytest.mark.parametrize(("status", "content_type"), [(503, "application/dns-message"), (200, "text/html")])
async def test_https_answer_that_is_no_dns_hands_over_to_the_next_server(
    make_bench: MakeBench,
    https: HttpsServer,
    certificate: Certificate,
    dnsmasq: Dnsmasq,
    status: int,
    content_type: str,
) -> None:
    https.status, https.content_type = status, content_type
    url = f"https://127.0.0.1:{https.port}/dns-query"
    bench = make_bench([url, dnsmasq.url], tls=certificate.client_context())
    assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
    assert bench.counters["upstream_failures"] == 1


@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_server_without_the_right_certificate_is_not_asked(
    make_bench: MakeBench, dnsmasq: Dnsmasq, certificate: Certificate, other_certificate: Certificate, scheme: str
) -> None:
    server: TlsServer | HttpsServer = TlsServer(dnsmasq) if scheme == "tls" else HttpsServer(dnsmasq)

    async def status_with(trust: ssl.SSLContext | None) -> str:
        bench = make_bench([f"{scheme}://127.0.0.1:{server.port}/dns-query"], tls=trust, deadline=1.0)
        return rcode(await bench.ask("direct.example"))

    async with server.running(certificate):
        assert await status_with(None) == "SERVFAIL"  # nobody we know signed it
        assert await status_with(certificate.client_context()) == "NOERROR"
    async with server.running(other_certificate):
        assert await status_with(other_certificate.client_context()) == "SERVFAIL"  # it is for another name


@pytest.mark.parametrize("scheme", ["tls", "https"])
async def test_server_that_does_not_speak_tls_hands_over(make_bench: MakeBench, dnsmasq: Dnsmasq, scheme: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n")
        await reader.read(100)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        bench = make_bench([f"{scheme}://127.0.0.1:{port}", dnsmasq.url])
        assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
        assert bench.counters["upstream_failures"] == 1
