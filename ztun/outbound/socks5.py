"""SOCKS5 proxies (RFC 1928), without authentication or with username and password (RFC 1929)."""

from __future__ import annotations

import asyncio
import socket

from ztun.outbound import library, tcp
from ztun.outbound.associate import AssociateLink
from ztun.outbound.base import FailureHandler, Link, ProxyOutbound, resolved
from ztun.outbound.names import proxy_name
from ztun.ports import DatagramHandler, Destination, Failure, OutboundError, UnreachableHandler

_FAILURES = {
    1: (Failure.PROXY_FAILED, "it failed for a reason of its own"),
    2: (Failure.PROHIBITED, "its ruleset does not allow the connection"),
    3: (Failure.NETWORK_UNREACHABLE, "the network is unreachable from it"),
    4: (Failure.HOST_UNREACHABLE, "the host is unreachable from it"),
    5: (Failure.REFUSED, "the destination refused the connection"),
    6: (Failure.TIMED_OUT, "the time to live expired"),
    7: (Failure.UNSUPPORTED, "it does not support the command"),
    8: (Failure.UNSUPPORTED, "it does not support the type of address"),
}

_NO_ACCEPTABLE_METHOD = 0xFF
_METHOD_SIZE = 2  # version, method; and of the authentication's answer: version, status
_LENGTH_KNOWN = 5  # with this many bytes of a reply, its length is known
_REPLY_SIZES = {1: 4 + 4 + 2, 4: 4 + 16 + 2}  # by address type; 3 is a name behind its length


class Socks5Dialogue:
    """Method negotiation, authentication and one request, sans-IO. It takes the replies to the byte."""

    def __init__(self, request: library.Socks5Request, credentials: tuple[str, str] | None) -> None:
        self.done = False
        self.asked = False
        self.bound: tuple[str, int] = ("", 0)  # BND.ADDR and BND.PORT of the reply
        self._request = request
        self._credentials = credentials
        self._connection = library.Socks5Connection()
        self._message = bytearray()

    def start(self) -> bytes:
        return self._connection.send(library.socks5_methods(self._credentials))

    def receive(self, data: bytes) -> tuple[int, bytes]:
        taken, answer = 0, b""
        while taken < len(data) and not self.done:
            piece = data[taken : taken + self._size() - len(self._message)]
            self._message += piece
            taken += len(piece)
            if len(self._message) == self._size():
                answer += self._handle_message()
        return taken, answer

    def _size(self) -> int:
        """The length of the message that is being read, as far as it is known."""
        message = self._message
        if not isinstance(self._connection.state, library.WaitingForReply):
            return _METHOD_SIZE
        if len(message) < 2 or message[0] != 5 or message[1]:
            return 2  # a failure says all there is to know in two bytes
        if len(message) < _LENGTH_KNOWN:
            return _LENGTH_KNOWN
        if message[3] == 3:
            return 4 + 1 + message[4] + 2
        return _REPLY_SIZES.get(message[3], _LENGTH_KNOWN)

    def _handle_message(self) -> bytes:
        state = self._connection.state
        message = bytes(self._message)
        self._message.clear()
        try:
            reply = self._connection.receive(message)
        except library.MALFORMED as error:
            raise self._refusal(state, message, error) from None
        if isinstance(state, library.WaitingForReply):
            assert isinstance(reply, library.Socks5Reply)
            self.bound = reply.bound_host, reply.bound_port
            self.done = True
            return b""
        if isinstance(state, library.WaitingForMethod) and message[1] == library.UserPassword:
            assert self._credentials is not None  # the library refuses a method that was not offered
            return self._connection.send(library.Authentication(*self._credentials))
        self.asked = True
        return self._connection.send(self._request)

    def _refusal(self, state: object, message: bytes, error: Exception) -> OutboundError:
        """What a reply that the library did not take means."""
        code = library.error_code(error)
        if code in _FAILURES:
            return OutboundError(*_FAILURES[code])
        version, status = message[:2]
        if isinstance(state, library.WaitingForMethod) and version == 5 and status in (1, 2, _NO_ACCEPTABLE_METHOD):
            wanted = (
                "it accepts no method of authentication that we have" if self._credentials else "it wants a username"
            )
            return OutboundError(Failure.PROXY_AUTHENTICATION, wanted)
        if isinstance(state, library.WaitingForAuthentication) and version == 1:
            return OutboundError(Failure.PROXY_AUTHENTICATION, "it did not accept the username and password")
        return OutboundError(Failure.PROXY_FAILED, f"it answered with what is no SOCKS5: {message[:8].hex(' ')}")


class Socks5Outbound(ProxyOutbound):
    """A SOCKS5 proxy. See ProxyOutbound for the arguments."""

    type = "socks5"

    async def _dial(self, destination: Destination) -> socket.socket:
        host = destination.host if tcp.is_literal(destination.host) else proxy_name(destination.host)
        request = library.Socks5Request(host=host, port=destination.port)
        return await self._negotiated(Socks5Dialogue(request, self._credentials))

    async def _open_link(
        self, on_datagram: DatagramHandler, on_failure: FailureHandler, on_unreachable: UnreachableHandler | None
    ) -> Link:
        """Ask for an association. No ICMP error comes through a proxy, so `on_unreachable` has nothing to tell."""
        # We do not know yet from where we send: zeros say so (RFC 1928, section 4).
        dialogue = Socks5Dialogue(library.AssociateRequest(host="0.0.0.0", port=0), self._credentials)
        control = await self._negotiated(dialogue)
        relay: socket.socket | None = None
        try:
            host, port = await self._relay_address(control, dialogue.bound)
            relay = self._factory(tcp.family_of(host), socket.SOCK_DGRAM)
            relay.connect((host, port))
            return AssociateLink(control, relay, on_datagram, on_failure, self.drops)
        except BaseException as error:
            control.close()
            if relay is not None:
                relay.close()
            if isinstance(error, OSError):
                what = f"{self._server}: its relay cannot be reached: {error.strerror or 'its name does not resolve'}"
                raise self._error(Failure.PROXY_UNREACHABLE, what) from None
            raise

    async def _relay_address(self, control: socket.socket, bound: tuple[str, int]) -> tuple[str, int]:
        """Where the relay listens. All zeros mean the address at which the proxy was reached."""
        host, port = bound
        if not port:
            raise self._error(Failure.PROXY_FAILED, f"{self._server} named port 0 for its relay")
        if host in ("0.0.0.0", "::", ""):
            return str(control.getpeername()[0]), port
        if not tcp.is_literal(host):
            try:
                async with asyncio.timeout(self._dial_timeout):
                    host = (await resolved(self._resolve, host))[0]
            except OutboundError as error:
                what = f"{self._server}: the name of its relay does not resolve: {error}"
                raise self._error(Failure.PROXY_UNREACHABLE, what) from None
        return host, port
