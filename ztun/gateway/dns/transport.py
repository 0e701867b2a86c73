"""How one upstream server is asked: the seam, plain UDP, and what they share."""

from __future__ import annotations

import asyncio
import errno
import secrets
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Protocol

from ztun.gateway.dns.servers import Server, endpoint
from ztun.names.answer import Answer, Unusable, make_upstream_query, read_answer
from ztun.names.message import Query, Rcode
from ztun.ports import SocketFactory

# More than we ask for by EDNS: some servers do not heed it.
_DATAGRAM = 4096
# So many datagrams that are not the answer, for one query, are somebody's guesses (RFC 5452 section 9.2).
_MAX_GUESSES = 8

Lookup = Callable[[str], Awaitable[list[str]]]


class UpstreamError(Exception):
    """A server gave no usable answer; the text says why in one line."""


class Transport(Protocol):
    """One server. `exchange` waits for as long as it is let: the deadline is the caller's."""

    async def exchange(self, query: Query) -> Answer:
        """Ask what `query` asks. Raises UpstreamError."""
        ...

    async def close(self) -> None: ...


class UdpTransport:
    """Plain DNS. Every query goes from a socket of its own, so from a fresh port, with a random id (RFC 5452).

    Only datagrams of the server's address and port reach a connected socket. tcp: the same server by TCP, for answers
    that do not fit. randomize_case: also vary upper and lower case of the name and want them back (0x20).
    """

    def __init__(
        self,
        server: Server,
        sockets: SocketFactory,
        tcp: Transport,
        counters: Counter[str],
        *,
        randomize_case: bool = False,
    ) -> None:
        self._server = server
        self._sockets = sockets
        self._tcp = tcp
        self._counters = counters
        self._randomize_case = randomize_case

    async def exchange(self, query: Query) -> Answer:
        answer = await self._ask(query, edns=True)
        if answer is not None and answer.rcode in (Rcode.FORMERR, Rcode.NOTIMP):
            answer = await self._ask(query, edns=False)  # RFC 6891 section 7: a server of before 1999
        if answer is None or answer.truncated:
            self._counters["upstream_tcp_fallback"] += 1
            return await self._tcp.exchange(query)
        return answer

    async def close(self) -> None:
        await self._tcp.close()

    async def _ask(self, query: Query, *, edns: bool) -> Answer | None:
        """One datagram out, one in. None: too many guesses came, this is no way to ask."""
        question = random_case(query.question) if self._randomize_case else query.question
        identifier = secrets.randbelow(1 << 16)
        family, address = endpoint(self._server.host, self._server.port)
        try:
            with self._sockets(family, socket.SOCK_DGRAM) as sock:
                sock.connect(address)
                sock.send(make_upstream_query(query, identifier, question, edns=edns))
                return await self._receive(sock, identifier, question)
        except OSError as error:
            raise UpstreamError(f"{self._server}: {_words(error)}") from error

    async def _receive(self, sock: socket.socket, identifier: int, question: bytes) -> Answer | None:
        loop = asyncio.get_running_loop()
        for _ in range(_MAX_GUESSES):
            datagram = await loop.sock_recv(sock, _DATAGRAM)
            found = read_answer(datagram, question, exact_case=self._randomize_case)
            is_ours = int.from_bytes(datagram[:2]) == identifier
            if is_ours and isinstance(found, Answer):
                return found
            if not is_ours:
                self._counters["upstream_wrong_id"] += 1
            elif isinstance(found, Unusable):
                self._counters[f"upstream_{found.reason}"] += 1
                if found.reason == "wrong_case":
                    break  # a server that does not keep the spelling, or somebody who could not see it
        return None


def random_case(question: bytes) -> bytes:
    """The question with every letter of its name in upper or lower case by chance (draft-vixie-dnsext-dns0x20)."""
    bits = secrets.randbits(len(question))
    spelled = bytearray(question)
    for place in range(len(question) - 4):
        if chr(spelled[place]).isalpha() and spelled[place] < 0x80 and bits >> place & 1:
            spelled[place] ^= 0x20
    return bytes(spelled)


def _words(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "nothing listens there"
    return (error.strerror or str(error)).lower()
