"""Upstream servers by HTTPS (RFC 8484), HTTP/1.1.

Section 5.2 recommends HTTP/2, which aiohttp does not speak, and a few public servers insist on it (Quad9 since
December 2025): those are to be asked by tls://.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from ztun.gateway.dns.servers import Server
from ztun.gateway.dns.transport import Lookup, UpstreamError
from ztun.names.answer import Answer, make_upstream_query, read_answer
from ztun.names.message import MAX_MESSAGE, Query
from ztun.ports import SocketFactory

_MEDIA_TYPE = "application/dns-message"
_MAX_CONNECTIONS = 4
_IDLE_S = 30.0


class _Resolver(AbstractResolver):
    """Looks up the server's own name by the servers that are given by address, never through the system."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._lookup(host)
        ]

    async def close(self) -> None:
        pass


class HttpsTransport:
    """POSTs queries to the server's URL; its certificate must be good for the host in it."""

    def __init__(self, server: Server, sockets: SocketFactory, lookup: Lookup, tls: ssl.SSLContext | None) -> None:
        self._server = server
        self._sockets = sockets
        self._lookup = lookup
        self._tls = tls
        self._session: aiohttp.ClientSession | None = None

    async def exchange(self, query: Query) -> Answer:
        # RFC 8484 section 4.1: id 0, so that equal queries are equal requests.
        body = make_upstream_query(query, 0, padded=True)
        try:
            message = await self._post(body)
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise UpstreamError(f"{self._server}: {str(error) or type(error).__name__}") from error
        found = read_answer(message, query.question)
        if not isinstance(found, Answer) or found.truncated:
            raise UpstreamError(f"{self._server}: no usable answer")
        return found

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _post(self, body: bytes) -> bytes:
        if self._session is None:
            self._session = self._make_session()
        async with self._session.post(str(self._server), data=body, allow_redirects=False) as response:
            if response.status != 200 or response.content_type != _MEDIA_TYPE:
                raise UpstreamError(f"{self._server}: HTTP status {response.status} ({response.content_type})")
            return await _read_limited(response.content)

    def _make_session(self) -> aiohttp.ClientSession:
        def make_socket(info: tuple[Any, ...]) -> socket.socket:
            return self._sockets(info[0], info[1])

        connector = aiohttp.TCPConnector(
            limit=_MAX_CONNECTIONS,
            keepalive_timeout=_IDLE_S,
            ssl=self._tls if self._tls is not None else True,
            resolver=_Resolver(self._lookup),
            socket_factory=make_socket,
        )
        # No cookies, no proxy of the environment, no name of the program: nothing that tells users apart (section 8).
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": _MEDIA_TYPE, "Content-Type": _MEDIA_TYPE},
            skip_auto_headers=["User-Agent"],
            trust_env=False,
            auto_decompress=False,
        )


async def _read_limited(content: aiohttp.StreamReader) -> bytes:
    message = b""
    while chunk := await content.read(MAX_MESSAGE + 1 - len(message)):
        message += chunk
        if len(message) > MAX_MESSAGE:
            raise aiohttp.ClientPayloadError("the answer is longer than a DNS message can be")
    return message
