"""What proxies answer: fed to the dialogues in pieces, and over a real socket to the negotiation."""

from __future__ import annotations

import asyncio
import socket

from fuzz.source import Source
from ztun import platform
from ztun.outbound.associate import decode_header, encode_header
from ztun.outbound.dial import Dial, Dialogue
from ztun.outbound.http import HttpDialogue
from ztun.outbound.socks5 import Socks5Dialogue, connect_request
from ztun.ports import Destination, OutboundError

_TO = Destination("four.example", 80)
_OPENINGS = (
    b"", b"\x05\x00", b"\x05\x02\x01\x00", b"\x05\x00\x05\x00\x00\x01", b"\x05\x00\x05\x00\x00\x03", b"HTTP/1.1 ",
    b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 103\r\n\r\nHTTP/1.1 502 x\r\nX-Squid-Error: ",
)  # fmt: skip


def _dialogue(source: Source) -> Dialogue:
    credentials = source.pick((None, ("u", "p")))
    if source.below(2):
        return HttpDialogue(_TO, credentials)
    return Socks5Dialogue(connect_request(_TO), credentials)


def run_dialogue(data: bytes) -> None:
    """Sans-IO: the same stream, whole and byte by byte, comes to the same end, and no byte too many is taken."""
    source = Source(data)
    choice = source.bytes(2)
    stream = source.pick(_OPENINGS) + source.rest()
    assert _play(_dialogue(Source(choice)), stream, len(stream) or 1) == _play(_dialogue(Source(choice)), stream, 1)


def _play(dialogue: Dialogue, stream: bytes, step: int) -> tuple[str, int]:
    """(what it came to, how many bytes were the proxy's)."""
    dialogue.start()
    taken, seen = 0, 0
    try:
        while seen < len(stream) and not dialogue.done:
            seen = min(seen + step, len(stream))
            while taken < seen and not dialogue.done:
                count, _ = dialogue.receive(stream[taken:seen])
                assert 0 < count <= seen - taken
                taken += count
    except OutboundError as error:
        assert str(error)  # noqa: PT017
        return error.failure.name, -1
    return ("done" if dialogue.done else "waiting"), taken


def run_negotiation(data: bytes) -> None:
    """Over a socket pair: what the proxy did not say is still to be read when the negotiation is over."""
    source = Source(data)
    choice = source.bytes(2)
    stream = source.pick(_OPENINGS) + source.rest()
    outcome, taken = _play(_dialogue(Source(choice)), stream, len(stream) or 1)
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        far.sendall(stream[:60000])
        far.shutdown(socket.SHUT_WR)
        found = _LOOP.run_until_complete(_negotiate(near, _dialogue(Source(choice))))
        if outcome == "done":
            assert found == "done"
            left = b""
            while chunk := near.recv(65536):
                left += chunk
            assert left == stream[taken:60000]
        else:
            assert found == (outcome if outcome != "waiting" else "PROXY_FAILED")  # the stream ended


_LOOP = platform.make_event_loop()


class _Dialler:
    """As much of an outbound as a dial needs that begins with a connected socket."""

    def __init__(self) -> None:
        self.poller = platform.poller_of(asyncio.get_running_loop())

    def factory(self, family: int, type: int) -> socket.socket:
        raise AssertionError

    def ended(self, dial: Dial) -> None:
        pass

    def describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        assert isinstance(error, OutboundError)
        return error


async def _negotiate(sock: socket.socket, dialogue: Dialogue) -> str:
    over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    copy = sock.dup()  # a dial closes what fails
    dialler = _Dialler()

    def connected(sock: socket.socket, more: bool) -> None:
        dialler.poller.unwatch(sock.fileno())
        sock.close()
        over.set_result("done")

    dial = Dial(dialler, "", 0, dialogue, connected, lambda error: over.set_result(error.failure.name))
    dialler.poller.watch(copy.fileno(), lambda mask: None)
    dial.adopt(copy)
    async with asyncio.timeout(5):
        return await over


def run_datagram(data: bytes) -> None:
    """The header of a relayed datagram: read, or dropped for a named reason; what we write we can read."""
    try:
        host, port, start = decode_header(data)
    except ValueError as error:
        assert str(error) in {"short", "fragment", "address type", "name"}  # noqa: PT017
        return
    assert 0 <= port < 65536
    assert 0 < start <= len(data)
    try:
        header = encode_header(Destination(host, port))
    except OutboundError:
        return  # no name that we would send
    assert decode_header(header + b"xx")[1:] == (port, len(header))
