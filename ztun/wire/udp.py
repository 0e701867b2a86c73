"""UDP header (RFC 768), and runs of datagrams that one packet carries (VIRTIO_NET_HDR_GSO_UDP_L4)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from ztun.wire import checksum, ip, vnet
from ztun.wire.ip import MalformedError

LENGTH: Final = 8
CHECKSUM_OFFSET: Final = 6
_HEADER: Final = struct.Struct("!HHHH")


def parse(packet: memoryview, start: int, end: int) -> tuple[int, int, int, int]:
    """(source port, destination port, end of payload, checksum) of the header at `start`. Raises MalformedError."""
    if end - start < LENGTH:
        raise MalformedError("udp-truncated")
    source, destination, length, check = _HEADER.unpack_from(packet, start)
    if length < LENGTH or start + length > end:
        raise MalformedError("udp-length")
    return source, destination, start + length, check


def header(source: int, destination: int, payload_length: int, check: int) -> bytes:
    """A header with the given checksum field."""
    return _HEADER.pack(source, destination, LENGTH + payload_length, check)


def segment_size(packet: memoryview) -> int:
    """The payload of each datagram but the last of a super-datagram, virtio_net_hdr first; 0 when it is a plain one."""
    _, gso_type, _, size, _, _ = vnet.unpack(packet)
    return size if gso_type == vnet.GSO_UDP_L4 else 0


def segments(front: bytes, payload: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Cut a super-datagram as a device with offloads would: (header, payload) of each datagram.

    front: virtio_net_hdr, IP header without options or extensions, UDP header. The checksums of what comes out hold
    the pseudo-header sum only, as in the packet that is cut.
    """
    size = segment_size(memoryview(front))
    flags, _, _, _, start, offset = vnet.unpack(front)
    plain = vnet.pack(flags, vnet.GSO_NONE, 0, 0, start, offset)
    network, ports = front[vnet.LENGTH : -LENGTH], front[-LENGTH : -LENGTH + 4]
    addresses = network[8:] if network[0] >> 4 == 6 else network[12:]
    for at in range(0, len(payload), size):
        piece = payload[at : at + size]
        length = LENGTH + len(piece)
        pseudo = checksum.pseudo_sum(addresses, ip.UDP, length)
        yield plain + _with_length(network, length) + ports + struct.pack("!HH", length, pseudo), piece


def _with_length(network: bytes, length: int) -> bytes:
    """The IP header for `length` bytes behind it."""
    if network[0] >> 4 == 6:
        return network[:4] + struct.pack("!H", length) + network[6:]
    head = network[:2] + struct.pack("!H", len(network) + length) + network[4:10] + b"\0\0" + network[12:]
    return head[:10] + struct.pack("!H", checksum.finish(checksum.ones_sum(head))) + head[12:]
