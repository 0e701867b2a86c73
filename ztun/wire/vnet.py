"""struct virtio_net_hdr (linux/virtio_net.h), the 10 bytes in front of every packet on a TUN with IFF_VNET_HDR.

All of its 16-bit fields are in host order. The kernel's hdr_len is not to be trusted on packets it hands out.
"""

from __future__ import annotations

import struct
from typing import Final

LENGTH: Final = 10
NEEDS_CSUM: Final = 1  # the checksum field holds the pseudo-header sum only; whoever sends it on completes it
DATA_VALID: Final = 2  # the checksum was verified by the kernel or the card
CHECKED: Final = NEEDS_CSUM | DATA_VALID

GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_UDP: Final = 3
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
GSO_ECN: Final = 0x80

_HEADER: Final = struct.Struct("=BBHHHH")

EMPTY: Final = bytes(LENGTH)


def pack(
    flags: int = 0,
    gso_type: int = GSO_NONE,
    hdr_len: int = 0,
    gso_size: int = 0,
    csum_start: int = 0,
    csum_offset: int = 0,
) -> bytes:
    """Build a header. csum_start and hdr_len count from the first byte of the IP header."""
    return _HEADER.pack(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)


def unpack(packet: bytes | bytearray | memoryview) -> tuple[int, int, int, int, int, int]:
    """(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset). Raises struct.error when it is short."""
    return _HEADER.unpack_from(packet)
