"""What single values look like, for the JSON Schema of the configuration.

A schema is for editors, and for looking at a file before it reaches the machine. It takes everything that values.py
takes in its usual spelling, and refuses most of what that refuses: the last word is `ztun check`'s.
"""

from __future__ import annotations

from pydantic import WithJsonSchema


def _text(pattern: str, *examples: str) -> WithJsonSchema:
    """A string. pattern: a regular expression that ECMA-262 and Python read alike."""
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": list(examples)})


INTERFACE = _text(r"^[^\s/:]{1,15}$", "eth1")
LISTEN = _text(r"^(\[[^\]]+\]|[0-9.]+):[0-9]{1,5}$", "10.0.0.1:53", "[2001:db8::1]:53")
DNS_SERVER = _text(r"^(udp|tcp|tls|https)://[^\s?#@]+$", "udp://9.9.9.9", "https://dns.example/dns-query")
MAC = _text(r"^([0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}|[0-9a-fA-F]{4}(\.[0-9a-fA-F]{4}){2})$", "52:54:00:12:34:56")
NETWORK = _text(r"^[0-9a-fA-F:.]+(/[0-9]{1,3})?$", "192.0.2.0/24", "2001:db8::/32")
NETWORK4 = _text(r"^[0-9.]+(/[0-9]{1,2})?$", "198.18.0.0/15")
NETWORK6 = _text(r"^[0-9a-fA-F.]*:[0-9a-fA-F:.]*(/[0-9]{1,3})?$", "2001:2::/48")
ADDRESS4 = _text(r"^[0-9.]+/[0-9.]+$", "198.18.0.1/15")
ADDRESS6 = _text(r"^[^/]*:[^/]*/[0-9]{1,3}$", "2001:2::1/48")
NAME = _text(r"^[^.*]", "corp.example")
KEYWORD = _text(r"^[A-Za-z0-9._-]{1,253}$", "telemetry")
COUNTRY = _text(r"^[A-Za-z]{2}$", "de")
TAG = _text(r"^[A-Za-z0-9_.-]{1,64}$", "office")
SERVER = _text(r"^(\[[^\]]+\]|[^\[\]:@/]+):[0-9]{1,5}$", "10.1.1.1:1080", "[2001:db8::1]:1080")
XDP = WithJsonSchema({"enum": [True, False, "native", "generic"]})
PATH = WithJsonSchema({"type": "string", "minLength": 1})
PORTS = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 1, "maximum": 65535},
            {"type": "string", "pattern": r"^\s*[0-9]{1,5}\s*(-\s*[0-9]{1,5}\s*)?$"},
        ],
        "examples": [443, "8000-8999"],
    }
)
SIZE = WithJsonSchema(
    {
        "anyOf": [
            {"type": "integer", "minimum": 4096, "maximum": 1 << 40},
            {"type": "string", "pattern": r"^\s*[0-9]*\.?[0-9]+\s*[A-Za-z]*"},
        ],
        "examples": [10_000_000, "10MB"],
    }
)
