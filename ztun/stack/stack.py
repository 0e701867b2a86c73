"""Demultiplexing: packets to connections, datagrams and ICMP; what those say back waits in one outbox."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from ztun.stack.admission import Admission
from ztun.stack.arrivals import Arrivals
from ztun.stack.buffers import BufferPool
from ztun.stack.closed import Unconnected
from ztun.stack.connection import Connection
from ztun.stack.fragments import FragmentTable
from ztun.stack.header import DatagramHeader
from ztun.stack.icmp import Icmp
from ztun.stack.listener import Datagram, Listener
from ztun.stack.memory import Memory
from ztun.stack.runs import RUN, Deliver, UdpFlow, split
from ztun.stack.settings import StackSettings
from ztun.stack.timers import TimerQueue
from ztun.wire import checksum, extensions, ip, udp, vnet
from ztun.wire.icmp import Reason
from ztun.wire.malformed import ParameterError

# What of a packet decides about it, where the IP header has no options or extensions: virtio_net_hdr's flags, the
# length field, for IPv4 the fragment word, addresses and ports, then of TCP sequence and acknowledgment numbers, flags
# and window, of UDP the length.
_TCP4: Final = struct.Struct("!B11xH2xH4x12sIIHH4x")
_TCP6: Final = struct.Struct("!B13xH2x36sIIHH4x")
_UDP4: Final = struct.Struct("!BB10xH2xH4x12sH2x")  # with virtio_net_hdr's GSO type
_UDP6: Final = struct.Struct("!BB12xH2x36sH2x")
_unpack_udp4, _unpack_udp6 = _UDP4.unpack_from, _UDP6.unpack_from
_TCP: Final = struct.Struct("!HHIIHHHH")
_IP: Final = vnet.LENGTH  # where the IP header starts
_UDP: Final = udp.LENGTH
_CHECKED: Final = vnet.CHECKED
_KEY4: Final = 12  # bytes of the key of an IPv4 flow
_FRAGMENTED: Final = 0x3FFF  # of the fragment word: More Fragments, or an offset

Packet = tuple[bytes | memoryview, ...]


class Stack:
    """outbox: packets to send, virtio_net_hdr first, each a tuple of pieces; whoever sends them clears it.

    isn(key, now): 64 bits, the initial sequence number (RFC 6528) in the lower half, in the upper one how far the clock
    of the flow's timestamps is off (RFC 7323 section 5.4). key: the flow's addresses and ports as bytes.
    """

    def __init__(
        self,
        listener: Listener,
        settings: StackSettings,
        isn: Callable[[bytes, float], int],
        pool: BufferPool | None = None,
    ) -> None:
        self.listener = listener
        self.settings = settings
        self.isn = isn
        self.pool = BufferPool() if pool is None else pool
        self.timers = TimerQueue()
        self.outbox: list[Packet] = []
        self.pool.outbox = self.outbox
        self.ack_later: list[Arrivals] = []
        self.connections: dict[bytes, Connection] = {}
        self.memory = Memory(settings.max_memory)
        self.admission = Admission(settings, self.memory)
        self.opened = 0
        self.settle: Callable[[Arrivals], None] | None = None  # conclude an offloaded connection if it is over
        self.keepalive = {"probes": 0, "given_up": 0}  # asked of silent clients, and clients that did not answer
        self.drops: dict[str, int] = {}
        self.received: dict[str, int] = {"tcp": 0, "udp": 0, "icmp": 0}
        self.received6: dict[str, int] = {"tcp": 0, "udp": 0, "icmp": 0}  # those of IPv6 among them
        self.udp_flows: dict[bytes, UdpFlow] = {}
        self._udp_runs: list[UdpFlow] = []  # flows with datagrams that wait for the end of the batch
        self._unconnected = Unconnected(self)
        self._icmp = Icmp(self)
        self._fragments = FragmentTable(settings.max_fragments, settings.max_fragments_per_source)
        self._identification = isn(b"identification", 0.0)

    def drop(self, reason: str) -> None:
        """Count a packet that is not processed further."""
        self.drops[reason] = self.drops.get(reason, 0) + 1

    # Packets in.

    def receive(self, packet: memoryview, now: float) -> bool:
        """Take one packet, virtio_net_hdr first. Returns True when its buffer is still in use afterwards.

        The short ways are for headers without options or extensions, and for packets that hold them whole.
        """
        size = len(packet)
        try:
            if size < _IP + 20:
                raise ip.MalformedError("ip-truncated")
            first = packet[_IP]
            if first == 0x45:
                protocol = packet[_IP + 9]
                if protocol == ip.TCP and size >= _TCP4.size:
                    return self._receive_tcp(packet, True, now)
                if protocol == ip.UDP and size >= _UDP4.size:
                    self._receive_udp(packet, True, size, now)
                    return False
            elif first >> 4 == 6:
                protocol = packet[_IP + 6]
                if protocol == ip.TCP and size >= _TCP6.size:
                    return self._receive_tcp(packet, False, now)
                if protocol == ip.UDP and size >= _UDP6.size:
                    self._receive_udp(packet, False, size, now)
                    return False
            self._receive_other(packet, now)
        except ip.MalformedError as malformed:
            self.drop(str(malformed))
        return False

    def _receive_tcp(self, packet: memoryview, is_v4: bool, now: float) -> bool:
        if is_v4:
            flags, length, fragment, key, seq, ack, bits, window = _TCP4.unpack_from(packet)
            if fragment & _FRAGMENTED:
                self._receive_other(packet, now)
                return False
            start, end = _IP + 20, _IP + length
        else:
            flags, length, key, seq, ack, bits, window = _TCP6.unpack_from(packet)
            start, end = _IP + 40, _IP + 40 + length
        if end > len(packet) or end < start + 20:
            raise ip.MalformedError("ip-length")
        if not flags & vnet.CHECKED:
            if is_v4 and not checksum.is_valid(packet[_IP:start]):
                raise ip.MalformedError("ip-checksum")
            _verify(key[:-4], ip.TCP, packet[start:end], "tcp-checksum")
        self.received["tcp"] += 1
        if not is_v4:
            self.received6["tcp"] += 1
        conn = self.connections.get(key)
        if conn is not None:
            return conn.receive(seq, ack, bits, window, packet, start, end, now)
        self._unconnected.receive(key, seq, ack, bits, window, packet, start, end, now)
        return False

    def _receive_udp(self, packet: memoryview, is_v4: bool, size: int, now: float) -> None:
        """size: of the packet. What is a plain datagram of a known flow in every respect takes the shortest way."""
        if is_v4:
            flags, gso_type, length, fragment, key, datagram = _unpack_udp4(packet)
            start, end = _IP + 20, _IP + length
            fragment &= _FRAGMENTED
        else:
            flags, gso_type, length, key, datagram = _unpack_udp6(packet)
            start, end = _IP + 40, _IP + 40 + length
            fragment = 0
        flow = self.udp_flows.get(key)
        stop = start + datagram
        if flow is None or gso_type or fragment or not flags & _CHECKED or stop > end or end > size or datagram < _UDP:
            if fragment or not flags & _CHECKED or (flow is None and not _is_between_hosts(key)):
                self._receive_other(packet, now)
                return
            if end > size or end < start + _UDP:
                raise ip.MalformedError("ip-length")
            self._datagram(packet, key, start, datagram, end, now)
            return
        self.received["udp"] += 1
        if not is_v4:
            self.received6["udp"] += 1
        payload = packet[start + _UDP : stop].tobytes()
        if datagram == flow.length and flow.room:
            flow.room -= 1
            flow.payloads.append(payload)
        else:
            flow.add(payload, now)

    def _receive_other(self, packet: memoryview, now: float, is_reassembled: bool = False) -> None:
        """Everything that is not as short as most packets are, and what is to be answered with Parameter Problem."""
        try:
            self._receive_slowly(packet, is_reassembled, now)
        except ParameterError as problem:
            self.drop(str(problem))
            self._icmp.send_parameter_problem(packet[_IP:], problem, now)

    def _receive_slowly(self, packet: memoryview, is_reassembled: bool, now: float) -> None:
        head = ip.parse(packet, _IP)
        if not ip.is_unicast(head.source):
            raise ip.MalformedError("ip-source")
        if head.fragment is not None:
            if is_reassembled:
                raise ip.MalformedError("ip-extension")  # a fragment of a fragment
            self._receive_fragment(packet, head, now)
            return
        checked = bool(packet[0] & vnet.CHECKED)
        if head.protocol == ip.UDP:
            self._receive_udp_slowly(packet, head, checked, now)
        elif head.protocol == ip.TCP:
            self._receive_tcp_slowly(packet, head, checked, now)
        elif head.protocol == (ip.ICMPV6 if head.version == 6 else ip.ICMP):
            self._icmp.receive(packet, head, checked, now)
        elif head.version == 6 and head.protocol == extensions.NO_NEXT:
            self.drop("ip-no-next-header")  # RFC 8200 section 4.7: there is nothing to answer
        else:
            self.drop("ip-protocol")
            self._icmp.send_protocol_unknown(packet[_IP : head.end], head.pointer, now)

    def _receive_fragment(self, packet: memoryview, head: ip.IpHeader, now: float) -> None:
        whole = self._fragments.add(head, packet, _IP, now)
        if whole is not None:
            protocol, payload = whole
            front = ip.header(head.source, head.destination, protocol, len(payload), head.hop_limit)
            self._receive_other(memoryview(vnet.EMPTY + front + payload), now, True)
        elif self._fragments:
            self.timers.arm(self._fragments, self._fragments.deadline())

    def _receive_tcp_slowly(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
        if head.end - head.payload < 20:
            raise ip.MalformedError("tcp-length")
        if not checked:
            _verify(head.source + head.destination, ip.TCP, packet[head.payload : head.end], "tcp-checksum")
        sport, dport, seq, ack, bits, window, _, _ = _TCP.unpack_from(packet, head.payload)
        key = head.source + head.destination + struct.pack("!HH", sport, dport)
        self.received["tcp"] += 1
        self.received6["tcp"] += head.version == 6
        conn = self.connections.get(key)
        # The slow path gives the stack a copy, so that nobody needs to keep this buffer.
        copy = memoryview(bytes(packet))
        if conn is not None:
            conn.receive(seq, ack, bits, window, copy, head.payload, head.end, now)
        else:
            self._unconnected.receive(key, seq, ack, bits, window, copy, head.payload, head.end, now)

    # Connections.

    @property
    def half_open(self) -> int:
        """Connections whose client has not answered a SYN-ACK yet."""
        return self.admission.half_open

    def established(self, conn: Arrivals) -> None:
        """A connection left the half-open ones."""
        self.admission.established(conn.source)

    def receive_anew(
        self, key: bytes, seq: int, ack: int, bits: int, window: int, packet: memoryview, start: int, end: int,
        now: float,
    ) -> None:  # fmt: skip
        """As `Connection.receive`, for a segment whose connection turned out to be over."""
        self._unconnected.receive(key, seq, ack, bits, window, packet, start, end, now)

    def memory_is_full(self) -> bool:
        """True, and counted, when a piece of data cannot be kept because the connections hold too much already."""
        full = self.memory.used >= self.memory.limit
        if full:
            self.drop("memory-limit")
        return full

    def keep_in_time_wait(self, conn: Connection, now: float) -> None:
        """The connection is over, and its last ACK may be lost."""
        self._unconnected.keep_in_time_wait(conn, now)

    def forget(self, conn: Connection, half_open: bool) -> None:
        """The connection is closed."""
        self.connections.pop(conn.key, None)
        self.memory.used -= conn.rx.charged
        self.admission.closed(conn.source, half_open)

    # UDP.

    def _datagram(self, packet: memoryview, key: bytes, start: int, length: int, end: int, now: float) -> None:
        """start: of the UDP header; length: its field; end: of the IP packet, which may have bytes to spare."""
        if length < udp.LENGTH or start + length > end:
            raise ip.MalformedError("udp-length")
        payload = packet[start + udp.LENGTH : start + length]
        pieces = split(payload, udp.segment_size(packet))
        self.received["udp"] += len(pieces)
        if len(key) > _KEY4:
            self.received6["udp"] += len(pieces)
        flow = self.udp_flows.get(key)
        for piece in pieces:
            if flow is not None:
                flow.add(piece.tobytes(), now)
            else:
                self.listener.udp_received(Datagram(key, piece, packet[_IP:end]), now)
                flow = self.udp_flows.get(key)  # it may be one from now on

    def add_udp_flow(self, key: bytes, deliver: Deliver) -> None:
        """From now on the datagrams of this flow are no news for the listener: `deliver` gets them in runs."""
        self.udp_flows[key] = UdpFlow(deliver, self._udp_runs)

    def _receive_udp_slowly(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
        """Behind IP options, reassembled, to a group, or with a checksum that nobody has looked at."""
        if not ip.is_unicast(head.destination):
            raise ip.MalformedError("ip-destination")  # the kernel's own multicasts; no proxy can carry them
        source, destination, end, check = udp.parse(packet, head.payload, head.end)
        if not checked and check == 0 and head.version == 6:
            raise ip.MalformedError("udp-checksum")  # RFC 8200 section 8.1
        if not checked and check:
            _verify(head.source + head.destination, ip.UDP, packet[head.payload : end], "udp-checksum")
        key = head.source + head.destination + struct.pack("!HH", source, destination)
        self._datagram(packet, key, head.payload, end - head.payload, head.end, now)

    def send_udp(self, header: DatagramHeader, payload: bytes | memoryview) -> None:
        """Send a datagram to a client, in fragments when it exceeds the MTU. What no datagram can hold is dropped."""
        if header.overhead + len(payload) > self.settings.mtu:
            if len(payload) > header.largest:
                self.drop("udp-too-long")
                return
            self._send_udp_fragments(header.key, payload)
        else:
            self.outbox.append((header.pack(len(payload)), payload))

    def send_udp_run(self, header: DatagramHeader, payload: memoryview, size: int) -> None:
        """Send datagrams that lie one behind the other, each of `size` bytes, the last of which may be shorter."""
        if len(payload) <= size:
            self.send_udp(header, payload)
            return
        fits = header.overhead + size <= self.settings.mtu
        step = size * (min(RUN, header.largest // size) if fits else 1)
        for at in range(0, len(payload), step):
            piece = payload[at : at + step]
            if len(piece) <= size:
                self.send_udp(header, piece)
            else:
                self.outbox.append((header.pack_run(len(piece), size), piece))

    def _send_udp_fragments(self, key: bytes, payload: bytes | memoryview) -> None:
        half = (len(key) - 4) // 2
        head = key[-4:] + struct.pack("!H", udp.LENGTH + len(payload))
        pseudo = checksum.pseudo_sum(key[:-4], ip.UDP, udp.LENGTH + len(payload))
        check = checksum.finish(checksum.ones_sum(head + b"\0\0" + bytes(payload), pseudo)) or 0xFFFF
        whole = head + struct.pack("!H", check) + bytes(payload)
        self.send_fragments(key[:half], key[half:-4], ip.UDP, memoryview(whole))

    def send_fragments(self, source: bytes, destination: bytes, protocol: int, payload: memoryview) -> None:
        """Send a transport payload, its checksum complete, that exceeds the MTU."""
        self._identification += 1
        pieces = ip.fragments(source, destination, protocol, payload, self.settings.mtu, self._identification)
        for head, piece in pieces:
            self.outbox.append((vnet.EMPTY + head, piece))

    # ICMP.

    def send_unreachable(self, invoking: bytes | memoryview, reason: Reason, now: float) -> None:
        """Answer a packet (from its IP header on) with Destination Unreachable, within the rate limit."""
        self._icmp.send_unreachable(invoking, reason, now)

    def send_too_big(self, key: bytes, number: int, mtu: int, now: float) -> None:
        """Tell a client that its segment `number` was more than the path takes, within the rate limits. key: see
        FlowKey; mtu: bytes."""
        self._icmp.send_too_big(key, number, mtu, now)

    # Time.

    def flush(self, now: float) -> None:
        """The end of a batch of packets: hand on the datagrams, send the ACKs that nothing else has carried."""
        if self._udp_runs:
            for flow in self._udp_runs:
                flow.flush(now)
            self._udp_runs.clear()
        later, self.ack_later = self.ack_later, []
        for conn in later:
            conn.flush_ack(now)

    def get_timer(self) -> float | None:
        """When `handle_timer` wants to be called, or None."""
        return self.timers.next()

    def handle_timer(self, now: float) -> None:
        self.timers.run(now)
        late, self._fragments.timed_out = self._fragments.timed_out, []
        for first in late:
            self.drop("ip-fragment-time")
            self._icmp.send_reassembly_time_exceeded(first, now)


def _verify(addresses: bytes, protocol: int, data: memoryview, reason: str) -> None:
    if not checksum.is_valid(data, checksum.pseudo_sum(addresses, protocol, len(data))):
        raise ip.MalformedError(reason)


def _is_between_hosts(key: bytes) -> bool:
    """Whether both addresses can be those of one host; IPv4's groups and what is above them cannot."""
    half = (len(key) - 4) // 2
    if half == 4:
        return ip.is_unicast(key[:4]) and key[4] < 224
    return ip.is_unicast(key[:16]) and key[16] != 0xFF
