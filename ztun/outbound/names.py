"""Names as a proxy may be asked for them."""

from __future__ import annotations

import re

from ztun.ports import Failure, OutboundError

MAX_NAME = 255  # octets: the length field of a SOCKS5 request is one octet (RFC 1928, section 5)

# A label of a DNS name can hold any octet (RFC 2181, section 11), and clients choose the names that they ask for.
# Line ends, blanks and what delimits an authority (RFC 3986, section 3.2) would let them write into our request.
_FORBIDDEN = re.compile(r"[^!-~]|[\"/:<>?#@\[\\\]^`{|}%]")


def proxy_name(host: str) -> str:
    """`host` (a name) in the ASCII form to hand to a proxy. Raises OutboundError when no proxy could take it."""
    try:
        name = host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""  # an empty label, or one of more than 63 octets
    if not name or len(name) > MAX_NAME or _FORBIDDEN.search(name):
        raise OutboundError(Failure.NAME_NOT_FOUND, f"{host!r} is no host name")
    return name
