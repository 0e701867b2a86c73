"""One UDP socket on the loop: bounded reads, runs sent with one call, and the ICMP errors that came back."""

from __future__ import annotations

import errno
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ztun.outbound.batch import BatchReader, PlainReader, Reader, Run, can_batch
from ztun.ports import Buffer, Poller

_ERRORS = 64  # errors a wake-up
_MAX_SEGMENTS = 64  # UDP_MAX_SEGMENTS of linux/udp.h before 6.9
_MAX_BYTES = 65507  # of one call: it is one IPv4 packet up to the device
_BUFFER = 1 << 20  # bytes, as far as net.core.rmem_max and wmem_max allow: a burst must outlast one turn of the loop
_UDP_SEGMENT = 103  # linux/udp.h, since 4.18
# What a socket answers that cannot cut (no checksum offload, IPsec, an old kernel), or that nobody lets.
_CANNOT_CUT = (errno.EIO, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.EPERM)

# Numbers of linux/in.h and linux/in6.h that Python does not name before 3.14.
_RECVERR = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
_EXTENDED_ERROR = struct.Struct("=I4B2I")  # struct sock_extended_err, linux/errqueue.h
_SO_EE_ORIGIN_LOCAL = 1
_MSG_ERRQUEUE = getattr(socket, "MSG_ERRQUEUE", 0)  # Linux alone has it

Address = tuple[Any, ...]  # (host, port) or (host, port, flow, scope)


class UdpSocket:
    """A non-blocking UDP socket of which this takes ownership.

    on_run(run) is called for what arrives, on_error(errno, address) for each ICMP error, with the address that the
    failed datagram was sent to (where the kernel can tell: None on systems without an error queue).
    drops: reason -> datagrams that were not sent, counted up; connected: whether the socket is; head: how many first
    bytes of each datagram are a header.

    cuts: the largest datagrams, in bytes, of which the kernel cuts several out of one call; 0 when it cuts none.
    """

    def __init__(
        self,
        poller: Poller,
        sock: socket.socket,
        on_run: Callable[[Run], None],
        on_error: Callable[[int, Address | None], None],
        drops: Counter[str],
        *,
        connected: bool = False,
        head: int = 0,
    ) -> None:
        self._poller = poller
        self._sock = sock
        self._on_run = on_run
        self._on_error = on_error
        self._has_error_queue = bool(_MSG_ERRQUEUE)
        self.closed = False
        self._drops = drops
        self.cuts = _MAX_BYTES if self._has_error_queue else 0  # as much a thing of Linux as UDP_SEGMENT
        self.reader: Reader = (BatchReader if can_batch() else PlainReader)(sock, connected=connected, head=head)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        if self._has_error_queue:
            sock.setsockopt(*_RECVERR[sock.family], 1)
        poller.watch_level(sock.fileno(), self._on_readable)

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

    def send_run(self, header: bytes, payloads: Sequence[Buffer], address: Address | None) -> None:
        """Send datagrams of one size, of which the last may be shorter, each behind `header`; otherwise as `send`."""
        size = len(header) + len(payloads[0])
        step = min(_MAX_SEGMENTS, _MAX_BYTES // size) if 0 < size <= self.cuts else 1
        for at in range(0, len(payloads), step):
            if self.closed:
                return
            some = payloads[at : at + step]
            if len(some) == 1 or not self._send_cut(header, some, size, address):
                self._send_singly(header, some, address)

    def _send_singly(self, header: bytes, payloads: Sequence[Buffer], address: Address | None) -> None:
        for payload in payloads:
            if self.closed:  # by who was told of an error
                return
            self.send([header, payload], address)

    def _send_cut(self, header: bytes, payloads: Sequence[Buffer], size: int, address: Address | None) -> bool:
        """Send several datagrams with one call. False when they are to be sent one by one."""
        whole = header.join((b"", *payloads))
        how = [(socket.IPPROTO_UDP, _UDP_SEGMENT, struct.pack("=H", size))]
        try:
            if address is None:
                self._sock.sendmsg([whole], how)
            else:
                self._sock.sendmsg([whole], how, 0, address)
        except (BlockingIOError, InterruptedError):
            self._drops["socket full"] += len(payloads)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                self._drops["socket full"] += len(payloads)
                return True
            if error.errno == errno.EMSGSIZE:
                self.cuts = size - 1  # more than the path takes whole; the kernel cuts, but does not fragment as well
            elif error.errno in _CANNOT_CUT:
                self.cuts = 0
            else:
                self._collect_errors(error)  # of an earlier datagram, or `send` says it again
            return False
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._poller.unwatch(self._sock.fileno())
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

    def _on_readable(self, mask: int) -> None:
        for count in range(self.reader.calls):
            try:
                runs = self.reader.receive()
            except (BlockingIOError, InterruptedError):
                if count == 0:
                    self._collect_errors(None)
                return
            except OSError as error:
                self._collect_errors(error)
                runs = []
            for run in runs:
                if not self.closed:
                    self._on_run(run)
            if self.closed:
                return

    def _collect_errors(self, pending: OSError | None) -> int:
        """Report the queued ICMP errors; `pending` is the socket's own error. Returns how many there were."""
        if not self._has_error_queue:
            if pending is not None:
                self._on_error(pending.errno or 0, None)
            return 0
        for count in range(_ERRORS):
            if self.closed:
                return count
            try:
                _, ancillary, _, address = self._sock.recvmsg(0, 512, _MSG_ERRQUEUE)
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
