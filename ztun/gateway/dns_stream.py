"""DNS over TCP (RFC 7766) for clients whose queries were taken on their way to another server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ztun.gateway.engine import Engine
from ztun.stack import Closed, Connection

_MAX_BUFFERED = 4 * 65535  # bytes of queries that wait; who sends more without reading answers is cut off
_MAX_UNREAD = 65536  # bytes of answers that the client has not taken; then its next queries wait
_MAX_PENDING = 16  # queries of one connection under way at once


class DnsStream:
    """A stack Handler: messages with a length of two bytes in front, answered in the order they are ready."""

    __slots__ = ("_answer", "_buffer", "_conn", "_done", "_engine", "_on_closed", "_tasks")

    def __init__(
        self,
        engine: Engine,
        conn: Connection,
        answer: Callable[[bytes], Awaitable[bytes | None]],
        on_closed: Callable[[DnsStream], None],
    ) -> None:
        self._engine = engine
        self._conn = conn
        self._answer = answer
        self._on_closed = on_closed
        self._buffer = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()
        self._done = False

    def established(self, now: float) -> None:
        pass

    def data(self, payload: memoryview, now: float) -> int:
        self._buffer += payload
        if len(self._buffer) > _MAX_BUFFERED:
            self._conn.abort(now)
            return 0
        self._start()
        return 0

    def _start(self) -> None:
        """Start on the queries that are whole; the others wait for answers to be ready, and to be read."""
        while len(self._buffer) >= 2 and len(self._tasks) < _MAX_PENDING and self._conn.queued < _MAX_UNREAD:
            length = int.from_bytes(self._buffer[:2], "big")
            if len(self._buffer) < 2 + length:
                break
            query = bytes(self._buffer[2 : 2 + length])
            del self._buffer[: 2 + length]
            task = self._engine.loop.create_task(self._serve(query))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._conn.is_closed:
            self._start()
            self._finish_when_idle()
            self._engine.send()

    async def _serve(self, query: bytes) -> None:
        reply = await self._answer(query)
        if reply is not None and not self._conn.is_closed:
            self._conn.send(memoryview(len(reply).to_bytes(2, "big") + reply), self._engine.now())
            self._engine.send()

    def _finish_when_idle(self) -> None:
        if self._done and not self._tasks and self._conn.queued < _MAX_UNREAD:
            self._conn.shutdown(self._engine.now())

    def eof(self, now: float) -> None:
        self._done = True
        self._finish_when_idle()

    def writable(self, now: float) -> None:
        self._start()
        self._finish_when_idle()

    def closed(self, how: Closed, now: float) -> None:
        for task in self._tasks:
            task.cancel()
        self._on_closed(self)
