"""Messages of macOS's routing sockets, made as XNU's headers lay them out: struct rt_msghdr in bsd/net/route.h, struct
if_msghdr and ifa_msghdr in bsd/net/if.h, sockaddr_dl in bsd/net/if_dl.h. Written from the headers, not recorded on a
Mac. Field by field, and with no code of ztun's, so that a mistake of one side is no mistake of the other.
"""

from __future__ import annotations

import socket
import struct

AF_INET, AF_LINK, AF_INET6 = 2, 18, 30
RTM_ADD, RTM_DELETE, RTM_GET, RTM_NEWADDR, RTM_DELADDR, RTM_IFINFO = 1, 2, 4, 0xC, 0xD, 0xE
DST, GATEWAY, NETMASK, IFP, IFA, BRD = 0x1, 0x2, 0x4, 0x10, 0x20, 0x80
UP, HAS_GATEWAY, HOST, LLINFO, STATIC, WASCLONED, IFSCOPE = 1, 2, 4, 0x400, 0x800, 0x20000, 0x1000000


def sockaddr(address: str) -> bytes:
    """struct sockaddr_in (16 bytes) or sockaddr_in6 (28 bytes)."""
    if ":" in address:
        return struct.pack("=BBHI", 28, AF_INET6, 0, 0) + socket.inet_pton(socket.AF_INET6, address) + bytes(4)
    return struct.pack("=BBH", 16, AF_INET, 0) + socket.inet_pton(socket.AF_INET, address) + bytes(8)


def sockaddr_dl(index: int, name: str = "", lladdr: bytes = b"") -> bytes:
    """struct sockaddr_dl: len, family, index, type (6: Ethernet), nlen, alen, slen, data of at least 12 bytes."""
    data = (name.encode() + lladdr).ljust(12, b"\0")
    return struct.pack("=BBHBBBB", 8 + len(data), AF_LINK, index, 6, len(name), len(lladdr), 0) + data


def netmask(length: int, family: int) -> bytes:
    """A mask as the kernel keeps it: trailing zeros cut off, len says where; len 0 for none at all."""
    at, size = (4, 4) if family == AF_INET else (8, 16)
    bits = ((1 << length) - 1) << (size * 8 - length)
    octets = bits.to_bytes(size, "big").rstrip(b"\0")
    if not octets:
        return b"\0"
    return bytes((at + len(octets), family)) + bytes(at - 2) + octets


def padded(sockaddrs: list[bytes]) -> bytes:
    """ROUNDUP32 of bsd/net/rtsock.c: to a multiple of 4 bytes, and 4 for a length of 0."""
    return b"".join(one.ljust((len(one) + 3) // 4 * 4, b"\0") for one in sockaddrs)


def rt_msghdr(kind: int, index: int, flags: int, named: dict[int, bytes], error: int = 0) -> bytes:
    """rtm_msglen, version 5, type, index, 2 bytes of padding, flags, addrs, pid, seq, errno, use, inits, 14 metrics."""
    body = padded([named[bit] for bit in sorted(named)])
    fields = struct.pack("=iiiiiiI", flags, sum(named), 4711, 1, error, 0, 0) + bytes(14 * 4)
    return struct.pack("=HBBHH", 92 + len(body), 5, kind, index, 0) + fields + body


def if_msghdr(index: int, flags: int, name: str | None) -> bytes:
    """ifm_msglen, version, type, addrs, flags, index, 2 bytes of padding, struct if_data (96 bytes)."""
    body = padded([sockaddr_dl(index, name)]) if name is not None else b""
    fields = struct.pack("=iiHH", IFP if name is not None else 0, flags, index, 0) + b"\xaa" * 96
    return struct.pack("=HBB", 112 + len(body), 5, RTM_IFINFO) + fields + body


def ifa_msghdr(kind: int, index: int, address: str, length: int) -> bytes:
    """ifam_msglen, version, type, addrs, flags, index, 2 bytes of padding, metric; then netmask, address, broadcast."""
    family = AF_INET6 if ":" in address else AF_INET
    body = padded([netmask(length, family), sockaddr(address), sockaddr(address)])
    fields = struct.pack("=iiHHi", NETMASK | IFA | BRD, 0, index, 0, 0)
    return struct.pack("=HBB", 20 + len(body), 5, kind) + fields + body


def route(
    network: str, length: int, index: int, gateway: str | None = None, flags: int = UP | STATIC, kind: int = RTM_GET
) -> bytes:
    """A route of a dump, to a network through a gateway or through the interface `index` itself."""
    family = AF_INET6 if ":" in network else AF_INET
    named = {DST: sockaddr(network), NETMASK: netmask(length, family)}
    named[GATEWAY] = sockaddr(gateway) if gateway else sockaddr_dl(index)
    if length == (32 if family == AF_INET else 128):
        flags |= HOST
        del named[NETMASK]
    return rt_msghdr(kind, index, flags | (HAS_GATEWAY if gateway else 0), named)
