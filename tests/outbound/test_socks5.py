"""SOCKS5, byte by byte (RFC 1928, RFC 1929)."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable

import pytest

from ztun.ports import Destination, Failure

from .peers import read_exactly
from .scripted import Step, drips, falls_silent, hears, proxy, resets, says
from .support import DEADLINE, Sockets, outbound, refused

NO_AUTH = (hears(b"\x05\x01\x00"), says(b"\x05\x00"))
ASK = hears(b"\x05\x01\x00\x03\x0cfour.example\x00\x50")
GRANTED = b"\x05\x00\x00\x01\x7f\x00\x00\x01\x04\x38"
BANNER = b"220 ready\r\n"


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("four.example", b"\x03\x0cfour.example"),
        ("192.0.2.1", b"\x01" + ipaddress.ip_address("192.0.2.1").packed),
        ("2001:db8::1", b"\x04" + ipaddress.ip_address("2001:db8::1").packed),
        (".".join(["x" * 63] * 3 + ["y" * 61]), b"\x03\xfd" + b".".join([b"x" * 63] * 3 + [b"y" * 61])),
        ("_dmarc.four.example", b"\x03\x13_dmarc.four.example"),
        ("bücher.example", b"\x03\x15xn--bcher-kva.example"),
    ],
)
async def test_the_destination_is_handed_over_as_it_is(sockets: Sockets, host: str, address: bytes) -> None:
    async with proxy(*NO_AUTH, hears(b"\x05\x01\x00" + address + b"\x00\x50"), says(GRANTED + BANNER)) as port:
        sock = await outbound(sockets, "socks5", port).connect(Destination(host, 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


async def test_username_and_password_are_octets(sockets: Sockets) -> None:
    login = hears(b"\x01\x06\xc3\xa4nne!" + b"\x08pass \xe2\x9c\x93")
    async with proxy(
        hears(b"\x05\x02\x00\x02"), says(b"\x05\x02"), login, says(b"\x01\x00"), ASK, says(GRANTED)
    ) as port:
        way = outbound(sockets, "socks5", port, username="änne!", password="pass ✓")
        (await way.connect(Destination("four.example", 80))).close()


async def test_a_proxy_may_do_without_the_credentials_that_it_was_offered(sockets: Sockets) -> None:
    async with proxy(hears(b"\x05\x02\x00\x02"), says(b"\x05\x00"), ASK, says(GRANTED)) as port:
        way = outbound(sockets, "socks5", port, username="u", password="p")
        (await way.connect(Destination("four.example", 80))).close()


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(GRANTED, id="ipv4"),
        pytest.param(b"\x05\x00\x00\x04" + bytes(16) + b"\x04\x38", id="ipv6"),
        pytest.param(b"\x05\x00\x00\x03\x05proxy\x04\x38", id="name"),
        pytest.param(b"\x05\x00\x00\x03\xff" + b"n" * 255 + b"\x04\x38", id="long name"),
        pytest.param(b"\x05\x00\x00\x03\x00\x04\x38", id="empty name"),
    ],
)
@pytest.mark.parametrize("speaks", [says, drips])
async def test_the_first_byte_after_the_reply_is_the_destinations(
    sockets: Sockets, speaks: Callable[[bytes], Step], reply: bytes
) -> None:
    async with proxy(*NO_AUTH, ASK, speaks(reply + BANNER)) as port:
        sock = await outbound(sockets, "socks5", port).connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


async def test_every_answer_in_single_bytes(sockets: Sockets) -> None:
    steps = (hears(b"\x05\x02\x00\x02"), drips(b"\x05\x02"), hears(b"\x01\x01u\x01p"), drips(b"\x01\x00"))
    async with proxy(*steps, ASK, drips(GRANTED + BANNER)) as port:
        way = outbound(sockets, "socks5", port, username="u", password="p")
        sock = await way.connect(Destination("four.example", 80))
        assert await read_exactly(sock, 100) == BANNER
        sock.close()


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (1, Failure.PROXY_FAILED),
        (2, Failure.PROHIBITED),
        (3, Failure.NETWORK_UNREACHABLE),
        (4, Failure.HOST_UNREACHABLE),
        (5, Failure.REFUSED),
        (6, Failure.TIMED_OUT),
        (7, Failure.UNSUPPORTED),
        (8, Failure.UNSUPPORTED),
        (9, Failure.PROXY_FAILED),
        (0x5B, Failure.PROXY_FAILED),
    ],
)
@pytest.mark.parametrize("rest", [b"\x00\x01\x00\x00\x00\x00\x00\x00", b""], ids=["whole", "cut off"])
async def test_reply_codes(sockets: Sockets, code: int, failure: Failure, rest: bytes) -> None:
    async with proxy(*NO_AUTH, ASK, says(bytes((5, code)) + rest)) as port:
        way = outbound(sockets, "socks5", port)
        error = await refused(way, "four.example")
    assert error.failure is failure
    assert str(error).startswith(f"outbound it: proxy 127.0.0.1:{port}: ")
    assert way.failures == {failure: 1}


@pytest.mark.parametrize(
    ("steps", "failure"),
    [
        pytest.param([says(b"HTTP/1.1 400 Bad Request\r\n\r\n")], Failure.PROXY_FAILED, id="speaks HTTP"),
        pytest.param([says(b"\x04\x00")], Failure.PROXY_FAILED, id="speaks SOCKS4"),
        pytest.param([says(b"\x05\xff")], Failure.PROXY_AUTHENTICATION, id="no method will do"),
        pytest.param([says(b"\x05\x02")], Failure.PROXY_AUTHENTICATION, id="wants what was not offered"),
        pytest.param([says(b"\x05\x01")], Failure.PROXY_AUTHENTICATION, id="wants GSSAPI"),
        pytest.param([says(b"\x05\x77")], Failure.PROXY_FAILED, id="wants an unknown method"),
        pytest.param(
            [says(b"\x05\x00"), ASK, says(b"\x04\x00")], Failure.PROXY_FAILED, id="other version in the reply"
        ),
        pytest.param([says(b"\x05\x00"), ASK, says(b"\x05\x00\x00\x02" + bytes(9))], Failure.PROXY_FAILED, id="type 2"),
        pytest.param(
            [says(b"\x05\x00"), ASK, says(b"\x05\x00\x07\x01" + bytes(6))], Failure.PROXY_FAILED, id="RSV = 7"
        ),
        pytest.param(
            [says(b"\x05\x00"), ASK, says(b"\x05\x00\x00\x03\x02\xff\xfe\x00\x50")], Failure.PROXY_FAILED, id="no name"
        ),
        pytest.param([], Failure.PROXY_FAILED, id="closes at once"),
        pytest.param([resets()], Failure.PROXY_FAILED, id="resets at once"),
        pytest.param([says(b"\x05")], Failure.PROXY_FAILED, id="closes within the method"),
        pytest.param([says(b"\x05\x00")], Failure.PROXY_FAILED, id="closes before the reply"),
        pytest.param([says(b"\x05\x00"), ASK, says(GRANTED[:7])], Failure.PROXY_FAILED, id="closes within the reply"),
        pytest.param([says(b"\x05\x00"), ASK, resets()], Failure.PROXY_FAILED, id="resets instead of a reply"),
    ],
)
async def test_what_is_no_answer(sockets: Sockets, steps: list[Step], failure: Failure) -> None:
    async with proxy(hears(b"\x05\x01\x00"), *steps) as port:
        assert (await refused(outbound(sockets, "socks5", port), "four.example")).failure is failure


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"\x01\x01", Failure.PROXY_AUTHENTICATION),
        (b"\x01\xff", Failure.PROXY_AUTHENTICATION),
        (b"\x05\x00", Failure.PROXY_FAILED),
        (b"\x01", Failure.PROXY_FAILED),
    ],
)
async def test_the_login_fails(sockets: Sockets, answer: bytes, failure: Failure) -> None:
    steps = (hears(b"\x05\x02\x00\x02"), says(b"\x05\x02"), hears(b"\x01\x01u\x01p"), says(answer))
    async with proxy(*steps) as port:
        way = outbound(sockets, "socks5", port, username="u", password="p")
        assert (await refused(way, "four.example")).failure is failure


@pytest.mark.parametrize(
    ("steps", "failure", "said"),
    [
        pytest.param([], Failure.PROXY_FAILED, "did not answer the greeting", id="says nothing"),
        pytest.param([says(b"\x05")], Failure.PROXY_FAILED, "did not answer the greeting", id="half a method"),
        pytest.param([says(b"\x05\x00")], Failure.TIMED_OUT, "did not reach the destination", id="no reply"),
        pytest.param([says(b"\x05\x00"), ASK, drips(GRANTED, 0.1)], Failure.TIMED_OUT, "within 0.4 s", id="drips"),
    ],
)
async def test_the_deadline_bounds_the_whole_dial(
    sockets: Sockets, steps: list[Step], failure: Failure, said: str
) -> None:
    async with proxy(hears(b"\x05\x01\x00"), *steps, falls_silent()) as port:
        way = outbound(sockets, "socks5", port, deadline=DEADLINE)
        started = asyncio.get_running_loop().time()
        error = await refused(way, "four.example")
        assert DEADLINE <= asyncio.get_running_loop().time() - started + 0.01 < DEADLINE + 0.5
    assert error.failure is failure
    assert said in str(error)


@pytest.mark.parametrize("steps", [[], [says(b"\x05\x00")], [says(b"\x05\x00"), ASK, says(GRANTED[:6])]])
async def test_a_cancelled_dial_closes_its_socket(sockets: Sockets, steps: list[Step]) -> None:
    async with proxy(hears(b"\x05\x01\x00"), *steps, falls_silent()) as port:
        dial = asyncio.ensure_future(outbound(sockets, "socks5", port).connect(Destination("four.example", 80)))
        await asyncio.sleep(0.05)
        dial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dial
        assert [sock.fileno() for sock in sockets.made] == [-1]


@pytest.mark.parametrize(
    "host", ["", "a..b", "x" * 64 + ".example", "x." * 127 + "xy", "a b.example", "a\r\nb.example"]
)
@pytest.mark.parametrize("type", ["socks5", "http"])
async def test_what_is_no_name_is_not_asked_of_a_proxy(sockets: Sockets, type: str, host: str) -> None:
    error = await refused(outbound(sockets, type, 9), host)
    assert error.failure is Failure.NAME_NOT_FOUND
    assert not sockets.made
