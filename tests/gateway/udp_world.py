"""A device in memory for tests of the UDP relay, and packets that a client would send."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ztun.ports import Buffer
from ztun.wire import ip, vnet

CLIENT, SITE = bytes([10, 0, 0, 2]), bytes([192, 0, 2, 7])


def datagram(payload: bytes, *, source_port: int = 4000, port: int = 53, site: bytes = SITE) -> bytes:
    """As the kernel hands it over, virtio_net_hdr first."""
    ports = struct.pack("!HHHH", source_port, port, 8 + len(payload), 0)
    return vnet.pack(vnet.DATA_VALID) + ip.header(CLIENT, site, ip.UDP, 8 + len(payload)) + ports + payload


class Device:
    """A PacketDevice in memory: gives what a client says, keeps what the stack writes."""

    name, mtu = "memory", 1500

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.written: list[bytes] = []

    def fileno(self) -> int:
        return -1

    def recv_into(self, buffer: bytearray | memoryview) -> int:
        packet = self.said.pop(0) if self.said else b""
        buffer[: len(packet)] = packet
        return len(packet)

    def send(self, buffers: Sequence[Buffer]) -> bool:
        self.written.append(b"".join(buffers))
        return True

    def close(self) -> None: ...
