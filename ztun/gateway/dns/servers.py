"""Upstream servers as the configuration names them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from ztun.errors import ConfigError

_PORTS = {"udp": 53, "tcp": 53, "tls": 853, "https": 443}


class Server(NamedTuple):
    """scheme: udp, tcp, tls or https; host: an address without brackets, or a name; path: of https only."""

    scheme: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def is_address(self) -> bool:
        """Whether the host needs no look-up."""
        return is_address(self.host)

    @property
    def is_private(self) -> bool:
        """Whether the server is part of the network around us, and so may know the names that mean something there."""
        address = _address(self.host)
        return address is not None and address.is_private


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_address(host: str) -> bool:
    return _address(host) is not None


def parse_server(url: str, key: str) -> Server:
    """A server from its URL. key: where it stands, for the ConfigError that is raised when it is none."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ConfigError(f"{key}: {url!r} is no DNS server; write udp://, tcp://, tls:// or https:// and a host")
    return Server(parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme], parts.path)


def parse_servers(urls: Sequence[str]) -> list[Server]:
    """All of `dns.servers`. Raises ConfigError, also when a name could never be looked up for want of an address."""
    servers = [parse_server(url, f"dns.servers[{index}]") for index, url in enumerate(urls)]
    if not any(server.is_address for server in servers):
        for index, server in enumerate(servers):
            raise ConfigError(
                f"dns.servers[{index}]: {server.host!r} is a name, and there is no server given by address to ask for"
                " it; add one, such as udp://9.9.9.9"
            )
    return servers


def endpoint(host: str, port: int) -> tuple[int, tuple[str, int] | tuple[str, int, int, int]]:
    """The family and the socket address of an address literal; an IPv6 one may carry a zone (fe80::1%eth0)."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    family, _type, _protocol, _name, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=flags)[0]
    return family, address  # type: ignore[return-value]
