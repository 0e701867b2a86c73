"""Addresses, names and ports of the laboratory: who is where.

The documentation ranges (RFC 5737, RFC 3849) play the internet.
"""

from __future__ import annotations

CLIENT4 = "10.10.0.2"
CLIENT6 = "fd10:10::2"
CLIENT4_OTHER = "10.10.0.3"  # a second host of the LAN, for source_cidr
CLIENT6_OTHER = "fd10:10::3"

GATEWAY_LAN4 = "10.10.0.1"
GATEWAY_LAN6 = "fd10:10::1"
GATEWAY_WAN4 = "10.20.0.1"
GATEWAY_WAN6 = "fd10:20::1"

UPSTREAM4 = "10.20.0.2"  # the proxies and the resolver live here; what they fetch is seen to come from here
UPSTREAM6 = "fd10:20::2"

SITE4 = "203.0.113.10"
SITE6 = "2001:db8::10"
DIRECT4 = "198.51.100.10"
DIRECT6 = "2001:db8:1::10"
SHARED4 = "198.51.100.20"  # for rules that an address alone does not decide
SHARED6 = "2001:db8:1::20"
BLOCKED4 = "203.0.113.66"
BLOCKED6 = "2001:db8::66"
RESOLVER_ELSEWHERE4 = "198.51.100.53"
RESOLVER_ELSEWHERE6 = "2001:db8:1::53"
SILENT4 = "203.0.113.98"  # swallows everything: a connection attempt runs into its time-out
UNREACHABLE4 = "203.0.113.99"  # answered with ICMP host unreachable, by the proxy with the SOCKS reply of that name
UNREACHABLE6 = "2001:db8::99"

INTERNET4 = (SITE4, DIRECT4, SHARED4, BLOCKED4, RESOLVER_ELSEWHERE4, SILENT4)
INTERNET6 = (SITE6, DIRECT6, SHARED6, BLOCKED6, RESOLVER_ELSEWHERE6)

# name -> addresses, as the resolver in upstream gives them
NAMES: dict[str, tuple[str, ...]] = {
    "site.test": (SITE4, SITE6),
    "www.site.test": (SITE4, SITE6),
    "secure.test": (SITE4, SITE6),
    "v4only.test": (SITE4,),
    "v6only.test": (SITE6,),
    "direct.test": (DIRECT4, DIRECT6),
    "web.test": (SITE4, SITE6),
    "blocked.test": (BLOCKED4, BLOCKED6),
    "telemetry.test": (BLOCKED4, BLOCKED6),
    "unreachable.test": (UNREACHABLE4,),
    "silent.test": (SILENT4,),
    "shared.test": (SHARED4, SHARED6),
}
BULK_DOMAIN = "bulk.test"  # every name below it is SITE4, SITE6

HTTP_PORT = 80
HTTPS_PORT = 443
IPERF_PORT = 5201

# ztun.lab.peers
ECHO_PORT = 7000  # TCP and UDP; the TCP one ends with the client's FIN
BANNER_PORT = 7001  # speaks first
CLIENT_FIRST_PORT = 7002  # waits for a line
DIGEST_PORT = 7003  # answers FIN with the SHA-256 of all it got
RESET_PORT = 7004  # answers a line with RST
FIN_FIRST_PORT = 7005  # half-closes first, and goes on reading
WHOAMI_PORT = 7006  # UDP: answers with the sender's address
CLOSED_PORT = 7999  # nobody listens

SOCKS_PORT = 1080  # microsocks
SOCKS_AUTH_PORT = 1081  # microsocks, user and password below
SOCKS_UDP_PORT = 1082  # danted, or sing-box where there is none: with UDP ASSOCIATE
HTTP_PROXY_PORT = 3128  # tinyproxy
HTTP_PROXY_AUTH_PORT = 3129  # tinyproxy, user and password below
PROXY_USER = "lab"
PROXY_PASSWORD = "correct-horse"
