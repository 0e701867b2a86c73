"""One TCP flow: the client's connection in the stack on one side, a kernel socket to the outbound on the other."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable

from ztun.gateway.engine import Engine
from ztun.stack import Closed, Connection

# Below this, bytes are copied: a view would keep a 64 KiB buffer alive for them.
_COPY_BELOW = 8192
_READS = 8  # of one flow before the others get their turn
_LINGER_RESET = struct.pack("ii", 1, 0)
_MAX_VECTORS = 64
_NOTHING: deque[memoryview] = deque()  # shared: an empty deque is 600 bytes, and most flows never wait


class TcpRelay:
    """Bytes go both ways without being looked at. Either end's FIN becomes a FIN, either end's reset a reset.

    Upload: what the client sent goes to the socket at once; what the socket does not take waits in `_pending` and is
    missing from the window that the client sees. Download: the socket is read only when the client's window has room.
    """

    __slots__ = (
        "_client_done", "_conn", "_engine", "_fd", "_on_closed", "_pending", "_pending_size", "_reading", "_sock",
        "_upstream_done", "_writing", "how",
    )  # fmt: skip

    def __init__(
        self, engine: Engine, conn: Connection, sock: socket.socket, on_closed: Callable[[TcpRelay], None]
    ) -> None:
        self._engine = engine
        self._conn = conn
        self._sock = sock
        self._fd = sock.fileno()  # asyncio formats a socket object for every one it does not know yet
        self._on_closed = on_closed
        self._pending = _NOTHING
        self._pending_size = 0
        self._reading = False
        self._writing = False
        self._upstream_done = False
        self._client_done = False
        self.how = Closed.ABORTED

    @property
    def conn(self) -> Connection:
        return self._conn

    # The client's side: a stack Handler.

    def established(self, now: float) -> None:
        self._start_reading()

    def data(self, payload: memoryview, now: float) -> int:
        sent = 0
        if not self._pending:
            try:
                sent = self._sock.send(payload)
            except BlockingIOError:
                pass
            except OSError:
                self._upstream_broken(now)
                return 0
            if sent == len(payload):
                return 0
            payload = payload[sent:]
        self._keep(payload)
        return len(payload)

    def _keep(self, payload: memoryview) -> None:
        size = len(payload)
        if not self._pending:
            self._pending = deque()
        self._pending.append(payload if size >= _COPY_BELOW else memoryview(bytes(payload)))
        self._pending_size += size
        if not self._writing:
            self._writing = True
            self._engine.loop.add_writer(self._fd, self._writable)

    def eof(self, now: float) -> None:
        self._client_done = True
        if not self._pending:
            self._shutdown_upstream()

    def writable(self, now: float) -> None:
        if not self._reading and not self._upstream_done:
            self._pump(now)

    def closed(self, how: Closed, now: float) -> None:
        self.how = how
        self._stop_reading()
        if how is Closed.FINISHED and self._pending:
            return  # the client is done, the upstream still has to take the rest
        if how is not Closed.FINISHED:
            self._reset_upstream()
        self._release()

    # The upstream's side.

    def _readable(self) -> None:
        self._pump(self._engine.loop.time())
        self._engine.send()

    def _pump(self, now: float) -> None:
        """Read as much as the client can take, and send it."""
        conn, pool = self._conn, self._engine.pool
        for _ in range(_READS):
            room = conn.room()
            if room <= 0:
                self._stop_reading()
                return
            buffer = pool.get()
            try:
                count = self._sock.recv_into(buffer, room)
            except BlockingIOError:
                pool.release(buffer)
                break
            except OSError:
                pool.release(buffer)
                self._upstream_broken(now)
                return
            if not count:
                pool.release(buffer)
                self._upstream_finished(now)
                return
            if count < _COPY_BELOW:
                conn.send(memoryview(bytes(buffer[:count])), now)
                pool.release(buffer)
            else:
                conn.send(buffer[:count], now, buffer)
            if count < room:
                break
        if not conn.is_closed:
            self._start_reading()

    def _start_reading(self) -> None:
        if not self._reading and not self._upstream_done:
            self._reading = True
            self._engine.loop.add_reader(self._fd, self._readable)

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._engine.loop.remove_reader(self._fd)

    def _writable(self) -> None:
        now = self._engine.loop.time()
        try:
            sent = self._sock.sendmsg([self._pending[i] for i in range(min(len(self._pending), _MAX_VECTORS))])
        except BlockingIOError:
            return
        except OSError:
            self._upstream_broken(now)
            self._engine.send()
            return
        self._forget(sent)
        if not self._pending:
            self._drained()
        if not self._conn.is_closed:
            self._conn.consumed(sent, now)
            self._engine.send()

    def _forget(self, sent: int) -> None:
        self._pending_size -= sent
        while sent:
            first = self._pending[0]
            if sent < len(first):
                self._pending[0] = first[sent:]
                return
            sent -= len(first)
            self._pending.popleft()

    def _drained(self) -> None:
        self._stop_writing()
        if self._client_done:
            self._shutdown_upstream()
        if self._conn.is_closed:
            self._release()

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._engine.loop.remove_writer(self._fd)

    def _shutdown_upstream(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is gone already; the reading side will say so

    def _upstream_finished(self, now: float) -> None:
        self._upstream_done = True
        self._stop_reading()
        self._conn.shutdown(now)

    def _upstream_broken(self, now: float) -> None:
        """Reset from upstream: the client gets one too."""
        self._pending = _NOTHING
        if self._conn.is_closed:
            self._release()
        else:
            self._conn.abort(now)

    def _reset_upstream(self) -> None:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        except OSError:
            pass

    def _release(self) -> None:
        self._upstream_done = True
        self._stop_reading()
        self._stop_writing()
        self._pending = _NOTHING
        self._sock.close()
        self._on_closed(self)
