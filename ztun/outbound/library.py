"""The one place that touches python-socks, through its sans-IO messages.

The public `AsyncioProxy` makes and connects a socket of its own, which would carry no mark and be captured by our own
classifier; its HTTP connector also takes whatever arrived together with the proxy's reply, so the first bytes of a
destination that speaks first (SSH, SMTP) would be lost. The messages underneath have neither fault, but they are
private: pyproject.toml pins the major version that this was checked against.
"""

from __future__ import annotations

from python_socks._protocols import http, socks5
from python_socks._protocols.errors import ReplyError

# What decoding a message can raise, the library's own error aside: a name that is no UTF-8, an address of a wrong size.
MALFORMED = (ReplyError, ValueError, IndexError, OSError)

HttpReply = http.ConnectReply
Socks5Connection = socks5.Connection
Socks5Reply = socks5.ConnectReply
Socks5Request = socks5.ConnectRequest
WaitingForMethod = socks5.StateClientSentAuthMethods
WaitingForAuthentication = socks5.StateClientSentAuthRequest
WaitingForReply = socks5.StateClientSentConnectRequest
UserPassword = socks5.AuthMethod.USERNAME_PASSWORD


class Authentication(socks5.AuthRequest):
    """The username and password, as octets (RFC 1929, section 2): the library would take ASCII only."""

    def dumps(self) -> bytes:
        username, password = self.username.encode(), self.password.encode()
        return bytes((self.VER, len(username))) + username + bytes((len(password),)) + password


class AssociateRequest(socks5.ConnectRequest):
    """UDP ASSOCIATE, which the library knows by number only (RFC 1928, section 4)."""

    def dumps(self) -> bytes:
        return bytes((socks5.SOCKS_VER, socks5.Command.UDP_ASSOCIATE, socks5.RSV)) + self._build_addr_request()


def socks5_methods(credentials: tuple[str, str] | None) -> socks5.AuthMethodsRequest:
    """The greeting: no authentication, and username/password where there are credentials."""
    username, password = credentials or (None, None)
    return socks5.AuthMethodsRequest(username=username, password=password)


def http_request(host: str, port: int, credentials: tuple[str, str] | None) -> bytes:
    """A CONNECT request with Basic authentication, its credentials in UTF-8 (RFC 7617, section 2.1).

    host: a name, or an address literal; an IPv6 one is bracketed here.
    """
    if ":" in host:
        host = f"[{host}]"
    username = password = None
    if credentials is not None:
        # The library encodes them as Latin-1: so handed over, the octets on the wire are UTF-8.
        username, password = (text.encode().decode("latin-1") for text in credentials)
    return http.ConnectRequest(host=host, port=port, username=username, password=password).dumps()


def error_code(error: BaseException) -> int | None:
    """The reply's own code, where the proxy answered with a failure."""
    return error.error_code if isinstance(error, ReplyError) else None
