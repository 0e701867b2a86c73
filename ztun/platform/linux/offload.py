"""Connections that the kernel carries: the Python half of carry_up and carry_down in bpf/classify.c.

A connection to a proxy is taken from the kernel's TCP by asking it where it is (TCP_REPAIR, tcp(7)), and by having its
socket believe nothing any more: a filter drops what comes for it. The socket stays, and with it its port is nobody
else's. From then on BPF makes each segment of the client's connection one of the proxy's, and the other way round.

docs/offload.md tells which connections these are.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import socket
import struct
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import structlog

from ztun.platform.linux import bpfcall, links, tables
from ztun.platform.linux.hooks import Hook
from ztun.platform.linux.host import MakeHook
from ztun.platform.linux.layout import CLIENT, FLOW, U32, Shared
from ztun.platform.linux.maps import Map
from ztun.platform.linux.netlink import NetlinkError, explain
from ztun.ports import Progress
from ztun.wire import checksum, ip, tcp
from ztun.wire.handshake import Offer, Terms

log = structlog.get_logger("ztun.classifier")

# struct splice of bpf/shared.h: what is written once, and what the programs write.
_FIXED = struct.Struct("=16s16s16s16s2s2s2s2sIIIIBBBB")
_GROWING = struct.Struct("=2B2BBBxxIIxxxxQQQIIQQQII")
SPLICE_SIZE = _FIXED.size + _GROWING.size
_NOTHING: Final = (0,) * 11

PROGRAMS = ("carry_up", "carry_down")
# Map name -> (key size, value size in bytes, kind as `bpftool map` names it).
MAPS = {
    "carried": (FLOW.size, U32.size, "hash"),
    "splices": (U32.size, SPLICE_SIZE, "array"),
    "ended": (0, U32.size, "queue"),
    "jumps": (U32.size, U32.size, "prog_array"),
}
_HOOKED = "carry_down"
_FIRST = U32.pack(0)

# linux/tcp.h.
_TCP: Final = socket.IPPROTO_TCP
_REPAIR, _REPAIR_QUEUE, _QUEUE_SEQ, _TIMESTAMP = 19, 20, 21, 24
_RECEIVE_QUEUE, _SEND_QUEUE = 1, 2
_REPAIR_OFF = -1  # without a window probe
_INFO_SIZE: Final = 232
_ESTABLISHED: Final = 1
_HAS_STAMPS, _HAS_SACK, _HAS_SCALE, _HAS_ECN, _SYN_DATA = 1, 2, 4, 8 | 16, 32
# State, options, window scales; snd_mss, unacked, advmss; notsent_bytes; snd_wnd.
_INFO = struct.Struct("=B4xBBx8xI4xI56xI56xI80xI")
# linux/filter.h: one instruction, BPF_RET | BPF_K with 0, which keeps nothing of any packet.
_DEAF = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0), 8)
_FILTER = struct.pack("@HP", 1, ctypes.addressof(_DEAF))
_ATTACH_FILTER, _DETACH_FILTER = 26, 27  # asm-generic/socket.h
_MASK: Final = 0xFFFFFFFF
_MOST_LOOKUPS: Final = 16  # between two changes of the network
_RST_HOPS: Final = 64


class _Upstream(NamedTuple):
    """What the kernel says of a connection to a proxy. Numbers are those of the next segments."""

    number: int
    expected: int
    mss: int
    own_mss: int
    scale: int
    own_scale: int
    scaled: bool
    sack: bool
    stamp: int | None
    window: int


class _Place(NamedTuple):
    """What belongs to a place: the two keys, and where a reset would have to go."""

    keys: tuple[bytes, bytes]
    local: bytes
    proxy: bytes
    ports: bytes
    offset: int


class KernelOffload:
    """A ztun.ports.Offload.

    mark: of our own packets. Its programs take up no packet before `follow` told where proxies are.
    """

    def __init__(
        self,
        programs: Mapping[str, int],
        maps: Mapping[str, int],
        shared: Shared,
        make_hook: MakeHook,
        mark: int,
    ) -> None:
        """Raises OSError."""
        self._programs = programs
        self._make_hook = make_hook
        self._carried = Map(maps["carried"], *MAPS["carried"][:2])
        self._ended = _Queue(maps["ended"])
        self._pairs = _Pairs(maps["carried"])
        self._clients = _Clients(maps["clients"])
        self._is_ethernet: dict[int, bool] = {}  # by the index of an interface
        self._most = shared.constants["MAX_SPLICES"]
        self._memory = mmap.mmap(maps["splices"], self._most * SPLICE_SIZE)
        self._free: list[int] = []
        self._used = 0
        self._places: dict[int, _Place] = {}
        self._ways: dict[str, str] = {}  # address of a proxy -> interface
        self._looked_up = 0  # addresses that nobody told of
        self._mark = mark
        self._hooks: dict[str, tuple[int, Hook]] = {}  # interface -> its index and what is attached there
        self._raw = {family: _raw_socket(family, mark) for family in (socket.AF_INET, socket.AF_INET6)}
        self.refused = 0  # connections that did not fit together
        Map(maps["jumps"], *MAPS["jumps"][:2]).update(_FIRST, U32.pack(programs["carry_up"]))

    # Where proxies are.

    def follow(self, ways: Mapping[str, str]) -> None:
        """See ztun.ports.Offload.follow. Connections go on by another interface when their proxy is reached by it."""
        self._ways = dict(ways)
        self._is_ethernet.clear()
        self._looked_up = 0
        for ifname in [ifname for ifname, (index, _) in self._hooks.items() if links.index_of(ifname) != index]:
            self._let_go(ifname)
        for ifname in set(self._ways.values()) - self._hooks.keys():
            self._attach(ifname)
        known = {what.proxy for what in self._places.values()}
        indices = {proxy: self._uplink(tables.show_address(proxy)) for proxy in known}
        for place, what in self._places.items():
            index = indices[what.proxy]
            if index is not None:
                struct.pack_into("=I", self._memory, place * SPLICE_SIZE + _UPLINK, index)

    def _attach(self, ifname: str) -> None:
        """What cannot be had is no loss: connections by that interface stay with us."""
        index = links.index_of(ifname)
        if index is None or ifname == "lo" or not links.has_link_header(index):
            return
        try:
            self._hooks[ifname] = index, self._make_hook(_HOOKED, self._programs[_HOOKED], ifname)
        except (NetlinkError, OSError) as error:
            what = explain(error) if isinstance(error, NetlinkError) else error.strerror
            log.warning("the kernel cannot carry connections by an interface", interface=ifname, reason=what)

    def _let_go(self, ifname: str) -> None:
        _, hook = self._hooks.pop(ifname)
        try:
            hook.close()
        except (NetlinkError, OSError) as error:
            log.warning("program not detached", error=str(error), **hook.describe())

    def _has_link_header(self, index: int) -> bool:
        """Of an interface without, `capture_l3` takes the packets, which carries none of them on."""
        known = self._is_ethernet.get(index)
        if known is None:
            known = self._is_ethernet[index] = links.has_link_header(index)
        return known

    def _uplink(self, proxy: str) -> int | None:
        """The index of the interface by which a proxy is reached, where its packets can be had."""
        ifname = self._ways.get(proxy)
        if ifname is None:
            if self._looked_up == _MOST_LOOKUPS:
                return None
            ifname = self._look_up(proxy)
        hooked = self._hooks.get(ifname)
        return hooked[0] if hooked is not None else None

    def _look_up(self, proxy: str) -> str:
        """Ask the kernel, which takes some milliseconds: for a proxy whose name was resolved only now."""
        self._looked_up += 1
        index = links.index_towards(proxy, self._mark)
        ifname = self._ways[proxy] = (links.name_of(index) if index is not None else None) or ""
        if ifname and ifname not in self._hooks:
            self._attach(ifname)
        return ifname

    # Connections.

    def take(self, sock: socket.socket, offer: Offer, stamp: int) -> tuple[int, Terms] | None:
        """See ztun.ports.Offload.take."""
        local, proxy = sock.getsockname(), sock.getpeername()
        uplink = self._uplink(proxy[0])
        family = socket.AF_INET if len(offer.key) == 12 else socket.AF_INET6
        if uplink is None or sock.family != family or not (self._free or self._used < self._most):
            return None
        upstream = _freeze(sock)
        if upstream is None:
            return None
        terms = _agree(offer, upstream)
        if terms is None:
            _thaw(sock)
            self.refused += 1
            return None
        half = (len(offer.key) - 4) // 2
        client, destination = tables.widen(offer.key[:half]), tables.widen(offer.key[half : 2 * half])
        lan = self._clients.interface_of(client)
        if lan is None or not self._has_link_header(lan):
            _thaw(sock)
            return None
        packed_local = tables.widen(socket.inet_pton(family, local[0]))
        packed_proxy = tables.widen(socket.inet_pton(family, proxy[0]))
        client_port, destination_port = offer.key[-4:-2], offer.key[-2:]
        local_port, proxy_port = local[1].to_bytes(2, "big"), proxy[1].to_bytes(2, "big")
        offset = (upstream.number - offer.number) & _MASK
        stamps = (upstream.stamp - offer.stamp) & _MASK if upstream.stamp is not None and offer.stamp is not None else 0
        place = self._free.pop() if self._free else self._used
        at = place * SPLICE_SIZE
        _FIXED.pack_into(
            self._memory, at,
            client, destination, packed_local, packed_proxy, client_port, destination_port, local_port, proxy_port,
            offset, stamps, stamp, uplink,
            offer.scale or 0 if terms.scale is not None else 0, upstream.own_scale, upstream.scale, terms.scale or 0,
        )  # fmt: skip
        _GROWING.pack_into(self._memory, at + _FIXED.size, 0, 0, 0, 0, 0, 0, lan, *_NOTHING)
        up = client + destination + client_port + destination_port
        down = packed_proxy + packed_local + proxy_port + local_port
        try:
            self._pairs.write(up, place << 1, down, place << 1 | 1)
        except OSError:
            if place < self._used:
                self._free.append(place)
            _thaw(sock)
            return None
        self._used = max(self._used, place + 1)
        self._places[place] = _Place((up, down), packed_local, packed_proxy, local_port + proxy_port, offset)
        return place, terms

    def ended(self) -> list[int]:
        """See ztun.ports.Offload.ended."""
        found = []
        while (place := self._ended.pop()) is not None:
            found.append(place)
        return found

    def read(self, place: int) -> Progress:
        """See ztun.ports.Offload.read."""
        (
            _, _, reset_up, reset_down, closed, _, _, _,
            packets_up, up, last_up, nxt, _, packets_down, down, last_down, acknowledged, _,
        ) = _GROWING.unpack_from(self._memory, place * SPLICE_SIZE + _FIXED.size)  # fmt: skip
        return Progress(
            up,
            down,
            packets_up > 0,
            bool(closed or reset_up or reset_down),
            "client" if reset_up else "proxy" if reset_down else "",
            packets_up + packets_down,
            max(last_up, last_down) / 1e9,
            nxt,
            acknowledged,
        )

    def release(self, places: Sequence[int]) -> None:
        """See ztun.ports.Offload.release."""
        gone = [self._places.pop(place) for place in places]
        self._carried.delete_many(key for what in gone for key in what.keys)
        self._free.extend(places)

    def reset(self, place: int) -> None:
        """See ztun.ports.Offload.reset: a RST with the number that the proxy expects (RFC 9293 section 3.10.7.4)."""
        what, progress = self._places[place], self.read(place)
        if not progress.rcv_nxt:
            return
        number, expected = (progress.rcv_nxt + what.offset) & _MASK, progress.nxt
        local, proxy = tables.narrow(what.local), tables.narrow(what.proxy)
        segment = what.ports + struct.pack("!IIHHHH", number, expected, 0x5000 | tcp.RST | tcp.ACK, 0, 0, 0)
        total = checksum.ones_sum(segment, checksum.pseudo_sum(local + proxy, ip.TCP, len(segment)))
        segment = segment[:16] + checksum.finish(total).to_bytes(2, "big") + segment[18:]
        raw = self._raw[socket.AF_INET if len(proxy) == 4 else socket.AF_INET6]
        packet = ip.header(local, proxy, ip.TCP, len(segment), _RST_HOPS) + segment
        try:
            raw.sendto(packet, (tables.show_address(proxy), 0))
        except OSError as error:
            log.debug("a proxy was not told of a reset", reason=error.strerror)

    # Facts.

    def programs(self) -> list[dict[str, Any]]:
        """As in Classifier.snapshot."""
        return [hook.describe() for _, hook in self._hooks.values()]

    def describe(self) -> list[dict[str, Any]]:
        """The connections that are carried, for Classifier.snapshot."""
        return list(self._describe())

    def _describe(self) -> Iterator[dict[str, Any]]:
        for place, what in self._places.items():
            progress = self.read(place)
            up, down = (FLOW.unpack(key) for key in what.keys)
            yield {
                "client": tables.show_address(up[0]),
                "client_port": up[2],
                "destination": tables.show_address(up[1]),
                "destination_port": up[3],
                "proxy": tables.show_address(down[0]),
                "proxy_port": down[2],
                "local_port": down[3],
                "up": progress.up,
                "down": progress.down,
            }

    def close(self) -> None:
        """Detach. Idempotent."""
        for ifname in list(self._hooks):
            self._let_go(ifname)
        for raw in self._raw.values():
            raw.close()
        if not self._memory.closed:
            self._memory.close()


_UPLINK: Final = 64 + 8 + 3 * 4


def _raw_socket(family: int, mark: int) -> socket.socket:
    """For whole IP packets (raw(7)). Raises OSError."""
    raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return raw


def _freeze(sock: socket.socket) -> _Upstream | None:
    """Have a socket hear nothing more, and say where its connection is. None, and all as before, when it is not at
    rest: something was said that has not been read, or not been acknowledged.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, _FILTER)
        state, options, scales, mss, unacked, own_mss, unsent, window = _INFO.unpack(
            sock.getsockopt(_TCP, socket.TCP_INFO, _INFO_SIZE)
        )
        unread = fcntl.ioctl(sock.fileno(), termios.FIONREAD, b"\0\0\0\0")
        if state != _ESTABLISHED or unacked or unsent or options & (_HAS_ECN | _SYN_DATA) or unread != b"\0\0\0\0":
            _thaw(sock)
            return None
        sock.setsockopt(_TCP, _REPAIR, 1)
        sock.setsockopt(_TCP, _REPAIR_QUEUE, _SEND_QUEUE)
        number = sock.getsockopt(_TCP, _QUEUE_SEQ) & _MASK
        sock.setsockopt(_TCP, _REPAIR_QUEUE, _RECEIVE_QUEUE)
        expected = sock.getsockopt(_TCP, _QUEUE_SEQ) & _MASK
        stamp = sock.getsockopt(_TCP, _TIMESTAMP) & _MASK if options & _HAS_STAMPS else None
    except OSError:
        _thaw(sock)
        return None
    scaled = bool(options & _HAS_SCALE)
    scale, own_scale = (scales & 15, scales >> 4) if scaled else (0, 0)
    return _Upstream(number, expected, mss, own_mss, scale, own_scale, scaled, bool(options & _HAS_SACK), stamp, window)


def _thaw(sock: socket.socket) -> None:
    """Undo `_freeze`."""
    for level, option, value in (
        (_TCP, _REPAIR, _REPAIR_OFF),
        (socket.SOL_SOCKET, _DETACH_FILTER, 0),
    ):
        try:
            sock.setsockopt(level, option, value)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EPERM):
                log.debug("a connection was not given back", reason=error.strerror)


def _agree(offer: Offer, upstream: _Upstream) -> Terms | None:
    """What both can live with, None where they cannot: neither end may get what it did not agree to."""
    if upstream.stamp is not None and offer.stamp is None:
        return None  # the proxy waits for timestamps (RFC 7323 section 3.2)
    if upstream.sack and not offer.sack:
        return None
    if upstream.own_mss > offer.mss:
        return None  # the proxy sends more than the client takes
    stamps = upstream.stamp is not None
    mss = upstream.mss + (12 if stamps else 0)
    scale = upstream.scale if offer.scale is not None else None
    return Terms(upstream.expected, mss, scale, upstream.sack, stamps, upstream.window)


class _Pairs:
    """Writes two entries of `carried` with one system call."""

    def __init__(self, fd: int) -> None:
        self._keys = ctypes.create_string_buffer(2 * FLOW.size)
        self._values = ctypes.create_string_buffer(2 * U32.size)
        addresses = ctypes.addressof(self._keys), ctypes.addressof(self._values)
        self._attributes = struct.pack("=QQQQIIQQ", 0, 0, *addresses, 2, fd, 0, 0)
        self._attr = ctypes.create_string_buffer(self._attributes, bpfcall.ATTR_SIZE)

    def write(self, key: bytes, value: int, other_key: bytes, other_value: int) -> None:
        """Raises OSError."""
        self._keys.raw = key + other_key
        struct.pack_into("=II", self._values, 0, value, other_value)
        struct.pack_into("=I", self._attr, 32, 2)
        bpfcall.bpf(bpfcall.MAP_UPDATE_BATCH, self._attr)


class _Clients:
    """Reads the map `clients`."""

    def __init__(self, fd: int) -> None:
        self._key, self._value = ctypes.create_string_buffer(16), ctypes.create_string_buffer(CLIENT.size)
        addresses = ctypes.addressof(self._key), ctypes.addressof(self._value)
        self._attr = bpfcall.attributes("=I4xQQQ", fd, *addresses, 0)

    def interface_of(self, client: bytes) -> int | None:
        """The index of the interface by which packets of a client (16 bytes) came in last."""
        self._key.raw = client
        try:
            bpfcall.bpf(bpfcall.MAP_LOOKUP_ELEM, self._attr)
        except OSError:
            return None
        return int.from_bytes(self._value.raw[:4], sys.byteorder)


class _Queue:
    """A BPF_MAP_TYPE_QUEUE of u32."""

    def __init__(self, fd: int) -> None:
        self._value = ctypes.create_string_buffer(U32.size)
        self._attr = bpfcall.attributes("=I4xQQQ", fd, 0, ctypes.addressof(self._value), 0)

    def pop(self) -> int | None:
        """The oldest; None when there is none."""
        try:
            bpfcall.bpf(bpfcall.MAP_LOOKUP_AND_DELETE_ELEM, self._attr)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return int(U32.unpack(self._value.raw)[0])
