"""Packets built and read without ztun.wire, so that both sides of a transcript do not share their mistakes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
NEEDS_CSUM = 1
_GSO_TCPV4, _GSO_TCPV6 = 1, 4
VNET = struct.Struct("=BBHHHH")
MASK = 0xFFFFFFFF


def naive_sum(data: bytes) -> int:
    """The one's complement sum, word by word as RFC 1071 writes it."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def naive_checksum(data: bytes) -> int:
    return naive_sum(data) ^ 0xFFFF


def _pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    return source + destination + struct.pack("!II", length, protocol)


def ip_packet(source: bytes, destination: bytes, protocol: int, payload: bytes, **fields: int) -> bytes:
    """fields: ttl, total (a wrong length), flags (the fragment word, IPv4), first (version and header length)."""
    ttl = fields.get("ttl", 64)
    if len(source) == 16:
        length = fields.get("total", len(payload))
        return struct.pack("!IHBB", 0x60000000, length, protocol, ttl) + source + destination + payload
    total = fields.get("total", 20 + len(payload))
    head = struct.pack("!BBHHHBBH", fields.get("first", 0x45), 0, total, 7, fields.get("flags", 0), ttl, protocol, 0)
    head += source + destination
    check = fields.get("check", naive_checksum(head))
    return head[:10] + struct.pack("!H", check) + head[12:] + payload


def tcp_packet(
    source: bytes, destination: bytes, ports: tuple[int, int], seq: int, ack: int, flags: int, window: int,
    options: bytes = b"", payload: bytes = b"", urgent: int = 0, corrupt: int = 0,
) -> bytes:  # fmt: skip
    """A TCP segment in its IP packet, checksum complete unless `corrupt` is added to it."""
    words = (20 + len(options)) // 4 << 12 | flags
    head = struct.pack("!HHIIHHHH", *ports, seq & MASK, ack & MASK, words, window, 0, urgent) + options
    check = naive_checksum(_pseudo(source, destination, 6, len(head) + len(payload)) + head + payload)
    head = head[:16] + struct.pack("!H", (check + corrupt) & 0xFFFF) + head[18:]
    return ip_packet(source, destination, 6, head + payload)


def udp_packet(source: bytes, destination: bytes, ports: tuple[int, int], payload: bytes, **fields: int) -> bytes:
    """fields: check (in place of the right one), length (in place of the right one)."""
    length = 8 + len(payload)
    head = struct.pack("!HHHH", *ports, fields.get("length", length), 0)
    check = naive_checksum(_pseudo(source, destination, 17, length) + head + payload) or 0xFFFF
    head = head[:6] + struct.pack("!H", fields.get("check", check))
    return ip_packet(source, destination, 17, head + payload)


def icmp_packet(source: bytes, destination: bytes, kind: int, code: int, rest: bytes, corrupt: int = 0) -> bytes:
    """rest: everything after the checksum."""
    message = bytes((kind, code, 0, 0)) + rest
    pseudo = _pseudo(source, destination, 58, len(message)) if len(source) == 16 else b""
    check = (naive_checksum(pseudo + message) + corrupt) & 0xFFFF
    return ip_packet(source, destination, 58 if pseudo else 1, message[:2] + struct.pack("!H", check) + message[4:])


def pack_options(
    mss: int | None = None,
    wscale: int | None = None,
    sack_ok: bool = False,
    ts: tuple[int, int] | None = None,
    sack: Iterable[tuple[int, int]] = (),
) -> bytes:
    out = b""
    if mss is not None:
        out += struct.pack("!BBH", 2, 4, mss)
    if sack_ok:
        out += bytes((4, 2))
    if ts is not None:
        out += struct.pack("!BBII", 8, 10, ts[0] & MASK, ts[1] & MASK)
    if wscale is not None:
        out += bytes((3, 3, wscale))
    blocks = b"".join(struct.pack("!II", left & MASK, right & MASK) for left, right in sack)
    if blocks:
        out += bytes((5, 2 + len(blocks))) + blocks
    return b"\1" * (-len(out) % 4) + out


@dataclass(frozen=True)
class Segment:
    """A TCP segment as the stack sent it; seq and ack as on the wire."""

    destination: bytes
    port: int
    seq: int
    ack: int
    flags: int
    window: int
    payload: bytes
    gso_size: int
    options: dict[str, Any] = field(default_factory=dict)


def complete(raw: bytes) -> bytes:
    """Take the virtio_net_hdr off and do what it asks for: fill in the checksum of which only the pseudo-header's part
    is there. Then let scapy build the same packet and compare."""
    flags, _, _, _, start, offset = VNET.unpack_from(raw)
    packet = raw[VNET.size :]
    if flags & NEEDS_CSUM:
        at = start + offset
        check = naive_checksum(packet[start:])
        if not check and packet[start - 11 if packet[0] >> 4 == 4 else 6] == 17:
            check = 0xFFFF
        packet = packet[:at] + struct.pack("!H", check) + packet[at + 2 :]
    _agree_with_scapy(packet)
    return packet


def _agree_with_scapy(packet: bytes) -> None:
    """Let scapy fill in lengths and checksums anew. Of a fragment only the IP header can be judged."""
    whole = IPv6(packet) if packet[0] >> 4 == 6 else IP(packet)
    if whole.nh == 44 if packet[0] >> 4 == 6 else whole.frag or whole.flags.MF:
        whole.remove_payload()
        whole.add_payload(Raw(packet[40 if packet[0] >> 4 == 6 else 20 :]))
    layer = whole
    while layer.name not in ("NoPayload", "Raw"):
        for name in ("chksum", "cksum", "len", "plen"):
            if name in layer.fields:
                delattr(layer, name)
        if isinstance(layer, ICMP) or layer.name.startswith("ICMPv6"):
            break  # what follows is a quotation, cut off
        layer = layer.payload
    assert bytes(whole) == packet, "scapy would have built this packet differently"


def read_tcp(raw: bytes) -> Segment:
    """Read what the stack sent, and check everything about it that does not depend on the conversation."""
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = VNET.unpack_from(raw)
    packet = complete(raw)
    whole = IPv6(packet) if packet[0] >> 4 == 6 else IP(packet)
    ip_length = 40 if packet[0] >> 4 == 6 else whole.ihl * 4
    tcp = whole[TCP]
    payload = packet[ip_length + tcp.dataofs * 4 :]
    assert flags == NEEDS_CSUM
    assert (csum_start, csum_offset) == (ip_length, 16)
    if gso_type:
        assert gso_type == (_GSO_TCPV6 if ip_length == 40 else _GSO_TCPV4)
        assert hdr_len == ip_length + tcp.dataofs * 4
        assert len(payload) > gso_size > 0
        assert len(packet) <= 65535
    else:
        assert not gso_size
    destination = packet[24:40] if ip_length == 40 else packet[16:20]
    return Segment(
        destination, tcp.dport, tcp.seq, tcp.ack, int(tcp.flags), tcp.window, payload, gso_size, _read_options(tcp)
    )


def _read_options(tcp: TCP) -> dict[str, Any]:
    names = {"MSS": "mss", "WScale": "wscale", "SAckOK": "sack_ok", "Timestamp": "ts", "SAck": "sack"}
    options = {names[name]: value for name, value in tcp.options if name in names}
    if "sack_ok" in options:
        options["sack_ok"] = True
    if "sack" in options:
        numbers = options["sack"]
        options["sack"] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return options


def read_udp(raw: bytes) -> tuple[int, int, bytes]:
    """(source port, destination port, payload)."""
    packet = complete(raw)
    whole = IPv6(packet) if packet[0] >> 4 == 6 else IP(packet)
    udp = whole[UDP]
    return udp.sport, udp.dport, bytes(udp.payload)


def read_icmp(raw: bytes) -> tuple[int, int, bytes]:
    """(type, code, everything after the checksum)."""
    packet = complete(raw)
    message = packet[40:] if packet[0] >> 4 == 6 else packet[20:]
    return message[0], message[1], message[4:]
