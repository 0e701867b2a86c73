"""Outgoing headers of one flow: virtio_net_hdr, IP and TCP or UDP in one bytes object.

All that can be computed once is.

The TCP checksum field carries the pseudo-header sum only (VIRTIO_NET_HDR_F_NEEDS_CSUM); the kernel or the card adds the
payload. A segment larger than the MSS goes out whole with gso_size set, to be cut by the kernel or the card.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

from ztun.wire import checksum, ip, tcp, udp, vnet
from ztun.wire.sequence import MASK

_CSUM_OFFSET: Final = 16  # of the checksum field in the TCP header
_MAX_IP4: Final = 65535

# virtio_net_hdr, version/TOS, total length, ID/flags/TTL/protocol, checksum, addresses and ports, then TCP.
_V4: Final = struct.Struct("!10s2sH6sH12sIIHHHH")
# virtio_net_hdr, version/class/label, payload length, next header/hop limit, addresses and ports, then TCP.
_V6: Final = struct.Struct("!10s4sH2s36sIIHHHH")


class FlowKey:
    """A base for what belongs to a flow. key: source and destination address, source and destination port of the
    client's packets, as on the wire, 12 bytes for IPv4, 36 for IPv6."""

    __slots__ = ("key",)

    def __init__(self, key: bytes) -> None:
        self.key = key

    @property
    def source(self) -> bytes:
        return self.key[: (len(self.key) - 4) // 2]

    @property
    def destination(self) -> bytes:
        return self.key[(len(self.key) - 4) // 2 : -4]

    @property
    def source_port(self) -> int:
        return self.key[-4] << 8 | self.key[-3]

    @property
    def destination_port(self) -> int:
        return self.key[-2] << 8 | self.key[-1]


class FlowHeader:
    """Builds headers for one direction of one flow.

    key: source address, destination address, source port, destination port as they stand in the packet to send,
    12 bytes for IPv4, 36 for IPv6.
    """

    __slots__ = (
        "_addresses",
        "_base",
        "_gso",
        "_ip_base",
        "_ip_front",
        "_ip_length",
        "_ip_tail",
        "_key",
        "_plain",
        "_size",
        "_v6",
        "overhead",
    )

    def __init__(self, key: bytes, hop_limit: int = ip.DEFAULT_TTL, traffic_class: int = 0) -> None:
        self._key = key
        self._v6 = len(key) == 36
        self._ip_length = 40 if self._v6 else 20
        self._addresses = checksum.ones_sum(key[:-4])
        self._base = self._addresses + ip.TCP
        self.set_ip(hop_limit, traffic_class)
        self._plain = self._gso = _vnet_header(self._ip_length, 0, 0)
        self._size = 0
        self.overhead = self._ip_length + 20

    def set_ip(self, hop_limit: int, traffic_class: int) -> None:
        """hop_limit: TTL or Hop Limit, 1-255; traffic_class: the DSCP in its six upper bits, 0-255 (RFC 2474)."""
        self._ip_front, self._ip_tail, fixed = _ip_header(self._v6, hop_limit, traffic_class)
        self._ip_base = (self._addresses + fixed) % 0xFFFF

    def set_segment_size(self, size: int, options: int) -> None:
        """size: payload bytes of a full segment; options: bytes of options that a data segment carries."""
        self._size = size
        self._gso = _vnet_header(self._ip_length, self.overhead + options, size)

    def largest_payload(self, options: int) -> int:
        """The most bytes that one super-segment can carry: whole segments within what the IP length field can say."""
        room = _MAX_IP4 - self.overhead - options
        return room // self._size * self._size

    def pack(self, seq: int, ack: int, flags: int, window: int, options: bytes, payload: int) -> bytes:
        """seq, ack: any integers, taken modulo 2**32; window: as it goes on the wire; payload: its length in bytes."""
        header = 20 + len(options)
        length = header + payload
        front = self._gso if payload > self._size else self._plain
        pseudo = self._base + length
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        bits = header << 10 | flags
        if self._v6:
            return (
                _V6.pack(
                    front, self._ip_front, length, self._ip_tail, self._key,
                    seq & MASK, ack & MASK, bits, window, pseudo, 0,
                )
                + options
            )  # fmt: skip
        total = 20 + length
        check = self._ip_base + total
        check = ((check & 0xFFFF) + (check >> 16)) ^ 0xFFFF
        return (
            _V4.pack(
                front, self._ip_front, total, self._ip_tail, check, self._key,
                seq & MASK, ack & MASK, bits, window, pseudo, 0,
            )
            + options
        )  # fmt: skip


@lru_cache(maxsize=256)
def _ip_header(v6: bool, hop_limit: int, traffic_class: int) -> tuple[bytes, bytes, int]:
    """What flows have in common: the fields before and behind the length, and for IPv4 the sum of both."""
    if v6:
        return (0x60000000 | traffic_class << 20).to_bytes(4, "big"), bytes((ip.TCP, hop_limit)), 0
    front = bytes((0x45, traffic_class))
    tail = struct.pack("!HHBB", 0, 0x4000, hop_limit, ip.TCP)  # DF, and ID 0 (RFC 6864)
    return front, tail, checksum.ones_sum(front + bytes(2) + tail)


@lru_cache(maxsize=256)
def _vnet_header(ip_length: int, header: int, size: int) -> bytes:
    """For segments of `size` bytes behind `header` bytes of header; size 0: for one that goes as it is."""
    gso_type = vnet.GSO_NONE if not size else vnet.GSO_TCPV6 if ip_length == 40 else vnet.GSO_TCPV4
    return vnet.pack(vnet.NEEDS_CSUM, gso_type, header, size, ip_length, _CSUM_OFFSET)


# virtio_net_hdr, version/TOS, total length, ID/flags/TTL/protocol, checksum, addresses and ports, UDP length, checksum.
_UDP4: Final = struct.Struct("!10s2sH6sH12sHH")
# virtio_net_hdr, version/class/label, payload length, next header/hop limit, addresses and ports, UDP length, checksum.
_UDP6: Final = struct.Struct("!10s4sH2s36sHH")


class DatagramHeader:
    """Builds headers for the datagrams of one direction of one UDP flow. key: as for FlowHeader."""

    __slots__ = ("_base", "_front", "_ip_base", "_run_front", "_run_size", "key", "largest", "overhead")

    def __init__(self, key: bytes) -> None:
        addresses = key[:-4]
        size = 40 if len(key) == 36 else 20
        self.key = key
        self.overhead = size + udp.LENGTH
        self.largest = 0xFFFF - udp.LENGTH - (0 if len(key) == 36 else size)  # payload, by the length fields
        self._base = checksum.pseudo_sum(addresses, ip.UDP, 0)
        self._ip_base = checksum.ones_sum(struct.pack("!HHHBB", 0x4500, 0, 0x4000, ip.DEFAULT_TTL, ip.UDP) + addresses)
        self._front = vnet.pack(vnet.NEEDS_CSUM, csum_start=size, csum_offset=udp.CHECKSUM_OFFSET)
        self._run_front = self._front
        self._run_size = 0

    def pack_run(self, payload: int, size: int) -> bytes:
        """A super-datagram: `payload` bytes, to be cut by the kernel or the card into datagrams of `size` bytes each,
        the last of which may be shorter."""
        if size != self._run_size:
            self._run_size = size
            start = self.overhead - udp.LENGTH
            self._run_front = vnet.pack(
                vnet.NEEDS_CSUM, vnet.GSO_UDP_L4, self.overhead, size, start, udp.CHECKSUM_OFFSET
            )
        return self._run_front + self.pack(payload)[vnet.LENGTH :]

    def pack(self, payload: int) -> bytes:
        """payload: its length in bytes."""
        length = udp.LENGTH + payload
        # The length counts in the pseudo-header only: the checksum field is the sum of that, and of nothing else yet.
        pseudo = self._base + length
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        if len(self.key) == 36:
            return _UDP6.pack(self._front, b"\x60\0\0\0", length, b"\x11\x40", self.key, length, pseudo)
        total = 20 + length
        check = self._ip_base + total
        check = ((check & 0xFFFF) + (check >> 16)) ^ 0xFFFF
        return _UDP4.pack(
            self._front, b"\x45\0", total, b"\0\0\x40\0\x40\x11", check, self.key, length, pseudo
        )  # fmt: skip


def reset_for(key: bytes, seq: int, ack: int | None, hop_limit: int) -> bytes:
    """A RST packet of a flow without a connection (RFC 9293 section 3.10.7.1). key: as for FlowHeader."""
    flags = tcp.RST if ack is None else tcp.RST | tcp.ACK
    return FlowHeader(key, hop_limit).pack(seq, ack or 0, flags, 0, b"", 0)


def reverse(key: bytes) -> bytes:
    """The key of the other direction: addresses and ports change places."""
    half = (len(key) - 4) // 2
    return key[half : 2 * half] + key[:half] + key[-2:] + key[-4:-2]
