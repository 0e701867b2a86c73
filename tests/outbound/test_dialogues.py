"""The dialogues alone, sans-IO: in whatever segments, they take the proxy's bytes and none of the destination's."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztun.outbound.dial import Dialogue
from ztun.outbound.http import HttpDialogue
from ztun.outbound.socks5 import Socks5Dialogue, connect_request
from ztun.ports import Destination, OutboundError

from .support import same_descriptors

CREDENTIALS = ("u", "p")
TO = Destination("four.example", 80)

CUTS = st.lists(st.integers(1, 40), max_size=60)


def socks5(credentials: tuple[str, str] | None = None) -> Socks5Dialogue:
    return Socks5Dialogue(connect_request(TO), credentials)


def play(dialogue: Dialogue, stream: bytes, cuts: list[int]) -> bytes:
    """Feed `stream` as a socket shows it to one who peeks. Returns what is left when the dialogue is done."""
    dialogue.start()
    position, arrived = 0, 0
    for cut in [*cuts, len(stream)]:
        arrived = min(arrived + cut, len(stream))
        while position < arrived and not dialogue.done:
            taken, _ = dialogue.receive(stream[position:arrived])
            assert 0 < taken <= arrived - position
            position += taken
    return stream[position:]


def socks5_address() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.binary(min_size=4, max_size=4).map(lambda address: b"\x01" + address),
        st.binary(min_size=16, max_size=16).map(lambda address: b"\x04" + address),
        st.text("abc.-", max_size=255).map(lambda name: bytes((3, len(name))) + name.encode()),
    )


@given(socks5_address(), st.binary(min_size=2, max_size=2), st.booleans(), st.binary(max_size=40), CUTS)
def test_socks5(address: bytes, port: bytes, auth: bool, banner: bytes, cuts: list[int]) -> None:
    dialogue = socks5(CREDENTIALS if auth else None)
    hello = b"\x05\x02\x01\x00" if auth else b"\x05\x00"
    assert play(dialogue, hello + b"\x05\x00\x00" + address + port + banner, cuts) == banner
    assert dialogue.done
    assert dialogue.bound[1] == int.from_bytes(port, "big")


FIELDS = st.lists(st.text("abcXYZ :;=/\"'", max_size=20), max_size=5)


@given(
    st.sampled_from(["HTTP/1.1 200 OK", "HTTP/1.0 200", "HTTP/1.1 299 x y z"]),
    FIELDS,
    st.sampled_from(["\r\n", "\n"]),
    st.integers(0, 3),
    st.binary(max_size=40),
    CUTS,
)
def test_http(line: str, fields: list[str], end: str, interim: int, banner: bytes, cuts: list[int]) -> None:
    head = end.join([line, *("x" + field for field in fields), "", ""]).encode()
    dialogue = HttpDialogue(TO, None)
    assert play(dialogue, b"HTTP/1.1 103 Early Hints\r\n\r\n" * interim + head + banner, cuts) == banner
    assert dialogue.done


@pytest.mark.parametrize("make", [socks5, lambda: socks5(CREDENTIALS), lambda: HttpDialogue(TO, None)])
@given(
    start=st.sampled_from([b"", b"\x05\x00", b"\x05\x02\x01\x00", b"\x05\x00\x05\x00\x00", b"HTTP/1.1 "]),
    noise=st.binary(),
)
def test_noise_is_refused_or_waited_out(make: type[Dialogue], start: bytes, noise: bytes) -> None:
    """Nothing but OutboundError comes out of a dialogue, whatever goes in."""
    try:
        play(make(), start + noise, [])
    except OutboundError as error:
        assert str(error).startswith(("it ", "its "))  # noqa: PT017 (some noise is a valid beginning)


def test_a_socks5_conversation_step_by_step() -> None:
    dialogue = socks5(CREDENTIALS)
    assert dialogue.start() == b"\x05\x02\x00\x02"
    assert dialogue.receive(b"\x05\x02") == (2, b"\x01\x01u\x01p")
    assert not dialogue.asked
    assert dialogue.receive(b"\x01\x00") == (2, b"\x05\x01\x00\x03\x0cfour.example\x00\x50")
    assert dialogue.asked
    assert not dialogue.done
    assert dialogue.receive(b"\x05\x00\x00\x01\x0a\x00\x00\x01\x00\x50SSH-2.0") == (10, b"")
    assert dialogue.done
    assert dialogue.bound == ("10.0.0.1", 80)


def test_an_http_conversation_step_by_step() -> None:
    dialogue = HttpDialogue(TO, CREDENTIALS)
    assert dialogue.start().split(b"\r\n")[:2] == [b"CONNECT four.example:80 HTTP/1.1", b"Host: four.example:80"]
    assert dialogue.receive(b"HTTP/1.1 200 OK\r\nA: b\r") == (22, b"")
    assert not dialogue.done
    assert dialogue.receive(b"\n\r\nSSH-2.0") == (3, b"")
    assert dialogue.done


def test_descriptors_are_counted() -> None:
    """The check that the other tests rely on does see a leak."""
    left = []
    with pytest.raises(AssertionError), same_descriptors():
        left.append(socket.socket())
    left.pop().close()
