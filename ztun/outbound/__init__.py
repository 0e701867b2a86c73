"""The ways out of the gateway: direct, block, SOCKS5 and HTTP proxies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ztun.errors import ConfigError
from ztun.outbound.base import BaseOutbound, Tools
from ztun.outbound.block import BlockOutbound
from ztun.outbound.direct import DirectOutbound
from ztun.outbound.http import HttpOutbound
from ztun.outbound.socks5 import Socks5Outbound
from ztun.outbound.verdict import DatagramVerdict
from ztun.ports import Outbound

__all__ = ["DEFAULT_UDP", "OutboundSpec", "Tools", "make_outbounds"]

DEFAULT_UDP: dict[str, DatagramVerdict] = {"socks5": "proxy", "http": "reject"}
_PROXIES: dict[str, type[Socks5Outbound] | type[HttpOutbound]] = {"socks5": Socks5Outbound, "http": HttpOutbound}


@dataclass(frozen=True, slots=True)
class OutboundSpec:
    """One outbound of the configuration in plain values.

    type: "socks5", "http", "direct" or "block"; host, port: where a proxy listens, the host a name or an address
    literal without brackets; username, password: both or neither; udp: what becomes of
    datagrams at a proxy, "proxy", "reject" or "direct", None for DEFAULT_UDP.
    """

    tag: str
    type: str
    host: str = ""
    port: int = 0
    username: str | None = None
    password: str | None = None
    udp: DatagramVerdict | None = None


def make_outbounds(specs: Iterable[OutboundSpec], tools: Tools) -> dict[str, Outbound]:
    """Build the outbounds by tag, "direct" and "block" among them always. Raises ConfigError."""
    outbounds: dict[str, BaseOutbound] = {"direct": DirectOutbound(tools), "block": BlockOutbound(tools)}
    for spec in specs:
        if spec.tag in outbounds:
            raise ConfigError(f"outbound {spec.tag!r}: this tag is taken; give every outbound a tag of its own")
        outbounds[spec.tag] = _make(spec, tools)
    return dict(outbounds)


def _make(spec: OutboundSpec, tools: Tools) -> BaseOutbound:
    if spec.type == "direct":
        return DirectOutbound(tools, tag=spec.tag)
    if spec.type == "block":
        return BlockOutbound(tools, tag=spec.tag)
    if spec.type not in _PROXIES:
        raise ConfigError(f"outbound {spec.tag!r}: unknown type {spec.type!r}; use socks5, http, direct or block")
    udp = spec.udp or DEFAULT_UDP[spec.type]
    if udp == "proxy" and spec.type == "http":
        raise ConfigError(f"outbound {spec.tag!r}: an HTTP proxy carries no datagrams; set udp to reject or direct")
    return _PROXIES[spec.type](spec.tag, spec.host, spec.port, _check(spec), tools, udp)


def _check(spec: OutboundSpec) -> tuple[str, str] | None:
    """The credentials of a proxy, after a look at what its protocol cannot carry."""
    if not spec.host or not 0 < spec.port < 65536:
        raise ConfigError(f"outbound {spec.tag!r}: server must be HOST:PORT, the port from 1 to 65535")
    if not spec.username and not spec.password:
        return None
    credentials = spec.username or "", spec.password or ""
    if spec.type == "socks5" and not all(0 < len(text.encode()) < 256 for text in credentials):
        # RFC 1929, section 2: one octet holds each length
        raise ConfigError(f"outbound {spec.tag!r}: SOCKS5 takes a username and a password of 1 to 255 bytes each")
    if spec.type == "http" and (not credentials[0] or ":" in credentials[0]):
        # RFC 7617, section 2
        raise ConfigError(f"outbound {spec.tag!r}: HTTP needs a username, and one without a colon")
    return credentials
