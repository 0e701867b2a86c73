"""This machine's kernel TCP behind a TUN of ours, in a network namespace that vanishes with its descriptors."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .script import OPEN, Application

SERVER = {4: ipaddress.ip_address("10.97.0.1").packed, 6: ipaddress.ip_address("fd97::1").packed}
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_BACKLOG = 8192

# What the comparison needs to be the same on both sides, or does not want to measure.
SYSCTLS = {
    "core/somaxconn": "8192",
    "ipv4/tcp_max_syn_backlog": "8192",
    "ipv4/tcp_syncookies": "0",
    "ipv4/tcp_invalid_ratelimit": "0",  # challenge ACKs without throttle here and there; tests/stack has the throttle
    "ipv4/tcp_dsack": "0",  # RFC 2883, which the stack does not offer
    "ipv4/tcp_ecn": "0",  # RFC 3168, nor this
    "ipv4/tcp_rfc1337": "1",  # a RST does not end TIME-WAIT, as the stack has it
    "ipv4/tcp_comp_sack_nr": "0",  # no ACK waits for another
    "ipv4/tcp_early_retrans": "0",  # no tail loss probes
    "ipv4/tcp_autocorking": "0",
    "ipv4/tcp_no_metrics_save": "1",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/router_solicitations": "0",
}
_SETUP = """\
link set lo up
address add 10.97.0.1/16 dev tun0
address add fd97::1/64 dev tun0 nodad noprefixroute
link set tun0 mtu 1500 txqueuelen 16384 up
route replace 10.97.0.0/16 dev tun0 src 10.97.0.1 quickack 1 rto_min 30s
route replace fd97::/64 dev tun0 src fd97::1 quickack 1 rto_min 30s
"""


class KernelSide:
    """`inject` hands the kernel one packet, `drain` takes what it answered; `accept` finds the new connections."""

    def __init__(self) -> None:
        # A thread's namespace is its own; sockets and the TUN stay where they were made.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            self._fd, self._listeners = thread.submit(self._set_up).result()

    @staticmethod
    def _set_up() -> tuple[int, list[socket.socket]]:
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        for name, value in SYSCTLS.items():
            Path("/proc/sys/net", name).write_text(value)
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", b"tun0", _IFF_TUN | _IFF_NO_PI))
        subprocess.run(["ip", "-batch", "-"], input=_SETUP, text=True, check=True)
        return fd, [_listen(socket.AF_INET, "10.97.0.1"), _listen(socket.AF_INET6, "fd97::1")]

    def inject(self, packet: bytes) -> None:
        os.write(self._fd, packet)

    def drain(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield os.read(self._fd, 65536)

    def accept(self) -> Iterator[tuple[bytes, int, socket.socket]]:
        """(client's address, its port, the connection) of each new connection."""
        for listener in self._listeners:
            with contextlib.suppress(BlockingIOError):
                while True:
                    try:
                        sock, peer = listener.accept()
                    except ConnectionError:
                        continue
                    sock.setblocking(False)
                    yield ipaddress.ip_address(peer[0]).packed, peer[1], sock

    def close(self) -> None:
        for listener in self._listeners:
            listener.close()
        os.close(self._fd)


def _listen(family: int, address: str) -> socket.socket:
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # the stack hands on urgent data in line
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.bind((address, OPEN))
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    return listener


class KernelApp:
    """The application on the kernel's side: reads everything at once."""

    def __init__(self, sock: socket.socket | None = None) -> None:
        self.sock = sock
        self.accepted = sock is not None
        self.received = b""
        self.eof = False
        self.broken = False

    def look(self) -> None:
        """Read what is there."""
        if self.sock is None or self.broken:
            return
        try:
            while not self.eof and (data := self.sock.recv(65536)):
                self.received += data
            self.eof = True
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
        if self.sock is not None and self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.broken = True

    def act(self, step: Application, data: bytes) -> bool:
        """False when there is no connection to act on."""
        if self.sock is None:
            return False
        try:
            if step.action == "send":
                self.sock.send(data)
            elif step.action == "shutdown":
                self.sock.shutdown(socket.SHUT_WR)
            else:
                self.abort()
        except OSError:
            return False  # closed, reset or shut down before
        return True

    def abort(self) -> None:
        if self.sock is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
            self.sock = None
