"""Names that are not like others: answered here, or never told to a public server.

A rule of the configuration that names one of the kinds LOCAL and BLOCKED wins over what is said here; the others hold
always. Everything else, `test` and `example` included, is an ordinary name.
"""

from __future__ import annotations

from enum import Enum
from ipaddress import IPv4Network, IPv6Network

from ztun.names.scan import Labels


class Special(Enum):
    """How a special name is answered."""

    # 127.0.0.1 and ::1, whatever the servers say (RFC 6761 section 6.3).
    LOOPBACK = "loopback"
    # NXDOMAIN: `invalid` (RFC 6761 section 6.4), and the name by which browsers ask whether they may replace the
    # network's DNS by one of their own (https://support.mozilla.org/kb/canary-domain-use-application-dnsnet).
    ABSENT = "absent"
    # NODATA: discovery of designated resolvers (RFC 9462 section 6.4). Forwarded, it would tell clients that upstream
    # speaks DoH, and they would ask there, past us.
    EMPTY = "empty"
    # `onion` (RFC 7686 section 2): for a proxy if a rule sends it there, and for no DNS server ever.
    ONION = "onion"
    # Names of the network around us. Asked only of servers that are part of it (with a private address), else NXDOMAIN:
    # a name without dots, mDNS's `local` (RFC 6762 section 22.1; many sites serve it all the same), `home.arpa`
    # (RFC 8375), `internal`, the customary `lan` and `localdomain`, and reverse zones of private ranges (RFC 6303).
    LOCAL = "local"
    # NXDOMAIN: the names by which Apple devices look for a relay that would go past us
    # (https://developer.apple.com/icloud/prepare-your-network-for-icloud-private-relay).
    BLOCKED = "blocked"


_HOST_OCTETS = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"

_BY_SUFFIX = {
    "localhost": Special.LOOPBACK,
    "invalid": Special.ABSENT,
    "use-application-dns.net": Special.ABSENT,
    "resolver.arpa": Special.EMPTY,
    "onion": Special.ONION,
    "local": Special.LOCAL,
    "home.arpa": Special.LOCAL,
    "internal": Special.LOCAL,
    "lan": Special.LOCAL,
    "localdomain": Special.LOCAL,
    "mask.icloud.com": Special.BLOCKED,
    "mask-h2.icloud.com": Special.BLOCKED,
}


def special(name: str) -> Special | None:
    """What is special about a name (lower case, no trailing dot), or None. The root is not."""
    rest = name
    while rest:
        found = _BY_SUFFIX.get(rest)
        if found is not None:
            return found
        rest = rest.partition(".")[2]
    if name and "." not in name:
        return Special.LOCAL
    zone = _reverse_network(name) if name.endswith(".arpa") else None
    return Special.LOCAL if zone is not None and zone.is_private else None


def reverse_address(name: str) -> bytes | None:
    """The packed address whose reverse name (RFC 1035 section 3.5, RFC 3596 section 2.5) this is, or None."""
    network = _reverse_network(name)
    if network is None or network.prefixlen != network.max_prefixlen:
        return None
    return network.network_address.packed


def _reverse_network(name: str) -> IPv4Network | IPv6Network | None:
    """The network whose reverse zone this is: a single address at the deepest."""
    labels = name.split(".")
    digits = labels[-3::-1]
    if labels[-2:] == ["in-addr", "arpa"]:
        octets = _from_digits(digits, base=10, count=4)
        return IPv4Network((octets, 8 * len(digits))) if octets else None
    if labels[-2:] == ["ip6", "arpa"]:
        nibbles = _from_digits(digits, base=16, count=32)
        if nibbles:
            packed = bytes(high << 4 | low for high, low in zip(nibbles[::2], nibbles[1::2], strict=True))
            return IPv6Network((packed, 4 * len(digits)))
    return None


def _from_digits(labels: list[str], *, base: int, count: int) -> bytes | None:
    """The labels as numbers, zeros for what is missing; None when there are none, too many, or other things."""
    longest, largest = (3, 255) if base == 10 else (1, 15)
    digits = set("0123456789abcdef"[:base])
    if not 0 < len(labels) <= count:
        return None
    if not all(0 < len(label) <= longest and digits >= set(label) for label in labels):
        return None
    values = [int(label, base) for label in labels]
    return bytes(values + [0] * (count - len(values))) if max(values) <= largest else None


def is_hostname(labels: Labels) -> bool:
    """Whether a name may be handed to a proxy as the name of a host.

    Letters, digits, hyphen and underscore only: a name that carries, say, a line break must not get into the request
    line of an HTTP CONNECT. And its last label is no number, since a proxy would take "10.0.0.5" or "0x0a000005" for an
    address, one that the rules were never asked about (RFC 3696 section 2; https://url.spec.whatwg.org/#ends-in-a-number-checker).
    """
    if not labels or any(label.translate(None, _HOST_OCTETS) for label in labels):
        return False
    last = labels[-1].lower()
    return not (last.isdigit() or (last.startswith(b"0x") and all(octet in b"0123456789abcdef" for octet in last[2:])))
