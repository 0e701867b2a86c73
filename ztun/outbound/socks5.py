"""SOCKS5 proxies (RFC 1928), without authentication or with username and password (RFC 1929)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from typing import Any, Final

from ztun.outbound import tcp
from ztun.outbound.associate import AssociateLink
from ztun.outbound.base import FailureHandler, Link, ProxyOutbound, Tools
from ztun.outbound.dial import Dial, Dialogue, Stage
from ztun.outbound.names import proxy_name
from ztun.outbound.resolving import resolved
from ztun.outbound.together import Together
from ztun.outbound.verdict import DatagramVerdict
from ztun.ports import DatagramHandler, Destination, Dialling, Failure, OutboundError

_VERSION: Final = 5
_AUTHENTICATION_VERSION: Final = 1  # RFC 1929, section 2
# methods
_NONE: Final = 0
_USERNAME: Final = 2
_NO_ACCEPTABLE: Final = 0xFF
# commands
_CONNECT: Final = 1
_ASSOCIATE: Final = 3
# ATYP
_IPV4: Final = 1
_NAME: Final = 3
_IPV6: Final = 4

_GREETING: Final = bytes((_VERSION, 1, _NONE))
# Method and reply of a proxy that grants a request, up to BND.ADDR, where they come together.
_GRANTED: Final = bytes((_VERSION, _NONE, _VERSION, 0, 0, _IPV4))
_GRANTED_IPV4: Final = _GRANTED[2:]  # of the reply alone
_GRANTED_LENGTH: Final = len(_GRANTED) + 4 + 2

_FAILURES: Final = {
    1: (Failure.PROXY_FAILED, "it failed for a reason of its own"),
    2: (Failure.PROHIBITED, "its ruleset does not allow the connection"),
    3: (Failure.NETWORK_UNREACHABLE, "the network is unreachable from it"),
    4: (Failure.HOST_UNREACHABLE, "the host is unreachable from it"),
    5: (Failure.REFUSED, "the destination refused the connection"),
    6: (Failure.TIMED_OUT, "the time to live expired"),
    7: (Failure.UNSUPPORTED, "it does not support the command"),
    8: (Failure.UNSUPPORTED, "it does not support the type of address"),
}

# Replies by which a proxy says that it carries no datagrams, for us at least.
_NO_DATAGRAMS: Final = {2: Failure.PROHIBITED, 7: Failure.UNSUPPORTED, 8: Failure.UNSUPPORTED}

_SHORT: Final = 2  # version and method; version and status; and of a reply that reports a failure
_LENGTH_KNOWN: Final = 5  # with this many bytes of a reply, its length is known
_SHORTEST_REPLY: Final = 4 + 4 + 2  # of those that grant a request, but for names of one or two letters
_REPLY_SIZES: Final = {_IPV4: 4 + 4 + 2, _IPV6: 4 + 16 + 2}  # a name comes behind its length


def encode_request(command: int, host: str, port: int) -> bytes:
    """VER, CMD, RSV, ATYP, DST.ADDR and DST.PORT (RFC 1928, section 4). host: a literal, or a name of up to 255 bytes.

    Raises OutboundError for what is no name.
    """
    end = port.to_bytes(2, "big")
    if not tcp.is_literal(host):
        name = proxy_name(host).encode("ascii")
        return bytes((_VERSION, command, 0, _NAME, len(name))) + name + end
    if ":" in host:
        return bytes((_VERSION, command, 0, _IPV6)) + socket.inet_pton(socket.AF_INET6, host.partition("%")[0]) + end
    return bytes((_VERSION, command, 0, _IPV4)) + socket.inet_aton(host) + end


@lru_cache(maxsize=4096)
def connect_request(destination: Destination) -> bytes:
    """The request for a connection. Raises OutboundError for what is no name."""
    return encode_request(_CONNECT, *destination)


class _State(Enum):
    METHOD = 0
    AUTHENTICATION = 1
    REPLY = 2


class Socks5Dialogue:
    """Method negotiation, authentication and one request, sans-IO. It takes the replies to the byte.

    request: see `encode_request`; None to be done when the request is due. greeted: another one was done that far.
    together: say all at once, offering the one method that is meant (see ztun.outbound.together).
    """

    __slots__ = (
        "_credentials",
        "_message",
        "_reply",
        "_request",
        "_state",
        "asked",
        "code",
        "done",
        "least",
        "together",
    )  # fmt: skip

    def __init__(
        self,
        request: bytes | None,
        credentials: tuple[str, str] | None,
        *,
        greeted: bool = False,
        together: bool = False,
    ) -> None:
        self.done = False
        self.together = together
        self.least = (_SHORT if credentials is None else 2 * _SHORT) + _SHORTEST_REPLY if together else 0
        self.asked = False
        self.code: int | None = None  # the reply's, which is 0 when it granted the request
        self._request = request
        self._credentials = credentials
        self._state = _State.REPLY if greeted else _State.METHOD
        self._message = b""
        self._reply = b""  # that which granted the request

    @property
    def bound(self) -> tuple[str, int]:
        """BND.ADDR and BND.PORT of the reply; an empty host before it came."""
        reply = self._reply
        if not reply:
            return "", 0
        if reply[3] == _NAME:
            host = reply[5:-2].decode()
        else:
            host = socket.inet_ntop(socket.AF_INET if reply[3] == _IPV4 else socket.AF_INET6, reply[4:-2])
        return host, int.from_bytes(reply[-2:], "big")

    def start(self) -> bytes:
        """The methods that we can, or the request when they were agreed upon before."""
        if self._state is _State.REPLY:
            return self._ask()
        if self.together:
            return self._say_all()
        if self._credentials is None:
            return _GREETING
        return bytes((_VERSION, 2, _NONE, _USERNAME))

    def _say_all(self) -> bytes:
        """What would be said one message after the other, if the proxy takes what we mean."""
        assert self._request is not None
        if self._credentials is None:
            return _GREETING + self._request
        return bytes((_VERSION, 1, _USERNAME)) + self._authentication() + self._request

    def receive(self, data: bytes) -> tuple[int, bytes]:
        """See `Dialogue.receive`."""
        if self.together:
            return self._receive_together(data), b""
        return self._receive(data)

    def _receive_together(self, data: bytes) -> int:
        """Everything was said, so there is no answer. Nearly always this is the whole of what the proxy says."""
        if self.least and len(data) == _GRANTED_LENGTH and data.startswith(_GRANTED):
            self.asked = self.done = True  # where it connects from is nobody's business
            self.code = 0
            return _GRANTED_LENGTH
        taken, _ = self._receive(data)
        return taken

    def _receive(self, data: bytes) -> tuple[int, bytes]:
        """The ways for a message that comes whole, as nearly all do, and for one in pieces."""
        if not self._message:
            if self._state is not _State.REPLY:
                if len(data) == _SHORT:
                    return _SHORT, self._take(data)
            elif data.startswith(_GRANTED_IPV4) and len(data) >= _SHORTEST_REPLY:
                self._grant(data[:_SHORTEST_REPLY])
                return _SHORTEST_REPLY, b""
        return self._receive_pieces(data)

    def _receive_pieces(self, data: bytes) -> tuple[int, bytes]:
        taken, answer = 0, b""
        while taken < len(data) and not self.done:
            missing = self._size() - len(self._message)
            piece = data[taken : taken + missing]
            self._message += piece
            taken += len(piece)
            if len(piece) == missing and len(self._message) == self._size():
                message, self._message = self._message, b""
                answer += self._take(message)
        return taken, answer

    def _size(self) -> int:
        """The length of the message that is being read, as far as it is known."""
        message = self._message
        if self._state is not _State.REPLY:
            return _SHORT
        if len(message) < _SHORT or message[0] != _VERSION or message[1]:
            return _SHORT  # a failure says all there is to know in two bytes
        if len(message) < _LENGTH_KNOWN:
            return _LENGTH_KNOWN
        if message[3] == _NAME:
            return 4 + 1 + message[4] + 2
        return _REPLY_SIZES.get(message[3], _LENGTH_KNOWN)

    def _take(self, message: bytes) -> bytes:
        if self._state is _State.METHOD:
            return self._take_method(message)
        if self._state is _State.AUTHENTICATION:
            if message[0] != _AUTHENTICATION_VERSION:
                raise _malformed(message)
            if message[1]:
                raise OutboundError(Failure.PROXY_AUTHENTICATION, "it did not accept the username and password")
            return self._ask()
        self._take_reply(message)
        return b""

    def _take_method(self, message: bytes) -> bytes:
        version, method = message
        if version == _VERSION and method == _NONE and not (self.together and self._credentials):
            return self._ask()
        if version == _VERSION and method == _USERNAME and self._credentials is not None:
            self._state = _State.AUTHENTICATION
            return self._authentication()
        if version == _VERSION and method in (1, _USERNAME, _NO_ACCEPTABLE):
            wanted = "it accepts no method of authentication that we have"
            raise OutboundError(Failure.PROXY_AUTHENTICATION, wanted if self._credentials else "it wants a username")
        raise _malformed(message)

    def _authentication(self) -> bytes:
        """The message of RFC 1929, section 2."""
        assert self._credentials is not None
        username, password = (text.encode() for text in self._credentials)
        return bytes((_AUTHENTICATION_VERSION, len(username))) + username + bytes((len(password),)) + password

    def _ask(self) -> bytes:
        self._state = _State.REPLY
        if self._request is None:
            self.done = True
            return b""
        self.asked = True
        return self._request

    def _take_reply(self, message: bytes) -> None:
        if message[0] != _VERSION:
            raise _malformed(message)
        self.code = message[1]
        if message[1]:
            raise OutboundError(*_FAILURES[message[1]]) if message[1] in _FAILURES else _malformed(message)
        if message[2]:
            raise _malformed(message)  # RSV, which is 0
        kind = message[3]
        if kind == _NAME:
            try:
                message[5:-2].decode()
            except UnicodeDecodeError:
                raise _malformed(message) from None
        elif kind not in (_IPV4, _IPV6):
            raise _malformed(message)
        self._grant(message)

    def _grant(self, reply: bytes) -> None:
        self.code = 0
        self._reply = reply
        self.done = True


def _malformed(message: bytes) -> OutboundError:
    return OutboundError(Failure.PROXY_FAILED, f"it answered with what is no SOCKS5: {message[:8].hex(' ')}")


def _is_doubtful(dial: Dial, dialogue: Socks5Dialogue) -> bool:
    """It took the greeting and did not answer the request."""
    return dial.stage is Stage.NEGOTIATING and dialogue.code is None


class Socks5Outbound(ProxyOutbound):
    """A SOCKS5 proxy. See ProxyOutbound for the arguments."""

    type = "socks5"

    def __init__(
        self,
        tag: str,
        host: str,
        port: int,
        credentials: tuple[str, str] | None,
        tools: Tools,
        udp: DatagramVerdict,
    ) -> None:
        super().__init__(tag, host, port, credentials, tools, udp)
        self._together = Together(self._ask_for_nothing, self._forget_waiting)

    def _dialogue(self, destination: Destination, *, greeted: bool = False) -> Dialogue:
        request, together = connect_request(destination), self._together.may()
        return Socks5Dialogue(request, self._credentials, greeted=greeted and not together, together=together)

    def _greeting(self) -> Dialogue | None:
        return None if self._together.known else Socks5Dialogue(None, self._credentials)

    def _ask_for_nothing(self, answered: Callable[[bool | None], None]) -> Dialling:
        """Say greeting and a request at once, one that costs the proxy nothing and changes nothing anywhere."""
        dialogue = Socks5Dialogue(encode_request(_ASSOCIATE, "0.0.0.0", 0), self._credentials, together=True)
        dialogue.least = 0  # its first two bytes are news, too

        def connected(sock: socket.socket, more: bool) -> None:
            self.poller.closing(sock.fileno())
            sock.close()
            answered(len(dialogue.bound[0]) > 2)  # a shorter name, and its replies are shorter than `least`

        def failed(error: OutboundError) -> None:
            answered(dialogue.code is not None if dialogue.asked else None)

        return self._dial(dialogue, connected, failed, counted=False)

    def warm_up(self) -> None:
        """See `ztun.ports.Outbound.warm_up`."""
        self._together.ask()
        super().warm_up()

    def describe(self, dial: Dial, error: OSError | OutboundError) -> OutboundError:
        """See BaseOutbound.describe."""
        dialogue = dial.dialogue
        if isinstance(dialogue, Socks5Dialogue) and dialogue.together and dial.counted and _is_doubtful(dial, dialogue):
            self._together.doubt()
        return super().describe(dial, error)

    def statistics(self) -> dict[str, Any]:
        """As ProxyOutbound.statistics, and together: whether the proxy takes greeting and request at once, if known."""
        return {**super().statistics(), "together": self._together.known}

    async def close(self) -> None:
        """See BaseOutbound.close."""
        self._together.close()
        await super().close()

    async def _open_proxied_link(self, on_datagram: DatagramHandler, on_failure: FailureHandler) -> Link:
        """Ask for an association. No ICMP error comes through a proxy, so there is nobody to tell of one."""
        # We do not know yet from where we send: zeros say so (RFC 1928, section 4).
        dialogue = Socks5Dialogue(encode_request(_ASSOCIATE, "0.0.0.0", 0), self._credentials)
        try:
            control = await self._negotiated(dialogue)
        except OutboundError as error:
            raise self._not_associated(dialogue, error) from None
        relay: socket.socket | None = None
        try:
            host, port = await self._relay_address(control, dialogue.bound)
            relay = self.factory(tcp.family_of(host), socket.SOCK_DGRAM)
            relay.connect((host, port))
            return AssociateLink(self.poller, control, relay, on_datagram, on_failure, self.drops)
        except BaseException as error:
            control.close()
            if relay is not None:
                relay.close()
            if isinstance(error, OSError):
                what = f"{self._server}: its relay cannot be reached: {error.strerror or 'its name does not resolve'}"
                raise self._error(Failure.PROXY_UNREACHABLE, what) from None
            raise

    def _not_associated(self, dialogue: Socks5Dialogue, error: OutboundError) -> OutboundError:
        """What it says of the proxy that it did not grant an association.

        Some servers without UDP do not say so: OpenSSH closes the connection.
        """
        if not dialogue.asked:
            return error
        now = time.monotonic()
        told = OutboundError(error.failure, f"{error} (UDP ASSOCIATE)")
        if dialogue.code in _NO_DATAGRAMS:
            return self.datagrams.refuse(_NO_DATAGRAMS[dialogue.code], str(told), now)
        return self.datagrams.fail(told, now)

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
