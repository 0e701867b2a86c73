"""Connections that the kernel carries: the Python half of carry_up and carry_down in bpf/classify.c.

A connection to a proxy is taken from the kernel's TCP (frozen.py). Its socket stays, and with it its port is nobody
else's. From then on BPF makes each segment of the client's connection one of the proxy's, and the other way round.

docs/offload.md tells which connections these are.
"""

from __future__ import annotations

import mmap
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import structlog

from ztun.platform.linux import links, tables
from ztun.platform.linux.clients import Clients
from ztun.platform.linux.frozen import Upstream, agree, deafen, dissolve, freeze, thaw
from ztun.platform.linux.hooks import Hook, detach
from ztun.platform.linux.host import MakeHook
from ztun.platform.linux.layout import FLOW, U32, Shared
from ztun.platform.linux.mapped import Carried, News
from ztun.platform.linux.maps import Map
from ztun.platform.linux.netlink import NetlinkError, explain
from ztun.platform.linux.path_errors import PathErrors
from ztun.platform.linux.transforms import has_policies
from ztun.ports import Progress, Spares
from ztun.wire import checksum, ip, tcp
from ztun.wire.handshake import Offer, Terms

log = structlog.get_logger("ztun.classifier")

# struct splice of bpf/shared.h: addresses and ports, what is written once besides, and what the programs write.
_ENDS_SIZE: Final = 4 * 16 + 4 * 2
_GROWING = struct.Struct("=2B2BBBxxIIxxxxQQQIIIIQQQIIII")
# Behind addresses and ports, at the beginning: of what grows only `lan` is known.
_FRESH = struct.Struct("=IIIIBBBB8xI88x")
SPLICE_SIZE = _ENDS_SIZE + _FRESH.size
_GROWING_AT: Final = SPLICE_SIZE - _GROWING.size
# Offsets in struct splice: of `stamps` and what follows, of `uplink`, of `lan`.
_STAMPS_AT: Final = _ENDS_SIZE + 4
_UPLINK_AT: Final = _STAMPS_AT + 2 * 4
_LAN_AT: Final = _GROWING_AT + 8
_PACKETS_UP_AT: Final = _GROWING_AT + 20
# The same in words of four bytes, and of eight.
_WORDS: Final = SPLICE_SIZE // 4
_UPLINK: Final = _UPLINK_AT // 4
_LAN: Final = _LAN_AT // 4
_COUNTS: Final = SPLICE_SIZE // 8
_PACKETS_UP: Final = _PACKETS_UP_AT // 8
_STAMPS = struct.Struct("=II")  # stamps, base
_BACK, _UP_STAMP, _DOWN_STAMP = 7, 14, 21  # among the fields of _GROWING

PROGRAMS = ("carry_up", "carry_down")
# Map name -> (key size, value size in bytes, kind as `bpftool map` names it).
MAPS = {
    "carried": (U32.size, 32, "array"),
    "splices": (U32.size, SPLICE_SIZE, "array"),
    "ended": (U32.size, 32768, "array"),
    "jumps": (U32.size, U32.size, "prog_array"),
}
_HOOKED = "carry_down"
_FIRST = U32.pack(0)

_MASK: Final = 0xFFFFFFFF
_LOOKUP_INTERVAL: Final = 0.1  # seconds between two questions to the kernel, each of which takes some milliseconds
_MOST_WAYS: Final = 4096
_STAMPING: Final = 60.0  # seconds for which it is remembered that a proxy's connections have timestamps
_MOST_DOUBTS: Final = 3
_LOOK_INTERVAL: Final = 1.0  # seconds between looks at policies of IPsec
_MOST_LANS: Final = 4096
_RESTING: Final = 512  # places that are free and are not taken, as long as there are others
_KEY4: Final = 12  # bytes of the key of an IPv4 flow
_FIN_WINDOW: Final = 512  # of a segment that asks for nothing
_MAPPED: Final = bytes(10) + b"\xff\xff"
_PORTS = struct.Struct("!HH")
_RST_HOPS: Final = 64


class _Way(NamedTuple):
    """How a proxy is reached: its address (16 bytes), and the index of the interface."""

    address: bytes
    uplink: int


class _Place:
    """What belongs to a place. up, down: the keys of its flows, and slots, where they are entered; ports: of a segment
    to the proxy; offset: from the client's sequence numbers to those that the proxy has. number, expected: of the first
    segments from us and from the proxy, as it has them.
    """

    __slots__ = ("down", "expected", "local", "number", "offset", "ports", "proxy", "slots", "sock", "up")

    def __init__(
        self, up: bytes, down: bytes, slots: tuple[int, int], sock: socket.socket, local: bytes, proxy: bytes,
        ports: bytes, offset: int, number: int, expected: int,
    ) -> None:  # fmt: skip
        self.up = up
        self.down = down
        self.slots = slots
        self.sock = sock
        self.local = local
        self.proxy = proxy
        self.ports = ports
        self.offset = offset
        self.number = number
        self.expected = expected


_UNKNOWN = _Way(b"", 0)


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
        constants = shared.constants
        self._carried = Carried(maps["carried"], constants["CARRIED_BUCKETS"], constants["CARRIED_SLOTS"])
        self._clients = Clients(maps["clients"])
        self._is_ethernet: dict[int, bool] = {}  # by the index of an interface
        self._most = constants["MAX_SPLICES"]
        self._ended = News(maps["ended"], self._most)
        self._memory = mmap.mmap(maps["splices"], self._most * SPLICE_SIZE)
        self._words, self._counts = memoryview(self._memory).cast("I"), memoryview(self._memory).cast("Q")
        self._free: deque[int] = deque()  # in the order in which they became so
        self._used = 0
        self._places: dict[int, _Place] = {}
        self._interfaces: dict[str, str] = {}  # address of a proxy -> name of the interface, as we were told
        self._ways: dict[str, _Way | None] = {}
        self._next_lookup = 0.0  # when the kernel may be asked of an address that nobody told of
        self._stamping: dict[str, float] = {}  # proxies that do not fit clients without timestamps -> until when
        self._doubts: dict[bytes, int] = {}  # a proxy -> connections that it reset at once, one after the other
        self._next_look = 0.0
        self._transformed = False
        self._lans: dict[bytes, int] = {}
        self._packed: dict[str, bytes] = {}  # our own addresses
        self._mark = mark
        self._deaf: set[int] = set()  # descriptors of sockets that hear nothing
        self._hooks: dict[str, tuple[int, Hook]] = {}  # interface -> its index and what is attached there
        self._raw = {family: _raw_socket(family, mark) for family in (socket.AF_INET, socket.AF_INET6)}
        self._errors = PathErrors()
        self.descriptors = self._errors.descriptors
        self.refused = 0  # connections that did not fit together
        self.spares: Spares | None = None
        Map(maps["jumps"], *MAPS["jumps"][:2]).update(_FIRST, U32.pack(programs["carry_up"]))

    # Where proxies and clients are.

    def follow(self, ways: Mapping[str, str]) -> None:
        """See ztun.ports.Offload.follow. Connections go on by another interface when their proxy is reached by it."""
        self._interfaces = dict(ways)
        self._ways.clear()
        self._doubts.clear()
        self._stamping.clear()
        self._lans.clear()
        self._is_ethernet.clear()
        for ifname in [ifname for ifname, (index, _) in self._hooks.items() if links.index_of(ifname) != index]:
            detach([self._hooks.pop(ifname)[1]])
        for ifname in set(ways.values()) - self._hooks.keys():
            self._attach(ifname)
        for place, what in self._places.items():
            way = self._way(tables.show_address(what.proxy))
            if way is not None:
                self._words[place * _WORDS + _UPLINK] = way.uplink
            else:
                deafen(what.sock)
                self._deaf.add(what.sock.fileno())

    def move_lan(self, former: int, index: int) -> None:
        """An interface of clients was made anew and has another index: what they wait for comes by that one."""
        self._lans.clear()
        for place in self._places:
            at = place * _WORDS + _LAN
            if self._words[at] == former:
                self._words[at] = index

    def _attach(self, ifname: str) -> None:
        """What cannot be had is no loss: connections by that interface stay with us."""
        index = links.index_of(ifname)
        if index is None or ifname == "lo" or not self._has_link_header(index):
            return
        try:
            self._hooks[ifname] = index, self._make_hook(_HOOKED, self._programs[_HOOKED], ifname)
        except (NetlinkError, OSError) as error:
            log.warning("the kernel cannot carry connections by an interface", interface=ifname, reason=explain(error))

    def _way(self, proxy: str) -> _Way | None:
        """To a proxy; None where its packets cannot be had."""
        way = self._ways.get(proxy, _UNKNOWN)
        if way is not _UNKNOWN:
            return way
        ifname = self._interfaces.get(proxy)
        if ifname is None:
            now = time.monotonic()
            if now < self._next_lookup:
                return None
            self._next_lookup = now + _LOOKUP_INTERVAL
            ifname = self._look_up(proxy)
        if len(self._ways) == _MOST_WAYS:
            self._ways.clear()
        hooked = self._hooks.get(ifname)
        way = self._ways[proxy] = _Way(_pack(proxy), hooked[0]) if hooked is not None else None
        return way

    def _look_up(self, proxy: str) -> str:
        """The interface towards a proxy whose name was resolved only now, or a destination past all proxies."""
        index = links.index_towards(proxy, self._mark)
        ifname = (links.name_of(index) if index is not None else None) or ""
        if ifname and ifname not in self._hooks:
            self._attach(ifname)
        return ifname

    def _lan(self, client: bytes) -> int | None:
        """The interface by which a client (16 bytes) is reached; None where its packets do not come to `capture`.

        A client that moves is no matter: the programs follow it.
        """
        found = self._lans.get(client)
        if found is None:
            found = self._clients.interface_of(client)
            if found is None or not self._has_link_header(found):
                return None
            if len(self._lans) == _MOST_LANS:
                self._lans.clear()
            self._lans[client] = found
        return found

    def _has_link_header(self, index: int) -> bool:
        known = self._is_ethernet.get(index)
        if known is None:
            try:
                known = links.has_link_header(index)
            except (NetlinkError, OSError):  # it is gone
                known = False
            self._is_ethernet[index] = known
        return known

    # Connections.

    def take(
        self, sock: socket.socket, address: str, port: int, unread: int, offer: Offer, stamp: int
    ) -> tuple[int, Terms] | None:
        """See ztun.ports.Offload.take.

        The connection is entered before it is taken from the kernel's TCP: what comes from then on is dropped until
        the client has answered, and is sent again.
        """
        try:
            if not address:
                address, port = sock.getpeername()[:2]
            local_address, local_port = sock.getsockname()[:2]
        except OSError:  # it is broken already, which the relay will find
            return None
        way = self._way(address)
        key = offer.key
        is_v4 = len(key) == _KEY4
        if way is None or is_v4 == (":" in address) or not (self._free or self._used < self._most):
            return None
        client = _MAPPED + key[:4] if is_v4 else key[:16]
        lan = self._lan(client)
        if lan is None or self._are_transformed() or self._is_refused(address, offer):
            return None
        local = self._packed.get(local_address)
        if local is None:
            local = self._packed[local_address] = _pack(local_address)
        destination = _MAPPED + key[4:8] if is_v4 else key[16:32]
        ports = _PORTS.pack(local_port, port)
        up, down = client + destination + key[-4:], way.address + local + ports[2:] + ports[:2]
        place = self._occupy(client + destination + local + way.address + key[-4:] + ports)
        slots = self._carried.enter(up, place, down=False), self._carried.enter(down, place, down=True)
        upstream = freeze(sock, unread) if min(slots) >= 0 else None
        terms = agree(offer, upstream) if upstream is not None else None
        if upstream is None or terms is None:
            self._give_back(place, slots, sock)
            if upstream is not None:
                self._refuse(address, offer, upstream)
            return None
        offset = (upstream.number - offer.number) & _MASK
        stamps = (upstream.stamp - offer.stamp) & _MASK if upstream.stamp is not None and offer.stamp is not None else 0
        told = upstream.scale if offer.scale is not None else 0
        _FRESH.pack_into(
            self._memory, place * SPLICE_SIZE + _ENDS_SIZE,
            offset, stamps, stamp, way.uplink, offer.scale or 0, upstream.own_scale, upstream.scale, told, lan,
        )  # fmt: skip
        self._places[place] = _Place(
            up, down, slots, sock, local, way.address, ports, offset, upstream.number, upstream.expected
        )
        return place, terms

    def _occupy(self, ends: bytes) -> int:
        """A place for a connection with these addresses and ports, by which the programs know that it is being taken.

        One that runs on another CPU may still look at a place that was left a moment ago.
        """
        place = self._free.popleft() if len(self._free) > _RESTING or self._used == self._most else self._used
        self._used = max(self._used, place + 1)
        at = place * SPLICE_SIZE
        self._words[place * _WORDS + _UPLINK] = 0
        self._memory[at : at + _ENDS_SIZE] = ends
        return place

    def _give_back(self, place: int, slots: tuple[int, int], sock: socket.socket) -> None:
        """Nothing became of it."""
        for slot in slots:
            self._carried.leave(slot)
        self._free.append(place)
        thaw(sock)

    def _is_refused(self, address: str, offer: Offer) -> bool:
        """Whether it is known already that a proxy wants timestamps of a client that has none, as Windows."""
        if offer.stamp is not None or self._stamping.get(address, 0.0) < time.monotonic():
            return False
        self.refused += 1
        return True

    def _refuse(self, address: str, offer: Offer, upstream: Upstream) -> None:
        """The two ends did not agree."""
        self.refused += 1
        if offer.stamp is None and upstream.stamp is not None:
            if len(self._stamping) == _MOST_WAYS:
                self._stamping.clear()
            self._stamping[address] = time.monotonic() + _STAMPING

    def ended(self) -> list[int]:
        """See ztun.ports.Offload.ended."""
        return self._ended.take()

    def read(self, place: int) -> Progress:
        """See ztun.ports.Offload.read."""
        (
            _, _, reset_up, reset_down, closed, _, _, _,
            packets_up, up, last_up, acknowledged, end_up, _, _,
            packets_down, down, last_down, expected, end_down, _, _,
        ) = _GROWING.unpack_from(self._memory, place * SPLICE_SIZE + _GROWING_AT)  # fmt: skip
        known = (
            up,
            down,
            packets_up > 0,
            bool(closed or reset_up or reset_down),
            "client" if reset_up else "proxy" if reset_down else "",
            packets_up + packets_down,
            max(last_up, last_down) / 1e9,
            acknowledged,
            end_down if packets_down else acknowledged,
            expected if packets_down else 0,
            end_up,
        )
        return tuple.__new__(Progress, known)  # past a function that is interpreted

    def is_heard(self, place: int) -> bool:
        """See ztun.ports.Offload.is_heard."""
        return self._counts[place * _COUNTS + _PACKETS_UP] != 0

    def release(self, places: Sequence[int]) -> None:
        """See ztun.ports.Offload.release."""
        for place in places:
            self._judge(place)
            what = self._places.pop(place)
            for slot in what.slots:
                self._carried.leave(slot)
            self._free.append(place)

    def spare(self, sock: socket.socket) -> bool:
        """See ztun.ports.Offload.spare."""
        if sock.fileno() in self._deaf:
            self._deaf.remove(sock.fileno())
            return False
        return self.spares is not None and dissolve(sock) and self.spares.keep(sock)

    def _judge(self, place: int) -> None:
        """A proxy that knows nothing of what we send in its connection resets it at once: something between us gives
        our packets another source, and not those that are carried. After a few of these ztun carries by itself."""
        proxy, progress = self._places[place].proxy, self.read(place)
        if progress.down:
            self._doubts.pop(proxy, None)
        elif progress.reset == "proxy":
            doubts = self._doubts[proxy] = self._doubts.get(proxy, 0) + 1
            if doubts == _MOST_DOUBTS:
                address = tables.show_address(proxy)
                self._ways[address] = None
                log.warning(
                    "the kernel carries no more connections to a proxy that reset all of them",
                    proxy=address,
                    remedy="look for a rule that gives packets of this host another source (SNAT)",
                )

    def _are_transformed(self) -> bool:
        """Whether packets of this host are encrypted on their way out, which those that are carried would not be."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + _LOOK_INTERVAL
            try:
                transformed = has_policies()
            except OSError as error:
                transformed = True
                log.debug("no count of IPsec policies", reason=error.strerror)
            if transformed and not self._transformed:
                log.info("the kernel carries no connections, ztun does", reason="this host has policies of IPsec")
            self._transformed = transformed
        return self._transformed

    def too_big(self, descriptor: int) -> list[tuple[int, int, int]]:
        """See ztun.ports.Offload.too_big. Only a segment that is on its way can have been too big (RFC 5927, 4.1)."""
        found = []
        for error in self._errors.read(descriptor):
            place = self._place_of(error.flow)
            if place is None:
                continue
            progress = self.read(place)
            number = (error.number - self._places[place].offset) & _MASK
            if (number - progress.expected) & _MASK < (progress.received - progress.expected) & _MASK:
                found.append((place, number, error.mtu))
        return found

    def _place_of(self, down: bytes) -> int | None:
        """Where the flow of a proxy's packets is carried; None where it is not."""
        for place in self._carried.likely(down, down=True):
            what = self._places.get(place)
            if what is not None and what.down == down:
                return place
        return None

    def reset(self, place: int) -> None:
        """See ztun.ports.Offload.reset: a RST with the number that the proxy expects (RFC 9293 section 3.10.7.4).

        That is what it acknowledged last, or more, if it has got what was sent since.
        """
        what, progress = self._places[place], self.read(place)
        if not progress.heard:
            self._send(what, what.number, what.expected, tcp.RST | tcp.ACK, 0)
            return
        for number in {progress.expected or progress.received, progress.received}:
            self._send(what, (number + what.offset) & _MASK, progress.nxt, tcp.RST | tcp.ACK, 0)

    def finish(self, place: int) -> tuple[int, int] | None:
        """See ztun.ports.Offload.finish.

        Each end takes the FIN for one of the other end. What it answers acknowledges more than that one has sent, and
        is dropped there (RFC 9293 section 3.10.7.4); when that one closes, its own FIN is the same once more.
        """
        what, progress = self._places[place], self.read(place)
        stamps = self._stamps(place, progress.last)
        options = tcp.TIMESTAMPS.pack(tcp.TIMESTAMP_LEAD, *stamps[0]) if stamps is not None else b""
        number = (progress.received + what.offset) & _MASK
        self._send(what, number, progress.nxt, tcp.FIN | tcp.ACK, _FIN_WINDOW, options)
        return stamps[1] if stamps is not None else None

    def _stamps(self, place: int, last: float) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Value and echo of a segment to the proxy now, and of one to the client. last: when the last ones came.

        Clocks of timestamps tick once in a millisecond nearly everywhere (RFC 7323 section 5.4).
        """
        at = place * SPLICE_SIZE
        fields = _GROWING.unpack_from(self._memory, at + _GROWING_AT)
        back, up, down = fields[_BACK], fields[_UP_STAMP], fields[_DOWN_STAMP]
        if not up:
            return None
        stamps, base = _STAMPS.unpack_from(self._memory, at + _STAMPS_AT)
        passed = max(int((time.monotonic() - last) * 1000), 0)
        to_proxy = (up + passed) & _MASK, (down - back) & _MASK if down else 0
        return to_proxy, (((down or base) + passed) & _MASK, (up - stamps) & _MASK)

    def _send(self, what: _Place, number: int, ack: int, flags: int, window: int, options: bytes = b"") -> None:
        """Send a segment without payload to a proxy."""
        local, proxy = tables.narrow(what.local), tables.narrow(what.proxy)
        bits = (20 + len(options)) << 10 | flags
        segment = what.ports + struct.pack("!IIHHHH", number, ack, bits, window, 0, 0) + options
        total = checksum.ones_sum(segment, checksum.pseudo_sum(local + proxy, ip.TCP, len(segment)))
        segment = segment[:16] + checksum.finish(total).to_bytes(2, "big") + segment[18:]
        raw = self._raw[socket.AF_INET if len(proxy) == 4 else socket.AF_INET6]
        packet = ip.header(local, proxy, ip.TCP, len(segment), _RST_HOPS) + segment
        try:
            raw.sendto(packet, (tables.show_address(proxy), 0))
        except OSError as error:
            log.debug("a proxy was not told of an end", reason=error.strerror)

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
            up, down = FLOW.unpack(what.up), FLOW.unpack(what.down)
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
        if self.spares is not None:
            self.spares.close()
        for ifname in list(self._hooks):
            detach([self._hooks.pop(ifname)[1]])
        for raw in self._raw.values():
            raw.close()
        self._errors.close()
        if not self._memory.closed:
            self._words.release()
            self._counts.release()
            self._memory.close()
            self._carried.close()
            self._ended.close()


def _raw_socket(family: int, mark: int) -> socket.socket:
    """For whole IP packets (raw(7)). Raises OSError."""
    raw = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    return raw


def _pack(address: str) -> bytes:
    """An address literal as 16 bytes."""
    return tables.widen(socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address))
