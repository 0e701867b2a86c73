"""What a device with offloads does to a packet, done in software: complete its checksum, cut it into segments.

For a device that takes whole packets only, such as utun on macOS. Sources: linux/virtio_net.h, RFC 9293, RFC 768.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final

from ztun.wire import checksum, ip, tcp, udp, vnet

Buffer = bytes | bytearray | memoryview

_LAST_ONLY: Final = tcp.FIN | tcp.PSH  # of the flags of a super-segment
_FIRST_ONLY: Final = tcp.CWR
_LENGTH: Final = struct.Struct("!H")
_SEQUENCE: Final = struct.Struct("!I")


def finish(buffers: Sequence[Buffer]) -> Iterator[tuple[bytes, bytes | memoryview]]:
    """The packets that go on a wire for one packet given in pieces, virtio_net_hdr first: (headers, payload) of each.

    The first piece holds all headers; a checksum that was left to the device (NEEDS_CSUM) is complete in what comes
    out, and what was too large (gso_type) is cut.
    """
    front = bytes(buffers[0])
    flags, kind, _, size, start, offset = vnet.unpack(front)
    if not flags & vnet.NEEDS_CSUM:
        yield front[vnet.LENGTH :], b"".join(buffers[1:])
        return
    payload = b"".join(buffers[1:])
    if kind == vnet.GSO_UDP_L4:
        for head, piece in udp.segments(front, memoryview(payload)):
            yield _completed(head, start, offset, piece), piece
    elif kind != vnet.GSO_NONE and size < len(payload):
        yield from _segments(front[vnet.LENGTH : vnet.LENGTH + start], front[vnet.LENGTH + start :], payload, size)
    else:
        yield _completed(front, start, offset, payload), payload


def _completed(front: bytes, start: int, offset: int, payload: Buffer) -> bytes:
    """The headers with the sum of everything from `start` on in the checksum field, which holds that of the
    pseudo-header so far."""
    transport = front[vnet.LENGTH + start :]
    # A header of odd length would shift the payload by a byte; none has one.
    total = checksum.ones_sum(payload, checksum.ones_sum(transport))
    check = checksum.finish(total)
    if not check and offset == udp.CHECKSUM_OFFSET:
        check = 0xFFFF  # RFC 768: 0 says that there is none
    at = vnet.LENGTH + start + offset
    return front[vnet.LENGTH : at] + _LENGTH.pack(check) + front[at + 2 :]


def _segments(network: bytes, header: bytes, payload: bytes, size: int) -> Iterator[tuple[bytes, memoryview]]:
    """Cut a TCP super-segment: each piece has its own lengths, sequence number, flags and checksums."""
    is_v6 = network[0] >> 4 == 6
    addresses = network[8:40] if is_v6 else network[12:20]
    sequence, flags = _SEQUENCE.unpack_from(header, 4)[0], header[13]
    ports, middle, rest = header[:4], header[8:13], header[18:]
    window = header[14:16]
    # What is the same in every segment is summed once.
    base = checksum.pseudo_sum(addresses, ip.TCP, 0)
    base = checksum.ones_sum(ports + header[8:12] + header[12:13] + b"\0" + window + rest, base)
    view = memoryview(payload)
    for at in range(0, len(payload), size):
        piece = view[at : at + size]
        mine = flags if at + size >= len(payload) else flags & ~_LAST_ONLY
        if at:
            mine &= ~_FIRST_ONLY
        number = _SEQUENCE.pack((sequence + at) & 0xFFFFFFFF)
        length = len(header) + len(piece)
        total = checksum.ones_sum(piece, base + mine + checksum.ones_sum(number) + length)
        yield (
            b"".join(
                (
                    _with_length6(network, length) if is_v6 else _with_length4(network, length),
                    ports,
                    number,
                    middle,
                    bytes((mine,)),
                    window,
                    _LENGTH.pack(checksum.finish(total)),
                    rest,
                )
            ),
            piece,
        )


def _with_length4(network: bytes, length: int) -> bytes:
    head = network[:2] + _LENGTH.pack(len(network) + length) + network[4:10] + b"\0\0" + network[12:]
    return head[:10] + _LENGTH.pack(checksum.finish(checksum.ones_sum(head))) + head[12:]


def _with_length6(network: bytes, length: int) -> bytes:
    return network[:4] + _LENGTH.pack(length + len(network) - 40) + network[6:]
