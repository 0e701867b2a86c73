"""Upstream servers by TCP and by TLS (RFC 7766, RFC 7858): one connection, several queries under way at once."""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections import Counter

from ztun.gateway.dns.servers import Server, endpoint
from ztun.gateway.dns.transport import Lookup, UpstreamError
from ztun.names.answer import Answer, make_upstream_query, read_answer
from ztun.names.message import Query, frame
from ztun.ports import SocketFactory

# RFC 7766 section 6.2.3 wants a client to close early; servers keep an idle connection for about ten seconds.
_IDLE_S = 8.0


class _Connection:
    """A stream to the server and the queries that wait on it, by id."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._waiting: dict[int, tuple[bytes, asyncio.Future[Answer]]] = {}
        self._idle: asyncio.TimerHandle | None = None
        self.is_open = True
        self.answered = 0
        self._task = asyncio.get_running_loop().create_task(self._read())

    async def exchange(self, query: Query, padded: bool) -> Answer:
        loop = asyncio.get_running_loop()
        identifier = self._free_id()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting[identifier] = (query.question, future)
        self._stop_idling()
        answered = self.answered
        try:
            self._writer.write(frame(make_upstream_query(query, identifier, padded=padded)))
            return await future
        except asyncio.CancelledError:
            if self.answered == answered:
                self.abort()  # nothing came all the while: the way may be dead, and TCP takes minutes to notice
            raise
        finally:
            del self._waiting[identifier]
            if not self._waiting and self.is_open:
                self._idle = loop.call_later(_IDLE_S, self.abort)

    def _free_id(self) -> int:
        while (identifier := secrets.randbelow(1 << 16)) in self._waiting:
            pass
        return identifier

    async def _read(self) -> None:
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(2))
                self._received(await self._reader.readexactly(length))
        except (OSError, EOFError) as error:
            reason = "closed the connection" if isinstance(error, EOFError) else str(error)
            self._fail(UpstreamError(f"{self._server}: {reason}"))
        finally:
            self.abort()

    def _received(self, message: bytes) -> None:
        question, future = self._waiting.get(int.from_bytes(message[:2]), (b"", None))
        if future is None or future.done():
            return  # of a query that was given up
        found = read_answer(message, question)
        if isinstance(found, Answer) and not found.truncated:
            self.answered += 1
            future.set_result(found)
        else:
            reason = "truncated" if isinstance(found, Answer) else found.reason
            future.set_exception(UpstreamError(f"{self._server}: no usable answer ({reason})"))

    def _fail(self, error: UpstreamError) -> None:
        self.is_open = False
        for _question, future in self._waiting.values():
            if not future.done():
                future.set_exception(error)

    def _stop_idling(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def abort(self) -> None:
        self._stop_idling()
        self._fail(UpstreamError(f"{self._server}: the connection was closed"))
        self._writer.transport.abort()
        self._task.cancel()


class StreamTransport:
    """TCP, and TLS when `tls` is given: the server's certificate must then be good for the host of its URL."""

    def __init__(
        self,
        server: Server,
        sockets: SocketFactory,
        lookup: Lookup,
        counters: Counter[str],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._server = server
        self._sockets = sockets
        self._lookup = lookup
        self._counters = counters
        self._tls = tls
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()

    async def exchange(self, query: Query) -> Answer:
        connection = await self._connected()
        try:
            return await connection.exchange(query, padded=self._tls is not None)
        except UpstreamError:
            if connection.is_open or not connection.answered:
                raise
        # A server may close an idle connection just as we use it (RFC 7766 section 6.2.4): once more, on a fresh one.
        connection = await self._connected()
        return await connection.exchange(query, padded=self._tls is not None)

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.abort()

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._connection is None or not self._connection.is_open:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> _Connection:
        failure: Exception = UpstreamError(f"{self._server}: no address found")
        for address in [self._server.host] if self._server.is_address else await self._lookup(self._server.host):
            try:
                return await self._connect_to(address)
            except (OSError, ssl.CertificateError) as error:
                failure = UpstreamError(f"{self._server}: {error}")
        raise failure

    async def _connect_to(self, host: str) -> _Connection:
        family, address = endpoint(host, self._server.port)
        sock = self._sockets(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, address)
            name = self._server.host if self._tls is not None else None
            reader, writer = await asyncio.open_connection(sock=sock, ssl=self._tls, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        self._counters["upstream_connections"] += 1
        return _Connection(self._server, reader, writer)
