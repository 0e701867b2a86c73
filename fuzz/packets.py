"""Valid packets to begin with, and a check of those that come out. Written without ztun.wire."""

from __future__ import annotations

import struct

CLIENTS = {4: bytes([10, 0, 0, 2]), 6: bytes([0xFD] + [0] * 14 + [2])}
SERVERS = {4: bytes([192, 0, 2, 7]), 6: bytes.fromhex("20010db8000000000000000000000007")}
VNET = struct.Struct("=BBHHHH")
_TCP, _UDP = 6, 17
_PLACES = {_TCP: 16, _UDP: 6, 1: 2, 58: 2}  # of the checksum in the transport header


def naive_sum(data: bytes) -> int:
    """RFC 1071, word by word."""
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def _pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    return source + destination + struct.pack("!II", length, protocol)


def transport(family: int, protocol: int, body: bytes) -> bytes:
    """The body with its checksum filled in; it must be 0 there."""
    place = _PLACES[protocol]
    if len(body) < place + 2:
        return body
    pseudo = b"" if protocol == 1 else _pseudo(CLIENTS[family], SERVERS[family], protocol, len(body))
    check = naive_sum(pseudo + body) ^ 0xFFFF
    return body[:place] + struct.pack("!H", check) + body[place + 2 :]


def ip(family: int, protocol: int, payload: bytes, fragment: int = 0, extensions: bytes = b"") -> bytes:
    """From the client to the server. fragment: the word of the IPv4 header; extensions: IPv6 headers, ready made, of
    which the last names the protocol; `protocol` is then the first of them."""
    source, destination = CLIENTS[family], SERVERS[family]
    if family == 6:
        length = len(extensions) + len(payload)
        return struct.pack("!IHBB", 0x60000000, length, protocol, 64) + source + destination + extensions + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, fragment, 64, protocol, 0) + source + destination
    return head[:10] + struct.pack("!H", naive_sum(head) ^ 0xFFFF) + head[12:] + payload


def tcp(
    family: int, ports: tuple[int, int], seq: int, ack: int, flags: int, window: int, options: bytes, payload: bytes
) -> bytes:
    options = options[:40] + bytes(-len(options[:40]) % 4)
    words = (20 + len(options)) // 4 << 12 | flags
    head = struct.pack("!HHIIHHHH", *ports, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, words, window, 0, 0)
    return ip(family, _TCP, transport(family, _TCP, head + options + payload))


def udp(family: int, ports: tuple[int, int], payload: bytes) -> bytes:
    head = struct.pack("!HHHH", *ports, 8 + len(payload), 0)
    return ip(family, _UDP, transport(family, _UDP, head + payload))


def icmp(family: int, kind: int, code: int, rest: bytes) -> bytes:
    protocol = 1 if family == 4 else 58
    return ip(family, protocol, transport(family, protocol, bytes((kind, code, 0, 0)) + rest))


def check(raw: bytes) -> None:
    """What the stack sent is a packet that every receiver takes: lengths, checksums, fields of the virtio_net_hdr."""
    flags, gso_type, hdr_len, gso_size, start, offset = VNET.unpack_from(raw)
    packet = raw[VNET.size :]
    if packet[0] >> 4 == 4:
        at, protocol, addresses = 20, packet[9], packet[12:20]
        assert packet[0] == 0x45
        assert struct.unpack_from("!H", packet, 2)[0] == len(packet)
        assert naive_sum(packet[:20]) == 0xFFFF
        fragment = struct.unpack_from("!H", packet, 6)[0] & 0x3FFF
    else:
        at, protocol, addresses = 40, packet[6], packet[8:40]
        assert packet[0] >> 4 == 6
        assert struct.unpack_from("!H", packet, 4)[0] == len(packet) - 40
        fragment = protocol == 44
    if fragment:
        return
    body = packet[at:]
    pseudo = b"" if protocol == 1 else addresses + struct.pack("!II", len(body), protocol)
    if flags:
        assert (flags, start, offset) == (1, at, _PLACES[protocol])
        assert body[offset : offset + 2] == struct.pack("!H", naive_sum(pseudo))
    else:
        assert protocol in (1, 58) or len(body) < 65536
        assert naive_sum(pseudo + body) == 0xFFFF
    if protocol == _TCP:
        header = body[12] >> 4 << 2
        assert 20 <= header <= len(body)
        if gso_type:
            assert hdr_len == at + header
            assert 0 < gso_size < len(body) - header
