"""Taking a connection from the kernel's TCP: asked where it is, and left standing there (TCP_REPAIR, tcp(7)).

In repair mode a socket sends nothing of its own when it is closed. Sources: include/uapi/linux/tcp.h, net/ipv4/tcp.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
import termios
from typing import Final

import structlog

from ztun.platform.linux.sockets import disconnect
from ztun.wire.handshake import Offer, Terms

log = structlog.get_logger("ztun.classifier")

# linux/tcp.h.
_TCP: Final = socket.IPPROTO_TCP
_TCP_INFO: Final = socket.TCP_INFO
_REPAIR, _REPAIR_QUEUE, _QUEUE_SEQ, _TIMESTAMP = 19, 20, 21, 24
_RECEIVE_QUEUE, _SEND_QUEUE = 1, 2
_REPAIR_OFF = -1  # without a window probe
_INFO_SIZE: Final = 232
_ESTABLISHED: Final = 1
_HAS_STAMPS, _HAS_SACK, _HAS_SCALE, _NOT_PLAIN = 1, 2, 4, 8 | 16 | 32  # not: ECN, and data in the SYN
# State, options, window scales; snd_mss, unacked, advmss; bytes_received (since it began), notsent_bytes; snd_wnd.
_INFO = struct.Struct("=B4xBBx8xI4xI56xI40xQ8xI80xI")
# linux/filter.h: one instruction, BPF_RET | BPF_K with 0, which keeps nothing of any packet.
_DEAF = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)
_FILTER = struct.pack("@HP", 1, ctypes.addressof(_DEAF))
_ATTACH_FILTER: Final = 26  # asm-generic/socket.h
_MASK: Final = 0xFFFFFFFF
_ZERO: Final = bytes(4)
_PEEK: Final = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)
_STAMP_OPTIONS: Final = 12  # bytes of a header with timestamps


class Upstream:
    """What the kernel says of a connection to a proxy. number, expected: sequence numbers of the next segments, from us
    and from it; mss, own_mss: bytes of payload; scale, own_scale: of windows; stamp: our timestamp, None without;
    window: bytes.
    """

    __slots__ = ("expected", "mss", "number", "own_mss", "own_scale", "sack", "scale", "stamp", "window")

    def __init__(
        self, number: int, expected: int, mss: int, own_mss: int, scale: int, own_scale: int, sack: bool,
        stamp: int | None, window: int,
    ) -> None:  # fmt: skip
        self.number = number
        self.expected = expected
        self.mss = mss
        self.own_mss = own_mss
        self.scale = scale
        self.own_scale = own_scale
        self.sack = sack
        self.stamp = stamp
        self.window = window


def freeze(sock: socket.socket, unread: int) -> Upstream | None:
    """Take a connection from the kernel's TCP, and say where it is. `thaw` undoes it, also when it is None: something
    that was sent was not acknowledged, the other end has closed, or more has come than the `unread` bytes that wait.
    """
    get, put = sock.getsockopt, sock.setsockopt
    try:
        put(_TCP, _REPAIR, 1)
        put(_TCP, _REPAIR_QUEUE, _SEND_QUEUE)
        number = get(_TCP, _QUEUE_SEQ) & _MASK
        put(_TCP, _REPAIR_QUEUE, _RECEIVE_QUEUE)
        expected = get(_TCP, _QUEUE_SEQ) & _MASK
        # Whether more has come is asked last, for what was under way when its segments began to be kept away.
        info = get(_TCP, _TCP_INFO, _INFO_SIZE)
        state, options, scales, mss, unacked, own_mss, received, unsent, window = _INFO.unpack(info)
        if state != _ESTABLISHED or unacked or unsent or options & _NOT_PLAIN:
            return None
        if received != unread and not _waits(sock, unread):
            return None
        stamp = get(_TCP, _TIMESTAMP) & _MASK if options & _HAS_STAMPS else None
    except OSError:
        return None
    if not options & _HAS_SCALE:
        scales = 0
    return Upstream(number, expected, mss, own_mss, scales & 15, scales >> 4, options & _HAS_SACK != 0, stamp, window)


def _waits(sock: socket.socket, unread: int) -> bool:
    """Whether as many bytes wait to be read, and no more. Raises OSError."""
    if unread:  # a peek is the cheaper one, but nothing there would be an exception
        return len(sock.recv(unread + 1, _PEEK)) == unread
    return fcntl.ioctl(sock.fileno(), termios.FIONREAD, _ZERO) == _ZERO


def thaw(sock: socket.socket) -> None:
    """Undo `freeze`."""
    try:
        sock.setsockopt(_TCP, _REPAIR, _REPAIR_OFF)
    except OSError as error:
        log.debug("a connection was not given back", reason=error.strerror)


def dissolve(sock: socket.socket) -> bool:
    """Make a frozen connection a socket that was never connected; nothing is sent. Whether that went well."""
    try:
        if not disconnect(sock.fileno()):
            return False
        sock.setsockopt(_TCP, _REPAIR, _REPAIR_OFF)
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # that it was aborted, which is no news
    except OSError:
        return False
    return True


def deafen(sock: socket.socket) -> None:
    """Have a frozen connection hear nothing: it would acknowledge what the client never gets."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, _FILTER)
    except OSError as error:
        log.debug("a connection still hears its proxy", reason=error.strerror)


def agree(offer: Offer, upstream: Upstream) -> Terms | None:
    """What both can live with, None where they cannot: neither end may get what it did not agree to."""
    if upstream.stamp is not None and offer.stamp is None:
        return None  # the proxy waits for timestamps (RFC 7323 section 3.2)
    if upstream.sack and not offer.sack:
        return None
    stamps = upstream.stamp is not None
    options = _STAMP_OPTIONS if stamps else 0  # the kernel has taken them off both; RFC 6691 has not
    if upstream.own_mss + options > offer.mss:
        return None  # the proxy sends more than the client takes
    mss = upstream.mss + options
    scale = upstream.scale if offer.scale is not None else None
    known = upstream.expected, mss, scale, upstream.sack, stamps, upstream.window
    return tuple.__new__(Terms, known)  # past a function that is interpreted
