"""HTTP proxies at their limits: how much header, how slow, which refusals, and addresses in brackets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from ztun.outbound.http import MAX_HEADER, HttpDialogue
from ztun.ports import Destination, Failure, OutboundError

from . import peers
from .peers import PASSWORD, USER, banner_server, converse, read_exactly
from .scripted import Step, drips, falls_silent, hears_until, proxy, resets, says
from .support import DEADLINE, Sockets, outbound, refused

ASK = hears_until(b"\r\n\r\n")
BANNER = b"220 ready\r\n"


def padded(size: int, line: bytes = b"HTTP/1.1 200 OK") -> bytes:
    """An answer whose header has `size` bytes, in fields of about a kilobyte."""
    fields = b""
    while (missing := size - len(line) - 4 - len(fields)) > 0:
        length = missing if missing < 1100 else 1000
        fields += (b"X-Pad: " + b"x" * length)[: length - 2] + b"\r\n"
    header = line + b"\r\n" + fields + b"\r\n"
    assert len(header) == size
    return header


async def test_a_header_of_64_kib_is_taken_and_not_a_byte_of_what_follows(sockets: Sockets) -> None:
    async with proxy(ASK, says(padded(MAX_HEADER) + BANNER)) as port:
        sock = await outbound(sockets, "http", port).connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


async def test_a_byte_more_is_refused(sockets: Sockets) -> None:
    async with proxy(ASK, says(padded(MAX_HEADER + 1) + BANNER), falls_silent()) as port:
        error = await refused(outbound(sockets, "http", port), "four.example")
    assert error.failure is Failure.PROXY_FAILED
    assert "more than 65536 bytes of header" in str(error)


async def test_interim_answers_count_towards_the_64_kib(sockets: Sockets) -> None:
    interim = padded(1000, b"HTTP/1.1 103 Early Hints") * 65
    async with proxy(ASK, says(interim + padded(MAX_HEADER - len(interim)) + BANNER)) as port:
        sock = await outbound(sockets, "http", port).connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()
    async with proxy(ASK, says(interim + padded(MAX_HEADER - len(interim) + 1)), falls_silent()) as port:
        error = await refused(outbound(sockets, "http", port), "four.example")
    assert error.failure is Failure.PROXY_FAILED


async def test_a_refusal_with_64_kib_of_header_is_still_that_refusal(sockets: Sockets) -> None:
    answer = padded(MAX_HEADER, b"HTTP/1.1 407 Proxy Authentication Required")
    async with proxy(ASK, says(answer)) as port:
        error = await refused(outbound(sockets, "http", port), "four.example")
    assert error.failure is Failure.PROXY_AUTHENTICATION


def refusals() -> Iterator[tuple[int, Failure]]:
    known = {
        401: Failure.PROXY_AUTHENTICATION, 407: Failure.PROXY_AUTHENTICATION,
        403: Failure.PROHIBITED, 451: Failure.PROHIBITED,
        405: Failure.UNSUPPORTED, 501: Failure.UNSUPPORTED,
        502: Failure.HOST_UNREACHABLE, 503: Failure.HOST_UNREACHABLE,
        504: Failure.TIMED_OUT,
    }  # fmt: skip
    for status in (101, *range(300, 600), 600, 999, 0):
        yield status, known.get(status, Failure.PROXY_FAILED)


def test_every_status_that_is_no_success_is_reported_as_what_it_is() -> None:
    for status, failure in refusals():
        dialogue = HttpDialogue(Destination("four.example", 80), None)
        dialogue.start()
        with pytest.raises(OutboundError) as caught:
            dialogue.receive(b"HTTP/1.1 %03d So It Is\r\n\r\n" % status)
        assert (caught.value.failure, str(caught.value)) == (failure, f"it answered HTTP/1.1 {status:03} So It Is")
        assert not dialogue.done


def test_what_it_answered_is_shown_without_control_characters() -> None:
    dialogue = HttpDialogue(Destination("four.example", 80), None)
    dialogue.start()
    with pytest.raises(OutboundError) as caught:
        dialogue.receive(b"HTTP/1.1 502 \x1b[31m\xff" + b"x" * 1000 + b"\r\n\r\n")
    assert len(str(caught.value)) < 300
    assert "\\x1b[31m\\xff" in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(
            [drips(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100, 0.01), falls_silent()], id="drips header fields"
        ),
        pytest.param([drips(b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0.01), falls_silent()], id="drips interim answers"),
        pytest.param([drips(b"HTTP/1.1 407 Proxy", 0.05), falls_silent()], id="drips a refusal"),
        pytest.param([falls_silent()], id="is silent"),
    ],
)
async def test_a_slow_proxy_has_the_dial_time_and_no_more(sockets: Sockets, steps: list[Step]) -> None:
    async with proxy(ASK, *steps) as port:
        began = time.monotonic()
        error = await refused(outbound(sockets, "http", port, deadline=DEADLINE), "four.example")
        took = time.monotonic() - began
    assert error.failure is Failure.TIMED_OUT
    assert f"within {DEADLINE:g} s" in str(error)
    assert DEADLINE <= took < DEADLINE + 1  # each byte that drips gives it no more time


async def test_a_proxy_that_drips_fast_enough_is_waited_for(sockets: Sockets) -> None:
    async with proxy(ASK, drips(padded(300) + BANNER, 0.002)) as port:
        sock = await outbound(sockets, "http", port, deadline=5).connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


async def test_a_proxy_that_resets_midway(sockets: Sockets) -> None:
    async with proxy(ASK, says(b"HTTP/1.1 200 OK\r\nX:"), resets()) as port:
        assert (await refused(outbound(sockets, "http", port), "four.example")).failure is Failure.PROXY_FAILED


async def test_tinyproxy_on_an_ipv6_address_carries_to_an_ipv6_literal(
    sockets: Sockets, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with peers.tinyproxy(tmp_path_factory.mktemp("six"), host="::1") as proxy_port:
        way = outbound(sockets, "http", proxy_port, host="::1")
        async with banner_server("::1") as port:
            await converse(await way.connect(Destination("::1", port)))


async def test_basic_authentication_of_many_connections_at_once(sockets: Sockets, tinyproxy_auth: int) -> None:
    way = outbound(sockets, "http", tinyproxy_auth, username=USER, password=PASSWORD)
    async with banner_server() as port:
        opened = await asyncio.gather(*(way.connect(Destination("four.example", port)) for _ in range(20)))
        await asyncio.gather(*(converse(sock) for sock in opened))
    assert way.failures == {}
