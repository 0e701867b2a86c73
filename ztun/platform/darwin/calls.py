"""The system calls and programs that exist on macOS only, behind one seam.

Everything else in this package is plain Python that runs anywhere, so that tests on Linux can put calls of their own
here, which answer as the headers of XNU say.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from ztun.errors import ZtunError
from ztun.platform.darwin import numbers

CTL_INFO = struct.Struct(f"=I{numbers.MAX_KCTL_NAME}s")  # struct ctl_info: id, name (bsd/sys/kern_control.h)
_TIMEOUT = 10.0  # seconds that ifconfig(8), route(8) or sysctl(8) may take


class Done(NamedTuple):
    """What a program gave: its exit code, and what it said on both channels."""

    code: int
    output: str


class Calls(Protocol):
    """What macOS is asked for. All raise OSError."""

    def control_socket(self) -> socket.socket:
        """A socket of PF_SYSTEM for kernel controls."""
        ...

    def control_id(self, sock: socket.socket, name: str) -> int:
        """CTLIOCGINFO: the number of the kernel control `name`."""
        ...

    def connect_control(self, sock: socket.socket, control: int, unit: int) -> None:
        """Connect to a unit of a kernel control, which counts from 1; 0 takes the next one that is free."""
        ...

    def interface_name(self, sock: socket.socket) -> str:
        """UTUN_OPT_IFNAME: the interface behind a connected control socket."""
        ...

    def bind_interface(self, sock: socket.socket, index: int) -> None:
        """IP_BOUND_IF or IPV6_BOUND_IF: leave by this interface only; by any when it is 0."""
        ...

    def route_socket(self) -> socket.socket:
        """A socket of PF_ROUTE, which hears of every change (route(4))."""
        ...

    def dump(self, what: int, argument: int = 0) -> bytes:
        """sysctl(3) of CTL_NET, PF_ROUTE: the messages of NET_RT_IFLIST, NET_RT_DUMP, or NET_RT_FLAGS (RTF_*)."""
        ...

    def run(self, argv: Sequence[str]) -> Done:
        """Run a program to its end."""
        ...


class SystemCalls:
    """The real ones."""

    def control_socket(self) -> socket.socket:
        return socket.socket(numbers.AF_SYSTEM, socket.SOCK_DGRAM, numbers.SYSPROTO_CONTROL)

    def control_id(self, sock: socket.socket, name: str) -> int:
        answer = fcntl.ioctl(sock, numbers.CTLIOCGINFO, CTL_INFO.pack(0, name.encode()))
        return int(CTL_INFO.unpack(answer)[0])

    def connect_control(self, sock: socket.socket, control: int, unit: int) -> None:
        sock.connect((control, unit))  # struct sockaddr_ctl is made by Python (Modules/socketmodule.c, PF_SYSTEM)

    def interface_name(self, sock: socket.socket) -> str:
        return sock.getsockopt(numbers.SYSPROTO_CONTROL, numbers.UTUN_OPT_IFNAME, 16).rstrip(b"\0").decode()

    def bind_interface(self, sock: socket.socket, index: int) -> None:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, numbers.IPV6_BOUND_IF, index)
        else:
            sock.setsockopt(socket.IPPROTO_IP, numbers.IP_BOUND_IF, index)

    def route_socket(self) -> socket.socket:
        return socket.socket(numbers.AF_ROUTE, socket.SOCK_RAW, 0)

    def dump(self, what: int, argument: int = 0) -> bytes:
        name = (ctypes.c_int * 6)(numbers.CTL_NET, numbers.AF_ROUTE, 0, 0, what, argument)
        size = ctypes.c_size_t(0)
        _sysctl(name, None, size)
        # It may grow between the two calls.
        size.value += size.value // 4 + 4096
        buffer = ctypes.create_string_buffer(size.value)
        _sysctl(name, buffer, size)
        return buffer.raw[: size.value]

    def run(self, argv: Sequence[str]) -> Done:
        try:
            done = subprocess.run(
                argv, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, timeout=_TIMEOUT, env={"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "LC_ALL": "C"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Done(-1, f"{argv[0]} did not end within {_TIMEOUT:g} s")
        return Done(done.returncode, done.stdout.strip())


def _sysctl(name: Any, buffer: Any, size: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sysctl(name, len(name), buffer, ctypes.byref(size), None, ctypes.c_size_t(0)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def require(calls: Calls, *argv: str) -> str:
    """Run a program that has to succeed; what it said. Raises ZtunError with its words in one line."""
    try:
        done = calls.run(argv)
    except OSError as error:
        raise ZtunError(f"cannot run {argv[0]}: {(error.strerror or str(error)).lower()}") from error
    if done.code:
        raise ZtunError(f"`{' '.join(argv)}`: {one_line(done)}")
    return done.output


def one_line(done: Done) -> str:
    """What a program said, in one line."""
    return "; ".join(line.strip() for line in done.output.splitlines() if line.strip()) or f"gave {done.code}"
