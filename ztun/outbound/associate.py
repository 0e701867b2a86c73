"""Datagrams through a SOCKS5 proxy: UDP ASSOCIATE (RFC 1928, sections 4, 6 and 7)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable, Sequence

from ztun.outbound.batch import Run
from ztun.outbound.names import proxy_name
from ztun.outbound.senders import Senders
from ztun.outbound.tcp import is_literal
from ztun.outbound.udp import Address, UdpSocket
from ztun.ports import Buffer, DatagramHandler, Destination, Failure, OutboundError, Poller

_MAX_HEADERS = 4096  # destinations whose header is kept ready
_IPV4, _NAME, _IPV6 = 1, 3, 4  # ATYP
_IPV4_HEADER = 10  # bytes


def encode_header(destination: Destination) -> bytes:
    """RSV, FRAG = 0, ATYP, DST.ADDR and DST.PORT (RFC 1928, section 7). Raises OutboundError for what is no name."""
    host = destination.host
    if not is_literal(host):
        name = proxy_name(host).encode("ascii")
        address = bytes((_NAME, len(name))) + name
    elif ":" in host:
        address = bytes((_IPV6,)) + socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    else:
        address = bytes((_IPV4,)) + socket.inet_pton(socket.AF_INET, host)
    return b"\0\0\0" + address + destination.port.to_bytes(2, "big")


def decode_header(datagram: bytes) -> tuple[str, int, int]:
    """The sender's host and port, and where the payload starts. Raises ValueError, with the reason in one word."""
    if len(datagram) < 5:
        raise ValueError("short")
    if datagram[2]:
        raise ValueError("fragment")  # reassembly is optional, and to drop is what the RFC asks for without it
    kind = datagram[3]
    start = 5 if kind == _NAME else 4
    size = {_IPV4: 4, _IPV6: 16, _NAME: datagram[4]}.get(kind)
    if size is None:
        raise ValueError("address type")
    end = start + size
    if len(datagram) < end + 2:
        raise ValueError("short")
    return _host(kind, datagram[start:end]), int.from_bytes(datagram[end : end + 2], "big"), end + 2


def _host(kind: int, address: bytes) -> str:
    if kind == _IPV4:
        return socket.inet_ntop(socket.AF_INET, address)
    if kind == _IPV6:
        return socket.inet_ntop(socket.AF_INET6, address)
    try:
        return address.decode("ascii").lower()
    except UnicodeDecodeError:
        raise ValueError("name") from None


class AssociateLink:
    """See `ztun.ports.DatagramLink`. The association lives as long as its control connection.

    control: the TCP connection on which the proxy granted the association; relay: a UDP socket connected to the address
    that it named. The link owns both. drops: reason -> datagrams that could not be carried, counted up.

    What comes back is reported under the host that was sent to: see Senders.
    """

    def __init__(
        self,
        poller: Poller,
        control: socket.socket,
        relay: socket.socket,
        on_datagram: DatagramHandler,
        on_failure: Callable[[OutboundError], None],
        drops: Counter[str],
    ) -> None:
        self.closed = False
        self._drops = drops
        self._poller = poller
        self._control = control
        self._on_datagram = on_datagram
        self._on_failure = on_failure
        self._headers: dict[Destination, bytes] = {}
        self._senders = Senders()
        self._known: dict[bytes, tuple[str, int]] = {}  # headers that were read -> whom to report
        self._relay = UdpSocket(
            poller, relay, self._received, self._relay_failed, drops, connected=True, head=_IPV4_HEADER
        )
        poller.watch_level(control.fileno(), self._control_readable)

    def send(self, destination: Destination, payload: Buffer) -> None:
        """See `ztun.ports.DatagramLink.send`. Names go to the proxy as they are."""
        self.send_run(destination, (payload,))

    def send_run(self, destination: Destination, payloads: Sequence[Buffer]) -> None:
        """See `ztun.ports.DatagramLink.send_run`."""
        if self.closed:
            return
        header = self._headers.get(destination) or self._add_header(destination)
        try:
            self._relay.send_run(header, payloads, None)
        except OSError as error:
            # Later, since who sends does not expect to lose the link meanwhile.
            asyncio.get_running_loop().call_soon(self._relay_failed, error.errno or 0, None)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._poller.unwatch(self._control.fileno())
        self._control.close()
        self._relay.close()

    def _add_header(self, destination: Destination) -> bytes:
        if len(self._headers) >= _MAX_HEADERS:
            self._headers.clear()
            self._senders.clear()
        header = self._headers[destination] = encode_header(destination)
        self._senders.sent(destination)
        self._known.clear()  # another answer may be meant for this one
        return header

    def _received(self, run: Run) -> None:
        _, head, payload, size = run
        sender = self._known.get(head) or self._learn(head)
        if sender is not None:
            self._on_datagram(*sender, payload, size)
            return
        for at in range(0, len(payload) or 1, size or 1):
            self._received_one(head + payload[at : at + size])
            if self.closed:
                return

    def _learn(self, head: bytes) -> tuple[str, int] | None:
        """Whom to report for datagrams that begin with `head`; None when it is not exactly a header."""
        try:
            host, port, start = decode_header(head)
        except ValueError:
            return None
        if start != len(head):
            return None
        if len(self._known) >= _MAX_HEADERS:
            self._known.clear()
        sender = self._known[head] = self._senders.find(host, port), port
        return sender

    def _received_one(self, datagram: bytes) -> None:
        """A datagram of which nothing is known yet, not even how long its header is."""
        try:
            host, port, start = decode_header(datagram)
        except ValueError as error:
            self._drops[str(error)] += 1
            return
        self._relay.reader.head = start
        payload = memoryview(datagram)[start:]
        self._on_datagram(self._senders.find(host, port), port, payload, len(payload))

    def _relay_failed(self, number: int, address: Address | None) -> None:
        self._fail(f"its relay cannot be reached: {os.strerror(number)}")

    def _control_readable(self, mask: int) -> None:
        try:
            data = self._control.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._fail(f"the association broke: {error.strerror}")
            return
        if not data:  # anything else that it may say has no meaning here
            self._fail("it ended the association")

    def _fail(self, what: str) -> None:
        if not self.closed:
            self.close()
            self._on_failure(OutboundError(Failure.PROXY_FAILED, what))
