"""The configuration of the design, and ways to write one down and read it back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ztun.config import ConfigError, Settings, load

DESIGN = """
{
  "tun": {"name": "ztun0", "mtu": 1500, "address": "198.18.0.1/15", "address6": "2001:2::1/48"},
  "capture": {"lan": ["eth1"], "host": false, "backend": "auto", "fail": "open"},
  "dns": {
    "listen": ["10.0.0.1:53"], "hijack": true,
    "servers": ["udp://9.9.9.9:53", "tls://9.9.9.9", "https://dns.quad9.net/dns-query"],
    "fake_ip": {
      "range": "198.18.0.0/15", "range6": "2001:2::/48", "size": 8192, "ttl": 300, "store": "/var/lib/ztun/fake-ip.db"
    }
  },
  "outbounds": [
    {"tag": "office", "type": "socks5", "server": "10.1.1.1:1080", "username": "u", "password": "p"},
    {"tag": "web", "type": "http", "server": "10.1.1.2:3128"}
  ],
  "route": {
    "rules": [
      {"domain_suffix": ["corp.example"], "outbound": "office"},
      {"ip_cidr": ["192.0.2.0/24", "2001:db8::/32"], "port": [80, 443], "protocol": "tcp", "outbound": "web"},
      {"geoip": ["de"], "outbound": "direct"},
      {"domain_keyword": ["telemetry"], "outbound": "block"}
    ],
    "default": "office",
    "geoip_database": "/var/lib/ztun/country.mmdb"
  },
  "pool": {"size": 64, "warmup": 4, "keepalive_interval": 75, "buffers": 32, "buffer_size": 65536},
  "timeouts": {"dial": 10, "tcp_idle": 7440, "udp_idle": 300},
  "log": {"level": "info", "format": "console", "file": null},
  "control": {"socket": "/run/ztun/control.sock"}
}
"""


def design() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DESIGN)
    return document


def parse(document: Any, environ: Mapping[str, str] | None = None) -> Settings:
    """Write it to a file (text as it is, anything else as JSON) and load that."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "config.json")
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        try:
            return load(path, environ or {})
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"{directory}/", "")) from None


def complaints(document: Any, environ: Mapping[str, str] | None = None) -> list[str]:
    """The lines that are said about it, without the name of the file in front; none if it is good."""
    try:
        parse(document, environ)
    except ConfigError as error:
        return [line.removeprefix("config.json: ") for line in str(error).split("\n")]
    return []
