"""TCP segments without a connection: LISTEN for a SYN, TIME-WAIT, else CLOSED (RFC 9293 section 3.10.7.1 to .4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ztun.stack.connection import Connection
from ztun.stack.header import reset_for, reverse
from ztun.stack.timewait import TimeWaitTable, Waiting
from ztun.wire import ip, tcp, vnet
from ztun.wire.sequence import MASK

if TYPE_CHECKING:
    from ztun.stack.stack import Stack

_IP: Final = vnet.LENGTH  # where the IP header starts
_QUOTE: Final = ip.MINIMUM_MTU6  # no ICMP error quotes more


class Unconnected:
    """Every address and port listens: the application decides about a SYN, not a table of sockets."""

    __slots__ = ("_stack", "_time_wait")

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._time_wait = TimeWaitTable(stack.settings.time_wait, stack.settings.max_time_wait)

    def receive(
        self, key: bytes, seq: int, ack: int, bits: int, window: int, packet: memoryview, start: int, end: int,
        now: float,
    ) -> None:  # fmt: skip
        """Take one segment; the arguments are those of `Connection.receive`, and the flow's key."""
        payload = start + (bits >> 10 & 0x3C)
        if payload > end or payload < start + 20:
            self._stack.drop("tcp-length")
            return
        half = (len(key) - 4) // 2
        if not ip.is_unicast(key[:half]) or not ip.is_unicast(key[half : 2 * half]):
            self._stack.drop("ip-source")
            return
        options = tcp.parse_options(packet[start + 20 : payload])
        waiting = self._time_wait.get(key, now)
        if waiting is not None and not waiting.may_reopen(seq, bits, options):
            self._answer_from_time_wait(key, waiting, seq, bits, end - payload, now)
        elif bits & (tcp.SYN | tcp.ACK | tcp.RST | tcp.FIN) == tcp.SYN:
            numbers = self._stack.isn(key, now)
            iss = numbers & MASK
            if waiting is not None:
                self._time_wait.remove(key)
                iss = waiting.number_after(iss)
            self._open(key, iss, numbers >> 32, packet, seq, options, window, now)
        elif bits & tcp.RST:
            self._stack.drop("tcp-reset-closed")
        else:
            self._reset(key, seq, ack, bits, end - payload)

    def _answer_from_time_wait(
        self, key: bytes, waiting: Waiting, seq: int, bits: int, length: int, now: float
    ) -> None:
        """The last ACK was lost, or an old segment came late (RFC 9293 section 3.10.7.4, RFC 1337 for RST)."""
        self._stack.drop("tcp-time-wait")
        if bits & tcp.RST:
            return
        if bits & tcp.FIN and (seq + length + 1 - waiting.expected) & MASK == 0:
            self._time_wait.restart(key, now)
        elif seq == waiting.expected & MASK and not length and not bits & (tcp.SYN | tcp.FIN):
            return  # a plain ACK as it should be; answering it would go on for ever if the client did the same
        self._stack.outbox.append((self._time_wait.acknowledgment(key, self._stack.settings.hop_limit, now),))

    def _open(
        self,
        key: bytes,
        iss: int,
        stamp_offset: int,
        packet: memoryview,
        seq: int,
        options: tcp.Options,
        window: int,
        now: float,
    ) -> None:
        stack = self._stack
        source = key[: (len(key) - 4) // 2]
        objection = stack.admission.objection(source)
        if objection is not None:
            stack.drop(objection)
            stack.outbox.append((reset_for(reverse(key), 0, (seq + 1) & MASK, stack.settings.hop_limit),))
            return
        syn = bytes(packet[_IP : _IP + _QUOTE])
        conn = Connection(stack, key, iss, stamp_offset, syn, seq, options, window, now)
        stack.connections[key] = conn
        stack.admission.opened(source)
        stack.opened += 1
        try:
            stack.listener.tcp_incoming(conn, now)
        except BaseException:
            conn.abort(now)  # nobody else knows of it
            raise

    def _reset(self, key: bytes, seq: int, ack: int, bits: int, length: int) -> None:
        """RFC 9293 section 3.10.7.1: the RST has the sequence number that its receiver will believe."""
        self._stack.drop("tcp-closed")
        back, hop_limit = reverse(key), self._stack.settings.hop_limit
        if bits & tcp.ACK:
            self._stack.outbox.append((reset_for(back, ack, None, hop_limit),))
            return
        counted = length + (1 if bits & tcp.SYN else 0) + (1 if bits & tcp.FIN else 0)
        self._stack.outbox.append((reset_for(back, 0, (seq + counted) & MASK, hop_limit),))

    def keep_in_time_wait(self, conn: Connection, now: float) -> None:
        """The connection is over, and its last ACK may be lost."""
        stamps = (conn.stamp_offset, conn.stamp_recent) if conn.timestamps else None
        self._time_wait.add(conn.key, conn.tx.nxt, conn.rx.nxt, stamps, now)
