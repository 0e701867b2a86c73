"""The TUN device: IP packets with a virtio_net_hdr in front, super-segments kept whole.

Sources: Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h, drivers/net/tun.c.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import struct
from collections.abc import Sequence
from typing import Final

from ztun.errors import ZtunError
from ztun.ports import Buffer
from ztun.wire import udp, vnet

_CLONE_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETVNETHDRSZ: Final = 0x400454D8
_IFF_TUN: Final = 0x0001
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000
_TUN_F_CSUM: Final = 0x01
_TUN_F_TSO4: Final = 0x02
_TUN_F_TSO6: Final = 0x04
_TUN_F_USO4: Final = 0x20  # Linux 6.2
_TUN_F_USO6: Final = 0x40
_IFNAMSIZ: Final = 16
_VNET_HEADER_SIZE: Final = 10  # struct virtio_net_hdr, without num_buffers

_writev = os.writev


class TunDevice:
    """A ztun.ports.PacketDevice on /dev/net/tun. It is not persistent: it goes with its file descriptor.

    `send_errors` counts what the kernel refused to take; `cuts_datagrams`: whether it cuts super-datagrams (UDP
    segmentation offload), which is done here for a kernel that does not.
    """

    def __init__(self, name: str, mtu: int, fd: int, *, cuts_datagrams: bool = False) -> None:
        self.name = name
        self.mtu = mtu
        self.send_errors = 0
        self.cuts_datagrams = cuts_datagrams
        self._fd = fd
        # It tells of an empty queue without raising, which costs a third more.
        self._file = io.FileIO(fd, "rb", closefd=False)
        self._read = self._file.readinto

    def fileno(self) -> int:
        return self._fd

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        """Read one packet, virtio_net_hdr first. Returns its length in bytes, 0 when there is none.

        The buffer should hold 10 + 65535 bytes: what does not fit is lost (tun_put_user truncates).
        Raises OSError when the device is gone.
        """
        return self._read(buffer) or 0

    def send(self, buffers: Sequence[Buffer]) -> bool:
        """Write one packet given in pieces, virtio_net_hdr first. False when the kernel refused it."""
        if not self.cuts_datagrams and buffers[0][1] == vnet.GSO_UDP_L4:
            return self._send_cut(buffers)
        try:
            _writev(self._fd, buffers)
        except OSError as error:
            if error.errno == errno.EINVAL and buffers[0][1] == vnet.GSO_UDP_L4:
                self.cuts_datagrams = False
                return self._send_cut(buffers)
            self.send_errors += 1
            return False
        return True

    def _send_cut(self, buffers: Sequence[Buffer]) -> bool:
        """Write the datagrams of a super-datagram one by one."""
        front, payload = buffers
        refused = self.send_errors
        for datagram in udp.segments(bytes(front), memoryview(payload)):
            self.send(datagram)
        return self.send_errors == refused

    def reopen(self) -> None:
        """See ztun.ports.PacketDevice.reopen."""
        fresh = open_tun(self.name, self.mtu)
        try:
            os.dup2(fresh.fileno(), self._fd, inheritable=False)
            self.cuts_datagrams = fresh.cuts_datagrams
        finally:
            fresh.close()

    def close(self) -> None:
        if self._fd >= 0:
            self._file.close()  # or it would read from whatever has that number next
            os.close(self._fd)
            self._fd = -1


def open_tun(name: str, mtu: int) -> TunDevice:
    """Create the TUN device `name` in this network namespace. `mtu` in bytes is set by TunRoutes.up().

    Raises ZtunError when the name is taken, the kernel has no TUN, or we may not.
    """
    encoded = name.encode()
    if not 0 < len(encoded) < _IFNAMSIZ:
        raise ZtunError(f"tun.name {name!r}: an interface name has 1 to 15 bytes")
    fd = _open_clone_device()
    try:
        cuts_datagrams = _configure(fd, encoded)
    except OSError as error:
        os.close(fd)
        raise ZtunError(_explain(name, error)) from error
    return TunDevice(name, mtu, fd, cuts_datagrams=cuts_datagrams)


def _open_clone_device() -> int:
    try:
        return os.open(_CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ZtunError(f"{_CLONE_DEVICE} is missing: load the tun module (modprobe tun)") from error
    except PermissionError as error:
        raise ZtunError(f"cannot open {_CLONE_DEVICE}: not permitted; run as root, or give it mode 0666") from error
    except OSError as error:
        raise ZtunError(f"cannot open {_CLONE_DEVICE}: {error.strerror}") from error


def _configure(fd: int, name: bytes) -> bool:
    """Returns whether the kernel has UDP segmentation offload on a TUN."""
    # IFF_TUN_EXCL: never take over a device that somebody else made persistent.
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_TUN_EXCL
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, flags))
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER_SIZE))
    offloads = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, offloads | _TUN_F_USO4 | _TUN_F_USO6)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.ioctl(fd, _TUNSETOFFLOAD, offloads)
        return False
    return True


def _explain(name: str, error: OSError) -> str:
    if error.errno in (errno.EBUSY, errno.EEXIST):
        return f"interface {name} exists already: another ztun is running (ztun down), or choose another tun.name"
    if error.errno == errno.EPERM:
        return f"cannot create {name}: not permitted; run as root or with CAP_NET_ADMIN"
    if error.errno == errno.EINVAL:
        return f"cannot create {name}: not a name for an interface, or a kernel without vnet headers; check tun.name"
    return f"cannot create {name}: {error.strerror}"
