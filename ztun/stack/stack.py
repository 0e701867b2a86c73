"""Demultiplexing: packets to connections, datagrams and ICMP, and what to answer when there is nobody."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ztun.stack.buffers import BufferPool
from ztun.stack.connection import Connection
from ztun.stack.fragments import FragmentTable
from ztun.stack.header import DatagramHeader, FlowKey, reset_for, reverse
from ztun.stack.settings import StackSettings
from ztun.stack.timers import TimerQueue
from ztun.stack.timewait import TimeWaitTable, Waiting
from ztun.stack.tokenbucket import TokenBucket
from ztun.wire import checksum, icmp, ip, tcp, udp, vnet
from ztun.wire.sequence import MASK

# virtio_net_hdr flags, then an IPv4 header without options and a TCP header.
_FAST4 = struct.Struct("!B9xBxHHHBBH12sIIHHHH")
# virtio_net_hdr flags, then an IPv6 header without extensions and a TCP header.
_FAST6 = struct.Struct("!B9xIHBB36sIIHHHH")
# The same with a UDP header.
_FAST_UDP4 = struct.Struct("!B9xBxHHHBBH12sHH")
_FAST_UDP6 = struct.Struct("!B9xIHBB36sHH")
_TCP = struct.Struct("!HHIIHHHH")
_IP = vnet.LENGTH  # where the IP header starts
_QUOTE = ip.MINIMUM_MTU6  # no ICMP error quotes more

Packet = tuple[bytes | memoryview, ...]


class _Datagram(NamedTuple):
    key: bytes
    payload: memoryview
    packet: memoryview


class Datagram(_Datagram, FlowKey):
    """A UDP datagram from a client. key: its addresses and ports as they stand in the packet, 12 or 36 bytes; payload
    and packet (from the IP header on) are views that must be copied to be kept."""

    __slots__ = ()


class Listener(Protocol):
    """Who the stack tells of what is new."""

    def tcp_incoming(self, conn: Connection, now: float) -> None:
        """A SYN for a new connection: dial, then `accept` or `refuse` it."""
        ...

    def udp_received(self, datagram: Datagram, now: float) -> None: ...

    def echo_requested(self, destination: bytes, now: float) -> bool:
        """True when the stack shall answer a ping to this address in its owner's place."""
        ...


class Stack:
    """outbox: packets to send, virtio_net_hdr first, each a tuple of pieces; whoever sends them clears it.

    isn(key, now): an initial sequence number (RFC 6528). key: the flow's addresses and ports as bytes.
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
        self.ack_later: list[Connection] = []
        self.connections: dict[bytes, Connection] = {}
        self.half_open = 0
        self.opened = 0
        self.drops: dict[str, int] = {}
        self.received: dict[str, int] = {"tcp": 0, "udp": 0, "icmp": 0}
        self._time_wait = TimeWaitTable(settings.time_wait, settings.max_time_wait)
        self._icmp_tokens = TokenBucket(settings.icmp_rate, settings.icmp_burst)
        self._fragments = FragmentTable()
        self._identification = isn(b"identification", 0.0)

    def drop(self, reason: str) -> None:
        """Count a packet that is not processed further."""
        self.drops[reason] = self.drops.get(reason, 0) + 1

    # Packets in.

    def receive(self, packet: memoryview, now: float) -> bool:
        """Take one packet, virtio_net_hdr first. Returns True when its buffer is still in use afterwards."""
        if len(packet) < _IP + 20:
            self.drop("ip-truncated")
            return False
        try:
            return self._dispatch(packet, now)
        except ip.MalformedError as malformed:
            self.drop(str(malformed))
            return False

    def _dispatch(self, packet: memoryview, now: float) -> bool:
        """The short ways are for headers without options or extensions, and for packets that hold them whole."""
        size = len(packet)
        if packet[_IP] == 0x45:
            protocol = packet[_IP + 9]
            if protocol == ip.TCP and size >= _FAST4.size:
                return self._receive_tcp4(packet, now)
            if protocol == ip.UDP and size >= _FAST_UDP4.size:
                self._receive_udp4(packet, now)
                return False
        elif packet[_IP] >> 4 == 6:
            following = packet[_IP + 6]
            if following == ip.TCP and size >= _FAST6.size:
                return self._receive_tcp6(packet, now)
            if following == ip.UDP and size >= _FAST_UDP6.size:
                self._receive_udp6(packet, now)
                return False
        self._receive_other(packet, now)
        return False

    def _receive_tcp4(self, packet: memoryview, now: float) -> bool:
        flags, _, total, _, frag, _, _, _, key, seq, ack, bits, window, _, _ = _FAST4.unpack_from(packet)
        end = _IP + total
        if frag & 0x3FFF:
            self._receive_other(packet, now)
            return False
        if end > len(packet) or total < 40:
            raise ip.MalformedError("ip-length")
        if not flags & vnet.CHECKED:
            if not checksum.is_valid(packet[_IP : _IP + 20]):
                raise ip.MalformedError("ip-checksum")
            _verify(key[:8], ip.TCP, packet[_IP + 20 : end], "tcp-checksum")
        return self._segment(key, seq, ack, bits, window, packet, _IP + 20, end, now)

    def _receive_tcp6(self, packet: memoryview, now: float) -> bool:
        flags, _, length, _, _, key, seq, ack, bits, window, _, _ = _FAST6.unpack_from(packet)
        end = _IP + 40 + length
        if end > len(packet) or length < 20:
            raise ip.MalformedError("ip-length")
        if not flags & vnet.CHECKED:
            _verify(key[:32], ip.TCP, packet[_IP + 40 : end], "tcp-checksum")
        return self._segment(key, seq, ack, bits, window, packet, _IP + 40, end, now)

    def _segment(
        self,
        key: bytes,
        seq: int,
        ack: int,
        bits: int,
        window: int,
        packet: memoryview,
        start: int,
        end: int,
        now: float,
    ) -> bool:
        self.received["tcp"] += 1
        conn = self.connections.get(key)
        if conn is not None:
            return conn.receive(seq, ack, bits, window, packet, start, end, now)
        self._segment_without_connection(key, seq, ack, bits, window, packet, start, end, now)
        return False

    def _receive_other(self, packet: memoryview, now: float) -> None:
        head = ip.parse(packet, _IP)
        if not ip.is_unicast(head.source):
            raise ip.MalformedError("ip-source")
        if head.fragment is not None:
            self._receive_fragment(packet, head, now)
            return
        checked = bool(packet[0] & vnet.CHECKED)
        if head.protocol == ip.UDP:
            self._receive_udp(packet, head, checked, now)
        elif head.protocol == ip.TCP:
            self._receive_tcp_behind_options(packet, head, checked, now)
        elif head.protocol == (ip.ICMPV6 if head.version == 6 else ip.ICMP):
            self._receive_icmp(packet, head, checked, now)
        else:
            self.drop("ip-protocol")

    def _receive_fragment(self, packet: memoryview, head: ip.IpHeader, now: float) -> None:
        whole = self._fragments.add(head, packet, _IP, now)
        if whole is not None:
            front = ip.header(head.source, head.destination, head.protocol, len(whole), head.hop_limit)
            self._receive_other(memoryview(vnet.EMPTY + front + whole), now)
        elif self._fragments:
            self.timers.arm(self._fragments, self._fragments.deadline())

    def _receive_tcp_behind_options(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
        if head.end - head.payload < 20:
            raise ip.MalformedError("tcp-length")
        if not checked:
            _verify(head.source + head.destination, ip.TCP, packet[head.payload : head.end], "tcp-checksum")
        sport, dport, seq, ack, bits, window, _, _ = _TCP.unpack_from(packet, head.payload)
        key = head.source + head.destination + struct.pack("!HH", sport, dport)
        # The slow path gives the stack a copy, so that nobody needs to keep this buffer.
        copy = memoryview(bytes(packet))
        self._segment(key, seq, ack, bits, window, copy, head.payload, head.end, now)

    # TCP without a connection.

    def _segment_without_connection(
        self,
        key: bytes,
        seq: int,
        ack: int,
        bits: int,
        window: int,
        packet: memoryview,
        start: int,
        end: int,
        now: float,
    ) -> None:
        payload = start + (bits >> 10 & 0x3C)
        if payload > end or payload < start + 20:
            self.drop("tcp-length")
            return
        half = (len(key) - 4) // 2
        if not ip.is_unicast(key[:half]) or not ip.is_unicast(key[half : 2 * half]):
            self.drop("ip-source")
            return
        options = tcp.parse_options(packet[start + 20 : payload])
        waiting = self._time_wait.get(key, now)
        if waiting is not None and not waiting.may_reopen(seq, bits, options):
            self._answer_from_time_wait(key, waiting, seq, bits, end - payload, now)
        elif bits & (tcp.SYN | tcp.ACK | tcp.RST | tcp.FIN) == tcp.SYN:
            iss = self.isn(key, now)
            if waiting is not None:
                self._time_wait.remove(key)
                iss = waiting.number_after(iss)
            self._open(key, iss, packet, seq, options, window, now)
        elif bits & tcp.RST:
            self.drop("tcp-reset-closed")
        else:
            self._reset_closed(key, seq, ack, bits, end - payload)

    def _answer_from_time_wait(
        self, key: bytes, waiting: Waiting, seq: int, bits: int, length: int, now: float
    ) -> None:
        """The last ACK was lost, or an old segment came late (RFC 9293 section 3.10.7.4, RFC 1337 for RST)."""
        self.drop("tcp-time-wait")
        if bits & tcp.RST:
            return
        if bits & tcp.FIN and (seq + length + 1 - waiting.expected) & MASK == 0:
            self._time_wait.restart(key, now)
        elif seq == waiting.expected & MASK and not length and not bits & (tcp.SYN | tcp.FIN):
            return  # a plain ACK as it should be; answering it would go on for ever if the client did the same
        self.outbox.append((self._time_wait.acknowledgment(key, now),))

    def _open(
        self, key: bytes, iss: int, packet: memoryview, seq: int, options: tcp.Options, window: int, now: float
    ) -> None:
        if len(self.connections) >= self.settings.max_connections or self.half_open >= self.settings.max_half_open:
            self.drop("tcp-limit")
            self._reset_closed(key, seq, 0, tcp.SYN, 0)
            return
        conn = Connection(self, key, iss, bytes(packet[_IP : _IP + _QUOTE]), seq, options, window, now)
        self.connections[key] = conn
        self.half_open += 1
        self.opened += 1
        try:
            self.listener.tcp_incoming(conn, now)
        except BaseException:
            conn.abort(now)  # nobody else knows of it
            raise

    def _reset_closed(self, key: bytes, seq: int, ack: int, bits: int, length: int) -> None:
        """RFC 9293 section 3.10.7.1: the RST has the sequence number that its receiver will believe."""
        self.drop("tcp-closed")
        back = reverse(key)
        if bits & tcp.ACK:
            self.outbox.append((reset_for(back, ack, None),))
            return
        counted = length + (1 if bits & tcp.SYN else 0) + (1 if bits & tcp.FIN else 0)
        self.outbox.append((reset_for(back, 0, (seq + counted) & MASK),))

    def established(self) -> None:
        """A connection left the half-open ones."""
        self.half_open -= 1

    def keep_in_time_wait(self, conn: Connection, now: float) -> None:
        stamps = (conn.stamp_offset, conn.stamp_recent) if conn.timestamps else None
        self._time_wait.add(conn.key, conn.tx.nxt, conn.rx.nxt, stamps, now)

    def forget(self, conn: Connection, half_open: bool) -> None:
        """The connection is closed."""
        self.connections.pop(conn.key, None)
        if half_open:
            self.half_open -= 1

    # UDP.

    def _receive_udp4(self, packet: memoryview, now: float) -> None:
        flags, _, total, _, frag, _, _, _, key, length, _ = _FAST_UDP4.unpack_from(packet)
        if frag & 0x3FFF or not flags & vnet.CHECKED or not ip.is_unicast(key[:4]) or key[4] >= 224:
            self._receive_other(packet, now)
            return
        end = _IP + total
        if end > len(packet) or total < 28:
            raise ip.MalformedError("ip-length")
        self._datagram(packet, key, _IP + 20, length, end, now)

    def _receive_udp6(self, packet: memoryview, now: float) -> None:
        flags, _, size, _, _, key, length, _ = _FAST_UDP6.unpack_from(packet)
        if not flags & vnet.CHECKED or not ip.is_unicast(key[:16]) or key[16] == 0xFF:
            self._receive_other(packet, now)
            return
        end = _IP + 40 + size
        if end > len(packet) or size < udp.LENGTH:
            raise ip.MalformedError("ip-length")
        self._datagram(packet, key, _IP + 40, length, end, now)

    def _datagram(self, packet: memoryview, key: bytes, start: int, length: int, end: int, now: float) -> None:
        """start: of the UDP header; length: its field; end: of the IP packet, which may have bytes to spare."""
        if length < udp.LENGTH or start + length > end:
            raise ip.MalformedError("udp-length")
        self.received["udp"] += 1
        payload = packet[start + udp.LENGTH : start + length]
        self.listener.udp_received(Datagram(key, payload, packet[_IP:end]), now)

    def _receive_udp(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
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

    def _send_udp_fragments(self, key: bytes, payload: bytes | memoryview) -> None:
        half = (len(key) - 4) // 2
        head = key[-4:] + struct.pack("!H", udp.LENGTH + len(payload))
        pseudo = checksum.pseudo_sum(key[:-4], ip.UDP, udp.LENGTH + len(payload))
        check = checksum.finish(checksum.ones_sum(head + b"\0\0" + bytes(payload), pseudo)) or 0xFFFF
        whole = head + struct.pack("!H", check) + bytes(payload)
        self._send_fragments(key[:half], key[half:-4], ip.UDP, memoryview(whole))

    def _send_fragments(self, source: bytes, destination: bytes, protocol: int, payload: memoryview) -> None:
        self._identification += 1
        pieces = ip.fragments(source, destination, protocol, payload, self.settings.mtu, self._identification)
        for head, piece in pieces:
            self.outbox.append((vnet.EMPTY + head, piece))

    # ICMP.

    def _receive_icmp(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
        message = packet[head.payload : head.end]
        if len(message) < 8:
            raise ip.MalformedError("icmp-truncated")
        start = checksum.pseudo_sum(head.source + head.destination, ip.ICMPV6, len(message)) if head.version == 6 else 0
        if not checked and not checksum.is_valid(message, start):
            raise ip.MalformedError("icmp-checksum")
        self.received["icmp"] += 1
        kind = message[0]
        if kind == (icmp.ECHO_REQUEST6 if head.version == 6 else icmp.ECHO_REQUEST):
            self._receive_echo(packet, head, message, now)
        elif icmp.is_error(head.version, kind):
            self._receive_error(head.version, message, now)
        else:
            self.drop("icmp-type")

    def _receive_echo(self, packet: memoryview, head: ip.IpHeader, message: memoryview, now: float) -> None:
        if not ip.is_unicast(head.destination):
            self.drop("icmp-destination")
        elif self.listener.echo_requested(head.destination, now):
            reply = icmp.echo_reply(head, message)
            if len(reply) > self.settings.mtu:
                body = memoryview(reply)[len(reply) - len(message) :]
                self._send_fragments(head.destination, head.source, head.protocol, body)
            else:
                self.outbox.append((vnet.EMPTY + reply,))
        else:
            self.send_unreachable(packet[_IP : head.end], icmp.Reason.PROHIBITED, now)

    def _receive_error(self, version: int, message: memoryview, now: float) -> None:
        """Only Packet Too Big about a connection of ours is acted upon; it must quote a segment that is in flight."""
        too_big = message[0] == icmp.TOO_BIG6 if version == 6 else (
            message[0] == icmp.UNREACHABLE and message[1] == icmp.FRAGMENTATION_NEEDED
        )  # fmt: skip
        if not too_big:
            self.drop("icmp-error")
            return
        mtu = int.from_bytes(message[4:8] if version == 6 else message[6:8], "big")
        quoted = message[8:]
        size = 40 if version == 6 or not quoted else (quoted[0] & 15) * 4
        if len(quoted) < size + 8 or size < 20:
            self.drop("icmp-truncated")
            return
        protocol = quoted[6] if version == 6 else quoted[9]
        ports = quoted[size : size + 4]
        addresses = quoted[8:40] if version == 6 else quoted[12:20]
        conn = self.connections.get(reverse(bytes(addresses) + bytes(ports)))
        if protocol != ip.TCP or conn is None:
            self.drop("icmp-error")
            return
        seq = int.from_bytes(quoted[size + 4 : size + 8], "big")
        conn.packet_too_big(mtu, seq, now)

    def send_unreachable(self, invoking: bytes | memoryview, reason: icmp.Reason, now: float) -> None:
        """Answer a packet (from its IP header on) with Destination Unreachable, within the rate limit."""
        self._send_error(invoking, lambda back, to, quote: icmp.unreachable(back, to, reason, quote), now)

    def _send_error(
        self, invoking: bytes | memoryview, build: Callable[[bytes, bytes, bytes | memoryview], bytes], now: float
    ) -> None:
        """Send the error that `build(source, destination, invoking)` makes, where one may be sent."""
        version6 = invoking[0] >> 4 == 6
        source = bytes(invoking[8:24] if version6 else invoking[12:16])
        destination = bytes(invoking[24:40] if version6 else invoking[16:20])
        if not ip.is_unicast(destination) or not ip.is_unicast(source):
            self.drop("icmp-destination")
        elif not self._icmp_tokens.take(now):
            self.drop("icmp-rate")
        else:
            self.outbox.append((vnet.EMPTY + build(destination, source, invoking),))

    # Time.

    def flush(self, now: float) -> None:
        """The end of a batch of packets: send the ACKs that nothing else has carried."""
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
            self._send_error(first, icmp.reassembly_time_exceeded, now)


def _verify(addresses: bytes, protocol: int, data: memoryview, reason: str) -> None:
    if not checksum.is_valid(data, checksum.pseudo_sum(addresses, protocol, len(data))):
        raise ip.MalformedError(reason)
