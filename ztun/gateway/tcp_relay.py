"""One TCP flow: the client's connection in the stack on one side, a kernel socket to the outbound on the other."""

from __future__ import annotations

import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from ztun.gateway.engine import Engine
from ztun.outbound.tcp import keep_alive
from ztun.ports import ENDED, READABLE, WRITABLE
from ztun.stack import Closed, Connection

# Below this, bytes are copied: a view would keep a 64 KiB buffer alive for them.
_COPY_BELOW: Final = 8192
_KEEP_FROM: Final = 32768  # for what waits for the upstream: at most half of the memory it takes is not its own
_READS: Final = 8  # of one flow before the others get their turn
_LINGER_RESET: Final = struct.pack("ii", 1, 0)
_MAX_VECTORS: Final = 64
_LINGER: Final = 60.0  # seconds that an upstream has to take the rest when the client is done
_MAY_READ: Final = READABLE | ENDED
_MAY_WRITE: Final = WRITABLE | ENDED
_NOTHING: Final[deque[memoryview]] = deque()  # shared: an empty deque is 600 bytes, and most flows never wait


class TcpRelay:
    """Bytes go both ways without being looked at. Either end's FIN becomes a FIN, either end's reset a reset.

    Upload: what the client sent goes to the socket at once; what the socket does not take waits in `_pending` and is
    missing from the window that the client sees. Download: the socket is read only when the client's window has room.

    The socket is watched for news only (see Poller.watch), so `_readable` remembers that there may be more to read.
    """

    __slots__ = (
        "_client_done", "_conn", "_ended", "_engine", "_fd", "_on_closed", "_pending", "_pending_size", "_readable",
        "_sock", "_upstream_done", "_writes_watched", "how",
    )  # fmt: skip

    def __init__(
        self,
        engine: Engine,
        conn: Connection,
        sock: socket.socket,
        more: bool,
        on_closed: Callable[[TcpRelay], None],
    ) -> None:
        """sock: watched by the engine's poller, which tells this one from now on; more: there may be bytes to read."""
        self._engine = engine
        self._conn = conn
        self._sock = sock
        self._fd = sock.fileno()
        self._on_closed = on_closed
        self._pending = _NOTHING
        self._pending_size = 0
        self._readable = more
        self._ended = more  # the event that told of bytes may have told of the end behind them, and does so once
        self._writes_watched = False
        self._upstream_done = False
        self._client_done = False
        self.how = Closed.ABORTED
        engine.poller.hand_over(self._fd, self.ready)

    @property
    def pending(self) -> int:
        """Bytes from the client that the upstream has not taken."""
        return self._pending_size

    # The client's side: a stack Handler.

    def established(self, now: float) -> None:
        if self._readable:
            self._pump(now)

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
        try:
            self._keep(payload)
        except MemoryError:
            self._out_of_memory(now)
            return 0
        return len(payload)

    def _keep(self, payload: memoryview) -> None:
        if not self._pending:
            self._pending = deque()
        size = len(payload)
        self._pending_size += size
        if size >= _KEEP_FROM:
            self._pending.append(payload)
        elif self._pending and len(last := self._pending[-1]) + size <= _COPY_BELOW:
            self._pending[-1] = memoryview(b"".join((last, payload)))  # an object for each byte would cost 200
        else:
            self._pending.append(memoryview(bytes(payload)))
        if not self._writes_watched:
            self._writes_watched = True
            self._engine.poller.want_write(self._fd)

    def eof(self, now: float) -> None:
        self._client_done = True
        # Where the upstream is done as well, the socket is closed in a moment, which says the same.
        if not self._pending and not self._upstream_done:
            self._shutdown_upstream()

    def writable(self, now: float) -> None:
        if self._readable and not self._upstream_done:
            self._pump(now)

    def closed(self, how: Closed, now: float) -> None:
        self.how = how
        if how is Closed.FINISHED and self._pending:
            self._upstream_done = True
            self._engine.loop.call_later(_LINGER, self._give_up)
            return  # the client is done, the upstream still has to take the rest
        if how is not Closed.FINISHED:
            self._reset_upstream()
        self._release()

    # The upstream's side.

    def ready(self, mask: int) -> None:
        """A poller's handler."""
        now = self._engine.now()
        if mask & ENDED:
            self._ended = True
        if self._pending and mask & _MAY_WRITE:
            self._flush(now)
        if (mask & _MAY_READ or not mask) and not self._upstream_done:
            self._readable = True
            try:
                self._pump(now)
            except MemoryError:
                self._out_of_memory(now)
        self._engine.send()

    def is_idle(self, before: float) -> bool:
        """Nothing went either way since then, and nothing waits."""
        return self._conn.last_data <= before and not self._pending and not self._conn.queued

    def finish(self, now: float) -> None:
        """Say to both ends that no more will come."""
        self._upstream_done = True
        self._readable = False
        self._shutdown_upstream()
        self._conn.shutdown(now)

    def keep_alive(self, interval: int) -> None:
        """Have the kernel probe a silent upstream; interval: seconds."""
        keep_alive(self._sock, interval)

    def _pump(self, now: float) -> None:
        """Read as much as the client can take, and send it."""
        conn, engine = self._conn, self._engine
        for _ in range(_READS):
            room = conn.room()
            if room <= 0:
                return
            buffer = engine.scratch
            try:
                count = self._sock.recv_into(buffer, room)
            except BlockingIOError:
                self._readable = self._ended = False
                return
            except OSError:
                self._upstream_broken(now)
                return
            if not count:
                self._upstream_finished(now)
                return
            more = self._ended or count == room
            last = more and count < room and self._is_at_end()
            if count < _COPY_BELOW:
                conn.send(buffer[:count].tobytes(), now, None, last)
            else:
                engine.scratch = engine.pool.get()
                conn.send(buffer[:count], now, buffer, last)
            if last:
                self._upstream_done = True
            if last or not more:
                self._readable = False  # there is no more, and what comes is news
                return
        if not conn.is_closed:
            engine.poller.again(self.ready)

    def _is_at_end(self) -> bool:
        """The last bytes carry the FIN: a segment less for us, and an ACK less for the client."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except OSError:
            return False

    def _flush(self, now: float) -> None:
        """Send what waits for the upstream, until the socket is full: only then will there be news of room."""
        sent = 0
        try:
            while self._pending:
                count = self._sock.sendmsg([self._pending[i] for i in range(min(len(self._pending), _MAX_VECTORS))])
                self._forget(count)
                sent += count
        except BlockingIOError:
            pass
        except OSError:
            self._upstream_broken(now)
            return
        if not self._pending:
            self._drained()
        if sent and not self._conn.is_closed:
            self._conn.consumed(sent, now)

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
        self._pending = _NOTHING
        if self._client_done:
            self._shutdown_upstream()
        if self._conn.is_closed:
            self._release()

    def _give_up(self) -> None:
        """The upstream did not take what a client that is long gone had sent."""
        if self._pending:
            self._reset_upstream()
            self._release()

    def _shutdown_upstream(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is gone already; the reading side will say so

    def _upstream_finished(self, now: float) -> None:
        self._upstream_done = True
        self._readable = False
        self._conn.shutdown(now)

    def _upstream_broken(self, now: float) -> None:
        """Reset from upstream: the client gets one too."""
        self._pending = _NOTHING
        if self._conn.is_closed:
            self._release()
        else:
            self._conn.abort(now)

    def _out_of_memory(self, now: float) -> None:
        """Bytes that were read are lost: better no stream than one with a gap."""
        self._engine.stack.drop("memory-limit")
        self._engine.shortage.came()
        self._upstream_broken(now)

    def _reset_upstream(self) -> None:
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        except OSError:
            pass

    def _release(self) -> None:
        self._upstream_done = True
        self._readable = False
        self._pending = _NOTHING
        self._engine.poller.closing(self._fd)
        os.close(self._sock.detach())  # as Socket.close() does behind three more calls
        self._on_closed(self)
