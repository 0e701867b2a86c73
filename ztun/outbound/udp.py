"""One UDP socket on the loop: bounded reads, and the ICMP errors that came back for what it sent."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

_BATCH = 64  # datagrams a wake-up, so that one busy link does not hold up the rest of the loop
_ERRORS = 64  # errors a wake-up
_MAX_DATAGRAM = 65535
_RECEIVE_BUFFER = 1 << 20  # bytes, as far as net.core.rmem_max allows: a burst must outlast one turn of the loop

# Numbers of linux/in.h and linux/in6.h that Python does not name before 3.14.
_RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
_EXTENDED_ERROR = struct.Struct("=I4B2I")  # struct sock_extended_err, linux/errqueue.h
_SO_EE_ORIGIN_LOCAL = 1

Address = tuple[Any, ...]  # (host, port) or (host, port, flow, scope)


class UdpSocket:
    """A non-blocking UDP socket of which this takes ownership.

    on_datagram(payload, address) is called for what arrives, on_error(errno, address) for each ICMP error, with the
    address that the failed datagram was sent to (where the kernel can tell: None on systems without an error queue).
    drops: reason -> datagrams that were not sent, counted up.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_datagram: Callable[[bytes, Address], None],
        on_error: Callable[[int, Address | None], None],
        drops: Counter[str],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._on_datagram = on_datagram
        self._on_error = on_error
        self._has_error_queue = hasattr(socket, "MSG_ERRQUEUE")
        self.closed = False
        self._drops = drops
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        if self._has_error_queue:
            sock.setsockopt(*_RECVERR[sock.family], 1)
        self._loop.add_reader(sock, self._on_readable)

    def send(self, pieces: list[Any], address: Address | None) -> None:
        """Send one datagram given in pieces, or lose it when the socket is full or the datagram is too long.

        address: None on a connected socket. Raises OSError when there is no way to that address.
        """
        try:
            self._send(pieces, address)
        except OSError as error:
            # It may be the news of an earlier datagram to somebody else: then this one was not even tried.
            if not self._collect_errors(error):
                raise
            if not self.closed:
                self._send(pieces, address)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._loop.remove_reader(self._sock)
            self._sock.close()

    def _send(self, pieces: list[Any], address: Address | None) -> None:
        try:
            if address is None:
                self._sock.sendmsg(pieces)
            else:
                self._sock.sendmsg(pieces, (), 0, address)
        except (BlockingIOError, InterruptedError):
            self._drops["socket full"] += 1
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._drops["too long" if error.errno == errno.EMSGSIZE else "socket full"] += 1

    def _on_readable(self) -> None:
        for count in range(_BATCH):
            try:
                payload, address = self._sock.recvfrom(_MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError):
                if count == 0:
                    self._collect_errors(None)
                return
            except OSError as error:
                self._collect_errors(error)
            else:
                self._on_datagram(payload, address)
            if self.closed:
                return

    def _collect_errors(self, pending: OSError | None) -> int:
        """Report the queued ICMP errors; `pending` is the socket's own error. Returns how many there were."""
        if not self._has_error_queue:
            if pending is not None:
                self._on_error(pending.errno or 0, None)
            return 0
        # A loop on libuv stops to poll a socket that showed an error, until it is added anew.
        self._loop.remove_reader(self._sock)
        self._loop.add_reader(self._sock, self._on_readable)
        for count in range(_ERRORS):
            if self.closed:
                return count
            try:
                _, ancillary, _, address = self._sock.recvmsg(0, 512, socket.MSG_ERRQUEUE)
            except OSError:
                return count
            self._report(ancillary, address)
        return _ERRORS

    def _report(self, ancillary: list[tuple[int, int, bytes]], address: Address) -> None:
        for level, kind, data in ancillary:
            if (level, kind) != _RECVERR[self._sock.family] or len(data) < _EXTENDED_ERROR.size:
                continue
            number, origin, *_ = _EXTENDED_ERROR.unpack_from(data)
            # "Fragmentation needed" is no failure: the kernel keeps the path MTU and fragments the next one.
            if origin != _SO_EE_ORIGIN_LOCAL and number != errno.EMSGSIZE:
                self._on_error(number, address)
