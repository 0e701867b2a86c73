"""ICMP (RFC 792, RFC 1122 section 3.2.2) and ICMPv6 (RFC 4443): echo, errors about our flows, and errors of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from ztun.stack.header import reverse
from ztun.stack.sources import source_of
from ztun.stack.tokenbucket import SourceBuckets, TokenBucket
from ztun.wire import checksum, icmp, ip, vnet
from ztun.wire.malformed import MalformedError, ParameterError

if TYPE_CHECKING:
    from ztun.stack.stack import Stack

_IP: Final = vnet.LENGTH  # where the IP header starts
# Codes of Destination Unreachable that stay true when one waits (RFC 1122 section 4.2.3.9; administratively prohibited
# came with RFC 1812 section 5.2.7.1). The others tell of a moment.
_HARD4: Final = frozenset({2, 3, 9, 10, 13})
_HARD6: Final = frozenset({1, 4, 5, 6})
_PORT4: Final = 3
_PORT6: Final = 4

_Build = Callable[[bytes, bytes, bytes | memoryview], bytes]


class _Quote(NamedTuple):
    """What an error quotes of a packet of ours. key: of the client's direction; seq: TCP's sequence number."""

    protocol: int
    key: bytes
    seq: int


class Icmp:
    """Both versions; they differ in numbers and in the pseudo-header only."""

    __slots__ = ("_stack", "_tokens", "_tokens_of")

    def __init__(self, stack: Stack) -> None:
        settings = stack.settings
        self._stack = stack
        self._tokens = TokenBucket(settings.icmp_rate, settings.icmp_burst)
        self._tokens_of = SourceBuckets(settings.icmp_rate_per_source, settings.icmp_burst_per_source)

    def receive(self, packet: memoryview, head: ip.IpHeader, checked: bool, now: float) -> None:
        """Take one message. Raises MalformedError."""
        message = packet[head.payload : head.end]
        if len(message) < 8:
            raise MalformedError("icmp-truncated")
        start = checksum.pseudo_sum(head.source + head.destination, ip.ICMPV6, len(message)) if head.version == 6 else 0
        if not checked and not checksum.is_valid(message, start):
            raise MalformedError("icmp-checksum")
        self._stack.received["icmp"] += 1
        self._stack.received6["icmp"] += head.version == 6
        kind = message[0]
        if kind == (icmp.ECHO_REQUEST6 if head.version == 6 else icmp.ECHO_REQUEST):
            self._receive_echo(packet, head, message, now)
        elif icmp.is_error(head.version, kind):
            self._receive_error(head, message, now)
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

    # Errors from the clients' side.

    def _receive_error(self, head: ip.IpHeader, message: memoryview, now: float) -> None:
        """An error counts when it quotes a packet of one of our flows; of TCP, a segment that is in flight."""
        quote = _read_quote(head.version, message[8:])
        if quote is None:
            self._stack.drop("icmp-truncated")
        elif quote.protocol == ip.TCP:
            self._receive_error_about_segment(head.version, message, quote, now)
        elif quote.protocol == ip.UDP and _is_port_unreachable(head.version, message):
            self._receive_port_unreachable(head, quote, now)
        else:
            self._stack.drop("icmp-error")

    def _receive_error_about_segment(self, version: int, message: memoryview, quote: _Quote, now: float) -> None:
        """Packet Too Big shrinks the segments. A hard error ends a connection that is not established yet.

        One that is established goes on whatever an error says, and the retransmission timer decides (RFC 5927 section
        5.2, RFC 5461 section 4); so do soft errors leave a handshake alone (RFC 1122 section 4.2.3.9).
        """
        stack = self._stack
        conn = stack.connections.get(quote.key)
        if conn is None:
            stack.drop("icmp-error")
        elif _is_too_big(version, message):
            conn.packet_too_big(int.from_bytes(message[4:8] if version == 6 else message[6:8], "big"), quote.seq, now)
        elif not conn.is_in_flight(quote.seq):
            stack.drop("icmp-sequence")
        elif conn.is_established or not _is_hard(version, message):
            stack.drop("icmp-soft")
        else:
            stack.drop("icmp-hard")
            conn.abort(now)

    def _receive_port_unreachable(self, head: ip.IpHeader, quote: _Quote, now: float) -> None:
        """The client's socket is closed. Only the client itself can know that."""
        half = (len(quote.key) - 4) // 2
        if head.source != quote.key[:half]:
            self._stack.drop("icmp-error")
        else:
            self._stack.drop("icmp-port")
            self._stack.listener.udp_refused(quote.key, now)

    # Errors of our own.

    def send_unreachable(self, invoking: bytes | memoryview, reason: icmp.Reason, now: float) -> None:
        """Answer a packet (from its IP header on) with Destination Unreachable, within the rate limits."""
        self._send_error(invoking, lambda back, to, quote: icmp.unreachable(back, to, reason, quote), now)

    def send_too_big(self, key: bytes, number: int, mtu: int, now: float) -> None:
        """Tell a client that its segment `number` was more than the path takes, within the rate limits. key: see
        FlowKey; mtu: bytes."""
        half = (len(key) - 4) // 2
        segment = key[-4:] + number.to_bytes(4, "big")
        invoking = ip.header(key[:half], key[half:-4], ip.TCP, len(segment)) + segment
        self._send_error(invoking, lambda back, to, quote: icmp.too_big(back, to, mtu, quote), now)

    def send_protocol_unknown(self, invoking: memoryview, pointer: int, now: float) -> None:
        """Answer a packet of a protocol that nobody here speaks (RFC 1122 section 3.2.2.1, RFC 8200 section 4).
        pointer: offset of the field that says the protocol."""
        if invoking[0] >> 4 == 6:
            self.send_parameter_problem(invoking, ParameterError("ip-protocol", 1, pointer), now)
        else:
            self._send_error(invoking, icmp.protocol_unreachable, now)

    def send_parameter_problem(self, invoking: memoryview, problem: ParameterError, now: float) -> None:
        """Answer an IPv6 packet whose header has this problem."""

        def build(back: bytes, to: bytes, quote: bytes | memoryview) -> bytes:
            return icmp.parameter_problem(back, to, problem.code, problem.pointer, quote)

        self._send_error(invoking, build, now)

    def send_reassembly_time_exceeded(self, first: bytes, now: float) -> None:
        """Answer the first fragment of a datagram that never became whole, within the rate limits."""
        self._send_error(first, icmp.reassembly_time_exceeded, now)

    def _send_error(self, invoking: bytes | memoryview, build: _Build, now: float) -> None:
        """Send the error that `build(source, destination, invoking)` makes, where one may be sent."""
        is_v6 = invoking[0] >> 4 == 6
        source = bytes(invoking[8:24] if is_v6 else invoking[12:16])
        destination = bytes(invoking[24:40] if is_v6 else invoking[16:20])
        if not ip.is_unicast(destination) or not ip.is_unicast(source):
            self._stack.drop("icmp-destination")
        elif _is_never_answered(invoking):
            self._stack.drop("icmp-not-due")
        elif not self._tokens_of.take(source_of(source), now):
            self._stack.drop("icmp-rate-source")
        elif not self._tokens.take(now):
            self._stack.drop("icmp-rate")
        else:
            self._stack.outbox.append((vnet.EMPTY + build(destination, source, invoking),))


def _read_quote(version: int, quoted: memoryview) -> _Quote | None:
    """The beginning of our packet; None when there is too little of it. We send no options and no extensions but the
    Fragment header."""
    size = 40 if version == 6 or not quoted else (quoted[0] & 15) * 4
    if len(quoted) < size + 8 or size < 20 or quoted[0] >> 4 != version:
        return None
    protocol = quoted[6] if version == 6 else quoted[9]
    if version == 6 and protocol == 44 and not int.from_bytes(quoted[42:44], "big") & 0xFFF8:
        protocol = quoted[40]
        size = 48
        if len(quoted) < size + 8:
            return None
    addresses = quoted[8:40] if version == 6 else quoted[12:20]
    key = reverse(bytes(addresses) + bytes(quoted[size : size + 4]))
    return _Quote(protocol, key, int.from_bytes(quoted[size + 4 : size + 8], "big"))


def _is_too_big(version: int, message: memoryview) -> bool:
    if version == 6:
        return message[0] == icmp.TOO_BIG6
    return message[0] == icmp.UNREACHABLE and message[1] == icmp.FRAGMENTATION_NEEDED


def _is_hard(version: int, message: memoryview) -> bool:
    if version == 6:
        return message[0] == icmp.UNREACHABLE6 and message[1] in _HARD6
    return message[0] == icmp.UNREACHABLE and message[1] in _HARD4


def _is_port_unreachable(version: int, message: memoryview) -> bool:
    if version == 6:
        return message[0] == icmp.UNREACHABLE6 and message[1] == _PORT6
    return message[0] == icmp.UNREACHABLE and message[1] == _PORT4


def _is_never_answered(invoking: bytes | memoryview) -> bool:
    """ICMP errors, and over IPv4 all fragments but the first (RFC 1122 section 3.2.2, RFC 4443 section 2.4 (e)).

    What may be an error is taken for one.
    """
    if invoking[0] >> 4 == 4:
        size = (invoking[0] & 15) * 4
        if int.from_bytes(invoking[6:8], "big") & 0x1FFF:
            return True
        return invoking[9] == ip.ICMP and (len(invoking) <= size or icmp.is_error(4, invoking[size]))
    protocol, size = _behind_extensions(invoking)
    return protocol == ip.ICMPV6 and (len(invoking) <= size or icmp.is_error(6, invoking[size]))


def _behind_extensions(invoking: bytes | memoryview) -> tuple[int, int]:
    """(protocol, offset) of what the extension headers lead to, however wrong they are. Where it begins in another
    fragment, the offset is beyond the end."""
    protocol, size = invoking[6], 40
    while protocol in (0, 43, 44, 60) and size + 8 <= len(invoking):
        if protocol == 44:
            if int.from_bytes(invoking[size + 2 : size + 4], "big") & 0xFFF8:
                return invoking[size], len(invoking)
            protocol, size = invoking[size], size + 8
        else:
            protocol, size = invoking[size], size + (invoking[size + 1] + 1) * 8
    return protocol, size
