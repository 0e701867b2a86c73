"""HTTP proxies: CONNECT (RFC 9110, section 9.3.6) with Basic authentication (RFC 7617)."""

from __future__ import annotations

import re
from base64 import b64encode

from ztun.outbound import tcp
from ztun.outbound.base import ProxyOutbound
from ztun.outbound.dial import Dialogue
from ztun.outbound.errors import failure_of, os_error
from ztun.outbound.names import proxy_name
from ztun.ports import Destination, Failure, OutboundError

MAX_HEADER = 65536  # bytes of status lines and header fields before the proxy is given up

_END = re.compile(rb"\n\r?\n")  # a lone LF may end a line (RFC 9112, section 2.2)
_START = b"HTTP/"
_STATUS = re.compile(rb"HTTP/1\.[0-9] +([0-9]{3})(?![0-9])")  # RFC 9112, section 4

_FAILURES = {
    401: Failure.PROXY_AUTHENTICATION,
    403: Failure.PROHIBITED,
    405: Failure.UNSUPPORTED,
    407: Failure.PROXY_AUTHENTICATION,
    451: Failure.PROHIBITED,
    501: Failure.UNSUPPORTED,
    502: Failure.HOST_UNREACHABLE,
    503: Failure.HOST_UNREACHABLE,
    504: Failure.TIMED_OUT,
}

# The error types of Proxy-Status (RFC 9209, section 2.3)
_PROXY_STATUS = re.compile(rb"^proxy-status:[^\r\n]*;\s*error=\"?([a-z_]+)", re.IGNORECASE | re.MULTILINE)
_PROXY_STATUS_FAILURES = {
    b"connection_refused": Failure.REFUSED,
    b"connection_timeout": Failure.TIMED_OUT,
    b"destination_ip_prohibited": Failure.PROHIBITED,
    b"destination_ip_unroutable": Failure.NETWORK_UNREACHABLE,
    b"destination_unavailable": Failure.HOST_UNREACHABLE,
    b"dns_error": Failure.NAME_NOT_FOUND,
    b"dns_timeout": Failure.TIMED_OUT,
    b"http_request_denied": Failure.PROHIBITED,
}

# Squid's own field: the page that it shows, and the errno behind it
_SQUID_ERROR = re.compile(rb"^x-squid-error:\s*(ERR_[A-Z_]+)\s+([0-9]{1,4})", re.IGNORECASE | re.MULTILINE)
_SQUID_FAILURES = {
    b"ERR_DNS_FAIL": Failure.NAME_NOT_FOUND,
    b"ERR_ACCESS_DENIED": Failure.PROHIBITED,
    b"ERR_CACHE_ACCESS_DENIED": Failure.PROXY_AUTHENTICATION,
}


def connect_request(host: str, port: int, credentials: tuple[str, str] | None) -> bytes:
    """A CONNECT request with Basic authentication, its credentials in UTF-8 (RFC 7617, section 2.1).

    host: a name, or an address literal; an IPv6 one is bracketed here.
    """
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
    if credentials is not None:
        lines.append(f"Proxy-Authorization: Basic {b64encode(':'.join(credentials).encode()).decode()}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


class HttpDialogue:
    """The CONNECT exchange, sans-IO. Everything up to the end of the header fields is the proxy's, and no byte more."""

    def __init__(self, destination: Destination, credentials: tuple[str, str] | None) -> None:
        host = destination.host if tcp.is_literal(destination.host) else proxy_name(destination.host)
        self.done = False
        self.asked = False
        self.least = 0
        self._request = connect_request(host, destination.port, credentials)
        self._header = bytearray()
        self._total = 0

    def start(self) -> bytes:
        self.asked = True
        return self._request

    def receive(self, data: bytes) -> tuple[int, bytes]:
        known = len(self._header)
        self._header += data
        if not self._header.startswith(_START[: len(self._header)]):
            raise OutboundError(Failure.PROXY_FAILED, "it does not speak HTTP")
        end = _END.search(self._header, max(0, known - 2))
        taken = end.end() - known if end else len(data)
        self._total += taken
        if self._total > MAX_HEADER:
            raise OutboundError(Failure.PROXY_FAILED, f"its answer has more than {MAX_HEADER} bytes of header fields")
        if end:
            self._handle_header(bytes(self._header[: end.end()]))
        return taken, b""

    def _handle_header(self, header: bytes) -> None:
        line = header.split(b"\n", 1)[0].strip()
        found = _STATUS.match(line)
        status = int(found[1]) if found else 0
        if 200 <= status < 300:  # any of them opens the tunnel (RFC 9110, section 9.3.6)
            self.done = True
        elif 100 <= status < 200 and status != 101:  # interim: the real answer follows (RFC 9110, section 15.2)
            self._header.clear()
        else:
            failure = _told_reason(header) or _FAILURES.get(status, Failure.PROXY_FAILED)
            said = line[:200].decode("latin-1").encode("unicode_escape").decode("ascii")  # for terminals
            raise OutboundError(failure, f"it answered {said}")


def _told_reason(header: bytes) -> Failure | None:
    """The reason that a proxy gives beside the status, which tells refused from unreachable."""
    if found := _PROXY_STATUS.search(header):
        return _PROXY_STATUS_FAILURES.get(found[1].lower())
    if found := _SQUID_ERROR.search(header):
        return _SQUID_FAILURES.get(found[1]) or (failure_of(os_error(int(found[2]))) if int(found[2]) else None)
    return None


class HttpOutbound(ProxyOutbound):
    """An HTTP proxy. See ProxyOutbound for the arguments."""

    type = "http"

    def _why_rejected(self) -> str:
        return "an HTTP proxy carries no datagrams"

    def _dialogue(self, destination: Destination, *, greeted: bool = False) -> Dialogue:
        return HttpDialogue(destination, self._credentials)
