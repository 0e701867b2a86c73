"""ICMP (RFC 792, RFC 1122 section 3.2.2) and ICMPv6 (RFC 4443): echo, errors about our flows, and errors of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ztun.stack.header import reverse
from ztun.stack.tokenbucket import TokenBucket
from ztun.wire import checksum, icmp, ip, vnet

if TYPE_CHECKING:
    from ztun.stack.stack import Stack

_IP = vnet.LENGTH  # where the IP header starts


class Icmp:
    """Both versions; they differ in numbers and in the pseudo-header only."""

    __slots__ = ("_stack", "_tokens")

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._tokens = TokenBucket(stack.settings.icmp_rate, stack.settings.icmp_burst)

    def receive(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
        """Take one message. Raises ip.MalformedError."""
        message = packet[head.payload : head.end]
        if len(message) < 8:
            raise ip.MalformedError("icmp-truncated")
        start = checksum.pseudo_sum(head.source + head.destination, ip.ICMPV6, len(message)) if head.version == 6 else 0
        if not checked and not checksum.is_valid(message, start):
            raise ip.MalformedError("icmp-checksum")
        self._stack.received["icmp"] += 1
        kind = message[0]
        if kind == (icmp.ECHO_REQUEST6 if head.version == 6 else icmp.ECHO_REQUEST):
            self._receive_echo(packet, head, message, now)
        elif icmp.is_error(head.version, kind):
            self._receive_error(head.version, message, now)
        else:
            self._stack.drop("icmp-type")

    def _receive_echo(self, packet: memoryview, head: ip.IpHeader, message: memoryview, now: float) -> None:
        if not ip.is_unicast(head.destination):
            self._stack.drop("icmp-destination")
        elif self._stack.listener.echo_requested(head.destination, now):
            reply = icmp.echo_reply(head, message)
            if len(reply) > self._stack.settings.mtu:
                body = memoryview(reply)[len(reply) - len(message) :]
                self._stack.send_fragments(head.destination, head.source, head.protocol, body)
            else:
                self._stack.outbox.append((vnet.EMPTY + reply,))
        else:
            self.send_unreachable(packet[_IP : head.end], icmp.Reason.PROHIBITED, now)

    def _receive_error(self, version: int, message: memoryview, now: float) -> None:
        """Only Packet Too Big about a connection of ours is acted upon; it must quote a segment that is in flight."""
        too_big = message[0] == icmp.TOO_BIG6 if version == 6 else (
            message[0] == icmp.UNREACHABLE and message[1] == icmp.FRAGMENTATION_NEEDED
        )  # fmt: skip
        if not too_big:
            self._stack.drop("icmp-error")
            return
        mtu = int.from_bytes(message[4:8] if version == 6 else message[6:8], "big")
        quoted = message[8:]
        size = 40 if version == 6 or not quoted else (quoted[0] & 15) * 4
        if len(quoted) < size + 8 or size < 20:
            self._stack.drop("icmp-truncated")
            return
        protocol = quoted[6] if version == 6 else quoted[9]
        ports = quoted[size : size + 4]
        addresses = quoted[8:40] if version == 6 else quoted[12:20]
        conn = self._stack.connections.get(reverse(bytes(addresses) + bytes(ports)))
        if protocol != ip.TCP or conn is None:
            self._stack.drop("icmp-error")
            return
        seq = int.from_bytes(quoted[size + 4 : size + 8], "big")
        conn.packet_too_big(mtu, seq, now)

    def send_unreachable(self, invoking: bytes | memoryview, reason: icmp.Reason, now: float) -> None:
        """Answer a packet (from its IP header on) with Destination Unreachable, within the rate limit."""
        self._send_error(invoking, lambda back, to, quote: icmp.unreachable(back, to, reason, quote), now)

    def send_reassembly_time_exceeded(self, first: bytes, now: float) -> None:
        """Answer the first fragment of a datagram that never became whole, within the rate limit."""
        self._send_error(first, icmp.reassembly_time_exceeded, now)

    def _send_error(
        self, invoking: bytes | memoryview, build: Callable[[bytes, bytes, bytes | memoryview], bytes], now: float
    ) -> None:
        """Send the error that `build(source, destination, invoking)` makes, where one may be sent."""
        version6 = invoking[0] >> 4 == 6
        source = bytes(invoking[8:24] if version6 else invoking[12:16])
        destination = bytes(invoking[24:40] if version6 else invoking[16:20])
        if not ip.is_unicast(destination) or not ip.is_unicast(source):
            self._stack.drop("icmp-destination")
        elif not self._tokens.take(now):
            self._stack.drop("icmp-rate")
        else:
            self._stack.outbox.append((vnet.EMPTY + build(destination, source, invoking),))
