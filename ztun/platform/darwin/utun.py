"""The utun device: an interface whose packets come and go by a kernel control socket.

In front of each packet stands its address family, 4 bytes in network order. There are no offloads: what the stack
leaves to the device is done here in software. Sources: bsd/net/if_utun.c and if_utun.h, bsd/sys/kern_control.h.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress

from ztun.errors import ZtunError
from ztun.platform.darwin import instances, numbers
from ztun.platform.darwin.calls import Calls
from ztun.ports import Buffer
from ztun.wire import offload, vnet

FAMILY_LENGTH = 4
_FAMILY4 = numbers.AF_INET.to_bytes(FAMILY_LENGTH, "big")
_FAMILY6 = numbers.AF_INET6.to_bytes(FAMILY_LENGTH, "big")
_FAMILIES = (_FAMILY4, _FAMILY6)
_SKIP = vnet.LENGTH - FAMILY_LENGTH  # so that the packet comes to stand behind an empty virtio_net_hdr
_BUFFER = 1 << 20  # bytes, of the socket: a burst must outlast one turn of the loop
_PENDING = 512  # packets that wait in the kernel
_NAME = re.compile(r"utun(\d*)")

_readv = os.readv
_writev = os.writev

Admit = Callable[[memoryview], bool]
"""Whether a packet, which begins at the IP header, is for the stack."""


class UtunDevice:
    """A ztun.ports.PacketDevice on utun. It goes with its descriptor.

    admit: asked of every packet that comes in; what it refuses is not seen by who reads. send_errors counts what the
    kernel refused to take, strangers what came with a family that is no IP.
    """

    def __init__(self, name: str, mtu: int, fd: int, reopen: Callable[[str], int]) -> None:
        self.name = name
        self.mtu = mtu
        self.send_errors = 0
        self.strangers = 0
        self.admit: Admit | None = None
        self._fd = fd
        self._reopen = reopen
        self._withdraw = instances.announce(name)
        opened[name] = self

    def fileno(self) -> int:
        return self._fd

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """Read one packet that is admitted, an empty virtio_net_hdr first. Returns its length, 0 when there is none.

        Raises OSError when the interface is gone.
        """
        view = memoryview(buffer)
        room = view[_SKIP:]
        while True:
            try:
                length = _readv(self._fd, (room,))
            except (BlockingIOError, InterruptedError):
                return 0
            if length == 0:  # a datagram socket has an end only when the control behind it is gone
                raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
            end = _SKIP + length
            if end <= vnet.LENGTH or view[_SKIP : vnet.LENGTH] not in _FAMILIES:
                self.strangers += 1
                continue
            view[: vnet.LENGTH] = vnet.EMPTY
            if self.admit is None or self.admit(view[vnet.LENGTH : end]):
                return end

    def send(self, buffers: Sequence[Buffer]) -> bool:
        """Write one packet given in pieces, virtio_net_hdr first. False when the kernel refused any part of it."""
        refused = self.send_errors
        for headers, payload in offload.finish(buffers):
            family = _FAMILY6 if headers[0] >> 4 == 6 else _FAMILY4
            try:
                _writev(self._fd, (family, headers, payload))
            except OSError:
                self.send_errors += 1
        return self.send_errors == refused

    def reopen(self) -> None:
        """See ztun.ports.PacketDevice.reopen."""
        fresh = self._reopen(self.name)
        try:
            os.dup2(fresh, self._fd, inheritable=False)
        finally:
            os.close(fresh)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            opened.pop(self.name, None)
            self._withdraw()


opened: weakref.WeakValueDictionary[str, UtunDevice] = weakref.WeakValueDictionary()
"""The devices of this process by name."""


def unit_of(name: str) -> int:
    """The unit of a kernel control for the interface `name`, which is one more than its number; 0 for "utun": any.

    Raises ZtunError for a name that macOS cannot give.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ZtunError(f"tun.name {name!r}: on macOS it is utun (any that is free) or utun0, utun1 and so on")
    return int(found[1]) + 1 if found[1] else 0


def open_utun(name: str, mtu: int, calls: Calls) -> UtunDevice:
    """Make a utun; `mtu` in bytes is set by UtunRoutes.up(). Raises ZtunError when it is taken, or we may not."""

    def descriptor(wanted: str) -> int:
        return _connect(wanted, calls)[0]

    fd, given = _connect(name, calls)
    return UtunDevice(given, mtu, fd, descriptor)


def _connect(name: str, calls: Calls) -> tuple[int, str]:
    """A descriptor of a new utun, and what it is called."""
    unit = unit_of(name)
    try:
        sock = calls.control_socket()
    except OSError as error:
        raise ZtunError(f"cannot open a kernel control socket: {_say(error)}") from error
    try:
        control = calls.control_id(sock, numbers.UTUN_CONTROL_NAME)
        calls.connect_control(sock, control, unit)
        given = calls.interface_name(sock)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ZtunError(_explain(name, error)) from error
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        with suppress(OSError):  # as much as kern.ipc.maxsockbuf allows
            sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    with suppress(OSError):  # a newer option (macOS 10.15)
        sock.setsockopt(numbers.SYSPROTO_CONTROL, numbers.UTUN_OPT_MAX_PENDING_PACKETS, _PENDING)
    return sock.detach(), given


def _explain(name: str, error: OSError) -> str:
    if error.errno == errno.EBUSY:
        return f"interface {name} exists already: another program has it; set tun.name to utun to take a free one"
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"cannot create {name}: not permitted; run as root (sudo)"
    if error.errno == errno.ENOENT:
        return f"cannot create {name}: this system has no utun"
    return f"cannot create {name}: {_say(error)}"


def _say(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
