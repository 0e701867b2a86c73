"""The sockets on `dns.listen`: datagrams, and streams with several queries under way at once (RFC 7766)."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from ztun.defaults import DEFAULTS
from ztun.errors import ZtunError
from ztun.gateway.dns.servers import endpoint
from ztun.names.message import frame
from ztun.ports import SocketFactory

Answer = Callable[[bytes, bool], Awaitable[bytes | None]]
Address = tuple[str, int] | tuple[str, int, int, int]

_MAX_DATAGRAM = 4096  # no query is longer
_MAX_PENDING = 1024  # datagrams being answered, for one socket
_READ_BATCH = 32  # datagrams read before the loop gets its turn
_BACKLOG = 128
_MAX_STREAMS = 256
_MAX_PIPELINED = 32
# RFC 7766 section 6.2.3: on the order of seconds, and more than a round trip.
_STREAM_IDLE_S = 10.0
_CONTROL_SPACE = socket.CMSG_SPACE(20)
_IP_PKTINFO = getattr(socket, "IP_PKTINFO", DEFAULTS.pktinfo)  # the socket module of 3.11 has no name for it


def open_sockets(listen: Sequence[str], sockets: SocketFactory) -> list[socket.socket]:
    """A datagram and a stream socket for each address of `dns.listen`. Raises ZtunError; nothing is then left open."""
    opened: list[socket.socket] = []
    try:
        for index, text in enumerate(listen):
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                opened.append(_open(f"dns.listen[{index}]", text, kind, sockets))
    except BaseException:
        for sock in opened:
            sock.close()
        raise
    return opened


def _open(key: str, text: str, kind: int, sockets: SocketFactory) -> socket.socket:
    host, _colon, port = text.rpartition(":")
    host = host.strip("[]")
    family, address = endpoint(host, int(port))
    sock = sockets(family, kind)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections in TIME-WAIT do not matter
        elif ipaddress.ip_address(host).is_unspecified:
            _ask_for_destination(sock)
        sock.bind(address)
        if kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ZtunError(f"{key}: {_explain(error, text, host, int(port))}") from error
    return sock


def _ask_for_destination(sock: socket.socket) -> None:
    """Have the kernel say to which of our addresses a datagram came; the reply leaves from there (RFC 1123 4.1.3.5)."""
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)


def _explain(error: OSError, text: str, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{text} is taken by another program, often dnsmasq or systemd-resolved (`ss -lnp sport = :{port}` shows"
            " which); stop it, or choose another address or port"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is on no interface of this host; choose an address that `ip address` shows"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"not permitted to use port {port}; run as root or with CAP_NET_BIND_SERVICE, or choose a port from 1024"
    return f"cannot listen on {text}: {(error.strerror or str(error)).lower()}"


class DatagramListener:
    """Answers datagrams on a bound socket, which it closes in the end."""

    def __init__(self, sock: socket.socket, answer: Answer, counters: Counter[str]) -> None:
        self._sock = sock
        self._answer = answer
        self._counters = counters
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._readable)

    async def close(self) -> None:
        self._loop.remove_reader(self._sock)
        await _cancel(self._tasks)
        self._sock.close()

    def _readable(self) -> None:
        for _ in range(_READ_BATCH):
            try:
                data, control, _flags, sender = self._sock.recvmsg(_MAX_DATAGRAM + 1, _CONTROL_SPACE)
            except OSError:
                return  # nothing more to read, or an ICMP error about an earlier reply
            if len(self._tasks) >= _MAX_PENDING:
                self._counters["overload_datagrams"] += 1
                continue
            _spawn(self._tasks, self._serve(data, _reply_control(control), sender))

    async def _serve(self, query: bytes, control: list[tuple[int, int, bytes]], sender: Address) -> None:
        reply = await self._answer(query, False)
        if reply is None:
            return
        try:
            self._sock.sendmsg([reply], control, 0, sender)
        except OSError:
            self._counters["replies_not_sent"] += 1


def _reply_control(control: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that makes a reply leave from the address that the datagram came to (ip(7), ipv6(7))."""
    for level, kind, data in control:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            # struct in_pktinfo: interface (0: as routed), our address as source, and the header's destination.
            return [(level, kind, struct.pack("=I4s4s", 0, data[4:8], bytes(4)))]
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return [(level, kind, data)]
    return []


class StreamListener:
    """Answers streams on a bound socket, each query as soon as it is ready."""

    def __init__(self, answer: Answer, counters: Counter[str]) -> None:
        self._answer = answer
        self._counters = counters
        self._streams: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        self._server = await asyncio.start_server(self._accepted, sock=sock, backlog=_BACKLOG)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await _cancel(self._streams)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._streams) >= _MAX_STREAMS:
            self._counters["overload_streams"] += 1
            writer.transport.abort()
            return
        _spawn(self._streams, _Stream(reader, writer, self._answer).serve())


class _Stream:
    """One client's stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._pending: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._replied_at = self._loop.time()

    async def serve(self) -> None:
        pending, writer = self._pending, self._writer
        try:
            while (query := await self._next_query()) is not None:
                _spawn(pending, self._reply(query))
                if len(pending) >= _MAX_PIPELINED:
                    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if pending:
                await asyncio.wait(pending)
            writer.close()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if not writer.is_closing():
                writer.transport.abort()
            await _cancel(pending)

    async def _next_query(self) -> bytes | None:
        """The next query, or None when the client has no more or was silent for too long with nothing under way."""
        while True:
            try:
                async with asyncio.timeout(_STREAM_IDLE_S):
                    length = int.from_bytes(await self._reader.readexactly(2))
                break
            except asyncio.IncompleteReadError:
                return None
            except TimeoutError:
                if not self._pending and self._loop.time() - self._replied_at >= _STREAM_IDLE_S:
                    return None
        async with asyncio.timeout(_STREAM_IDLE_S):
            return await self._reader.readexactly(length)

    async def _reply(self, query: bytes) -> None:
        reply = await self._answer(query, True)
        if reply is None:
            self._writer.transport.abort()  # what cannot be answered is no DNS, and what follows it neither
            return
        self._writer.write(frame(reply))
        try:
            async with asyncio.timeout(_STREAM_IDLE_S):
                await self._writer.drain()
        except (OSError, TimeoutError):
            self._writer.transport.abort()
        self._replied_at = self._loop.time()


def _spawn(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
