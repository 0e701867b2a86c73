"""Proxies that say exactly what a test tells them to, byte by byte: what no real one can be made to do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

Step = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def hears(expected: bytes) -> Step:
    """The client must say exactly this next."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard = await asyncio.wait_for(reader.readexactly(len(expected)), 5)
        assert heard == expected

    return step


def hears_until(end: bytes) -> Step:
    """The client says something up to `end`, whatever it be."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.wait_for(reader.readuntil(end), 5)

    return step


def says(data: bytes) -> Step:
    """All in one segment."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return step


def drips(data: bytes, pause: float = 0.001) -> Step:
    """In segments of one byte each, `pause` seconds apart."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in data:
            if writer.transport.is_closing():
                return
            writer.write(bytes((byte,)))
            await asyncio.sleep(pause)

    return step


def falls_silent() -> Step:
    """Nothing more until the client goes."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass

    return step


def resets() -> Step:
    """The connection ends with RST."""

    async def step(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return step


@contextlib.asynccontextmanager
async def proxy(*steps: Step, patient: bool = True) -> AsyncIterator[int]:
    """A proxy that plays `steps` with each client, then closes; gives its port.

    patient: a step that fails fails the test.
    """
    wrong: list[BaseException] = []
    plays: set[asyncio.Task[None]] = set()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        plays.add(task)
        try:
            for step in steps:
                if not writer.transport.is_closing():
                    await step(reader, writer)
        except ConnectionError:
            pass  # the client had enough
        except (AssertionError, asyncio.IncompleteReadError, TimeoutError) as error:
            wrong.append(error)
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            plays.discard(task)

    server = await asyncio.start_server(play, "127.0.0.1", 0, limit=1 << 20)
    try:
        yield server.sockets[0].getsockname()[1]
        async with asyncio.timeout(5):
            while plays:
                await asyncio.wait(plays)
    finally:
        server.close()
        await server.wait_closed()
        for task in plays:
            task.cancel()
    assert not (patient and wrong), wrong
