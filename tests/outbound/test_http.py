"""HTTP CONNECT, byte by byte (RFC 9110, RFC 9112)."""

from __future__ import annotations

import asyncio
import base64
import socket

import pytest

from ztun.outbound.http import MAX_HEADER
from ztun.ports import Destination, Failure, OutboundError

from .peers import read_exactly
from .scripted import Step, drips, falls_silent, hears, hears_until, proxy, resets, says
from .support import DEADLINE, Sockets, outbound, refused

ASK = hears_until(b"\r\n\r\n")
GRANTED = b"HTTP/1.1 200 Connection established\r\n\r\n"
BANNER = b"220 ready\r\n"


@pytest.mark.parametrize(
    ("host", "authority"),
    [("four.example", b"four.example:80"), ("192.0.2.1", b"192.0.2.1:80"), ("2001:db8::1", b"[2001:db8::1]:80")],
)
async def test_the_request_names_the_destination(sockets: Sockets, host: str, authority: bytes) -> None:
    head = b"CONNECT " + authority + b" HTTP/1.1\r\nHost: " + authority + b"\r\n\r\n"
    async with proxy(hears(head), says(GRANTED + BANNER)) as port:
        sock = await outbound(sockets, "http", port).connect(Destination(host, 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


async def test_credentials_are_sent_in_utf8(sockets: Sockets) -> None:
    credentials = base64.b64encode("änne:geheim ✓".encode())
    async with proxy(
        hears_until(b"\r\nProxy-Authorization: Basic "), hears(credentials + b"\r\n\r\n"), says(GRANTED)
    ) as port:
        way = outbound(sockets, "http", port, username="änne", password="geheim ✓")
        (await way.connect(Destination("four.example", 80))).close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(GRANTED, id="short"),
        pytest.param(b"HTTP/1.0 200\r\n\r\n", id="no reason"),
        pytest.param(b"HTTP/1.1 204 Fine\r\nVia: 1.1 x\r\n\r\n", id="another 2xx"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", id="a length without meaning"),
        pytest.param(b"HTTP/1.1 200 OK\nServer: x\n\n", id="bare line feeds"),
        pytest.param(b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + GRANTED, id="an interim answer before"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X-Padding: " + b"x" * 60000 + b"\r\n\r\n", id="a long header"),
    ],
)
async def test_the_first_byte_after_the_header_is_the_destinations(sockets: Sockets, answer: bytes) -> None:
    async with proxy(ASK, says(answer + BANNER)) as port:
        sock = await outbound(sockets, "http", port).connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


@pytest.mark.parametrize("answer", [GRANTED, b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nVia: x\n\r\n"])
async def test_the_answer_in_single_bytes(sockets: Sockets, answer: bytes) -> None:
    async with proxy(ASK, drips(answer + BANNER)) as port:
        sock = await outbound(sockets, "http", port).connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


@pytest.mark.parametrize(
    ("status", "failure"),
    [
        (101, Failure.PROXY_FAILED),
        (302, Failure.PROXY_FAILED),
        (400, Failure.PROXY_FAILED),
        (401, Failure.PROXY_AUTHENTICATION),
        (403, Failure.PROHIBITED),
        (405, Failure.UNSUPPORTED),
        (407, Failure.PROXY_AUTHENTICATION),
        (451, Failure.PROHIBITED),
        (500, Failure.PROXY_FAILED),
        (501, Failure.UNSUPPORTED),
        (502, Failure.HOST_UNREACHABLE),
        (503, Failure.HOST_UNREACHABLE),
        (504, Failure.TIMED_OUT),
    ],
)
async def test_statuses(sockets: Sockets, status: int, failure: Failure) -> None:
    async with proxy(ASK, says(b"HTTP/1.1 %d Because\r\nServer: x\r\n\r\n<html>" % status)) as port:
        error = await refused(outbound(sockets, "http", port), "four.example")
    assert error.failure is failure
    assert f"it answered HTTP/1.1 {status} Because" in str(error)


@pytest.mark.parametrize(
    ("field", "failure"),
    [
        # As Squid 5.7 sends them
        (b"X-Squid-Error: ERR_CONNECT_FAIL 111", Failure.REFUSED),
        (b"X-Squid-Error: ERR_CONNECT_FAIL 101", Failure.NETWORK_UNREACHABLE),
        (b"X-Squid-Error: ERR_CONNECT_FAIL 110", Failure.TIMED_OUT),
        (b"X-Squid-Error: ERR_DNS_FAIL 0", Failure.NAME_NOT_FOUND),
        (b"X-Squid-Error: ERR_ACCESS_DENIED 0", Failure.PROHIBITED),
        (b"X-Squid-Error: ERR_CACHE_ACCESS_DENIED 0", Failure.PROXY_AUTHENTICATION),
        (b"X-Squid-Error: ERR_SOMETHING_ELSE 0", Failure.HOST_UNREACHABLE),
        # As RFC 9209 has it
        (b"Proxy-Status: proxy.example; error=connection_refused", Failure.REFUSED),
        (b'proxy-status: "a b"; next-hop="x"; error=dns_error; rcode=NXDOMAIN', Failure.NAME_NOT_FOUND),
        (b"Proxy-Status: p; error=destination_ip_unroutable", Failure.NETWORK_UNREACHABLE),
        (b"Proxy-Status: p; error=connection_timeout", Failure.TIMED_OUT),
        (b"Proxy-Status: p; error=something_new", Failure.HOST_UNREACHABLE),
        (b"X-Other: Proxy-Status: p; error=connection_refused", Failure.HOST_UNREACHABLE),
    ],
)
async def test_a_proxy_that_says_why(sockets: Sockets, field: bytes, failure: Failure) -> None:
    async with proxy(ASK, says(b"HTTP/1.1 503 Service Unavailable\r\n" + field + b"\r\n\r\n")) as port:
        assert (await refused(outbound(sockets, "http", port), "four.example")).failure is failure


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([says(b"SSH-2.0-OpenSSH_9.2\r\n")], id="speaks SSH"),
        pytest.param([says(b"\x05\xff")], id="speaks SOCKS5"),
        pytest.param([says(b"HTTP/1.1 two-hundred OK\r\n\r\n")], id="status in words"),
        pytest.param([says(b"HTTP/1.1\r\n\r\n")], id="no status"),
        pytest.param([says(b"HTTP/1.1 \xff\xfe OK\r\n\r\n")], id="status in octets"),
        pytest.param([], id="closes at once"),
        pytest.param([resets()], id="resets"),
        pytest.param([says(GRANTED[:-1])], id="closes within the header"),
        pytest.param([says(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * (MAX_HEADER // 6)), falls_silent()], id="too long"),
        pytest.param([says(b"HTTP/1.1 102 Wait\r\n\r\n" * (MAX_HEADER // 21 + 1)), falls_silent()], id="never final"),
        pytest.param([says(b"HTTP/" + b"1" * (MAX_HEADER + 1)), falls_silent()], id="endless line"),
    ],
)
async def test_what_is_no_answer(sockets: Sockets, steps: list[Step]) -> None:
    async with proxy(ASK, *steps) as port:
        assert (await refused(outbound(sockets, "http", port), "four.example")).failure is Failure.PROXY_FAILED


@pytest.mark.parametrize("steps", [[], [says(b"HTTP/1.1 2")], [drips(GRANTED, 0.1)]], ids=["silent", "half", "drips"])
async def test_the_deadline_bounds_the_whole_dial(sockets: Sockets, steps: list[Step]) -> None:
    async with proxy(ASK, *steps, falls_silent()) as port:
        error = await refused(outbound(sockets, "http", port, deadline=DEADLINE), "four.example")
    assert error.failure is Failure.TIMED_OUT


async def test_a_cancelled_dial_closes_its_socket(sockets: Sockets) -> None:
    async with proxy(ASK, says(GRANTED[:9]), falls_silent()) as port:
        dial = asyncio.ensure_future(outbound(sockets, "http", port).connect(Destination("four.example", 80)))
        await asyncio.sleep(0.05)
        dial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dial
        assert [sock.fileno() for sock in sockets.made] == [-1]


def small(family: int, type: int) -> socket.socket:
    sock = socket.socket(family, type)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return sock


async def test_a_request_that_the_socket_takes_in_pieces() -> None:
    sockets = Sockets(small)
    password = "p" * 300_000

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)

    expected = base64.b64encode(b"u:" + password.encode())
    steps = (waits, hears_until(b"Basic "), hears(expected + b"\r\n\r\n"), says(GRANTED + BANNER))
    async with proxy(*steps) as port:
        sock = await outbound(sockets, "http", port, username="u", password=password).connect(Destination("x.test", 1))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()
    sockets.check()


async def test_a_proxy_that_goes_away_while_the_request_is_sent() -> None:
    sockets = Sockets(small)

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)

    async with proxy(waits, resets()) as port:
        way = outbound(sockets, "http", port, username="u", password="p" * 3_000_000)
        assert (await refused(way, "x.test")).failure is Failure.PROXY_FAILED
    sockets.check()


async def test_datagrams_are_not_for_http(sockets: Sockets) -> None:
    way = outbound(sockets, "http", 9)
    with pytest.raises(OutboundError) as caught:
        await way.open_datagrams(lambda *_: None, lambda _: None)
    assert caught.value.failure is Failure.UNSUPPORTED
    assert way.failures == {Failure.UNSUPPORTED: 1}
