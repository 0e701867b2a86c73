"""The single values of a configuration: text in, checked value out.

Each function raises ValueError with a message that says what is wrong with the value and what to write instead.
"""

from __future__ import annotations

import re
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import idna
from pydantic import ByteSize, TypeAdapter, ValidationError

Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface

DNS_PORTS = {"udp": 53, "tcp": 53, "tls": 853, "https": 443}

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_BYTE_SIZE = TypeAdapter(ByteSize)
_TAG = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MAC = re.compile(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}|[0-9a-fA-F]{4}(\.[0-9a-fA-F]{4}){2}")


def need_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be a string, not {describe(value)}")
    return value


def describe(value: Any) -> str:
    """A JSON value in words that fit into one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def as_list(value: Any) -> Any:
    """A single value stands for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def parse_network(value: Any) -> Network:
    """A network in CIDR form; an address alone is a network of one."""
    text = need_text(value)
    _address, slash, length = text.partition("/")
    if slash and not (length.isascii() and length.isdigit()):
        raise ValueError(f"{describe(text)} must end in a prefix length, as in 192.0.2.0/24")
    try:
        return ip_network(text)
    except ValueError:
        pass
    try:
        interface = ip_interface(text)
    except ValueError:
        raise ValueError(f"{describe(text)} is not a network; write one as 192.0.2.0/24 or 2001:db8::/32") from None
    raise ValueError(
        f"{text} has host bits set; the network is {interface.network}, the single host {ip_network(interface.ip)}"
    )


def parse_network4(value: Any) -> IPv4Network:
    network = parse_network(value)
    if not isinstance(network, IPv4Network):
        raise ValueError(f"{network} is not an IPv4 network")
    return network


def parse_network6(value: Any) -> IPv6Network:
    network = parse_network(value)
    if not isinstance(network, IPv6Network):
        raise ValueError(f"{network} is not an IPv6 network")
    return network


def _parse_interface(value: Any, example: str) -> Interface:
    text = need_text(value)
    if "/" not in text:
        raise ValueError(f"{describe(text)} has no prefix length; write it as {example}")
    try:
        return ip_interface(text)
    except ValueError:
        raise ValueError(f"{describe(text)} is not an address with a prefix length, as in {example}") from None


def parse_interface4(value: Any) -> IPv4Interface:
    interface = _parse_interface(value, "198.18.0.1/15")
    if not isinstance(interface, IPv4Interface):
        raise ValueError(f"{interface} is not an IPv4 address; IPv6 goes to tun.address6")
    return interface


def parse_interface6(value: Any) -> IPv6Interface:
    interface = _parse_interface(value, "2001:2::1/48")
    if not isinstance(interface, IPv6Interface):
        raise ValueError(f"{interface} is not an IPv6 address; IPv4 goes to tun.address")
    return interface


def split_endpoint(text: str) -> tuple[str, int]:
    """`host:port` or `[v6 address]:port` as host, without brackets, and port."""
    if text.count(":") > 1 and not text.startswith("["):
        raise ValueError(f"{describe(text)}: an IPv6 address goes in brackets, as in [2001:db8::1]:1080")
    bracketed = re.fullmatch(r"\[([^\]]*)\]:([^:]*)", text)
    host, port = bracketed.groups() if bracketed else text.rpartition(":")[::2]
    if not host:
        raise ValueError(f"{describe(text)} must be host:port")
    if bracketed:
        try:
            IPv6Address(host)
        except ValueError:
            raise ValueError(f"{describe(text)}: {describe(host)} is not an IPv6 address") from None
    return host, parse_port_number(port)


def parse_port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError(f"{describe(text)} is not a port; ports go from 1 to 65535")
    return int(text)


def join_endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_host(text: str) -> str:
    """An address literal or a name, canonical."""
    try:
        return str(ip_address(text))
    except ValueError:
        if re.fullmatch(r"[0-9.]+", text):
            raise ValueError(f"{describe(text)} is not an address") from None
        return parse_name(text)


def parse_server(value: Any) -> str:
    """Where a proxy listens, `host:port`."""
    text = need_text(value)
    if "://" in text:
        raise ValueError("must be host:port, without a scheme; `type` says what kind of proxy it is")
    if "@" in text:
        raise ValueError("must be host:port; user name and password go to `username` and `password`")
    host, port = split_endpoint(text)
    return join_endpoint(parse_host(host), port)


def parse_listen(value: Any) -> str:
    """A local address and port, `10.0.0.1:53` or `[2001:db8::1]:53`."""
    text = need_text(value)
    host, port = split_endpoint(text)
    try:
        address = ip_address(host)
    except ValueError:
        raise ValueError(f"{describe(text)}: {describe(host)} is not an address of this host") from None
    if address.is_multicast:
        raise ValueError(f"{describe(text)}: a multicast address cannot be listened on")
    return join_endpoint(str(address), port)


def parse_dns_server(value: Any) -> str:
    """An upstream DNS server as a URL: udp://, tcp:// and tls:// with host and port, https:// with a path."""
    text = need_text(value)
    if "://" not in text:
        raise ValueError(f"{describe(text)} has no scheme; write udp://, tcp://, tls:// or https:// before it")
    parts = split_url(text)
    scheme = parts.scheme
    if scheme not in DNS_PORTS:
        raise ValueError(f"the scheme {describe(scheme)} is not known; known: {', '.join(DNS_PORTS)}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"takes only a host, a port{' and a path' if scheme == 'https' else ''}")
    host, port = _netloc(parts.netloc, DNS_PORTS[scheme])
    if scheme != "https":
        if parts.path not in ("", "/"):
            raise ValueError(f"{describe(text)}: a path goes with https:// only")
        return f"{scheme}://{join_endpoint(parse_host(host), port)}"
    return f"https://{join_endpoint(parse_host(host), port)}{parts.path if parts.path != '/' else ''}"


def _netloc(netloc: str, default_port: int) -> tuple[str, int]:
    without_port = netloc.endswith("]") or ":" not in netloc
    return split_endpoint(f"{netloc}:{default_port}" if without_port else netloc)


def split_url(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError:
        raise ValueError("is not a URL: check the brackets of the address") from None


def parse_proxy_url(text: str) -> dict[str, str]:
    """`scheme://[user:password@]host:port` as the keys of an outbound. No message repeats what may be a password."""
    scheme, separator, _rest = text.partition("://")
    types = {"socks5": "socks5", "socks5h": "socks5", "http": "http"}
    if not separator or scheme.lower() not in types:
        shown = describe(scheme) + " is not a known scheme; " if separator else ""
        raise ValueError(f"{shown}write socks5://host:port or http://host:port, with user:password@ if need be")
    parts = split_url(text)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("takes no path; in a user name or password, / ? # @ and : are written as %2F %3F %23 %40 %3A")
    credentials, has_credentials, endpoint = parts.netloc.rpartition("@")
    try:
        server = parse_server(endpoint)
    except ValueError:
        raise ValueError("must end in host:port, with an IPv6 address in brackets") from None
    outbound = {"type": types[scheme.lower()], "server": server}
    if has_credentials:
        user, _colon, password = credentials.partition(":")
        outbound |= {"username": unquote(user), "password": unquote(password)}
    return outbound


def parse_name(value: Any) -> str:
    """A domain name as A-labels (RFC 5890), lower case, without the final dot."""
    text = need_text(value)
    name = text.removesuffix(".")
    if name.startswith(("*.", ".")):
        plain = parse_name(name.lstrip("*."))
        raise ValueError(f"{describe(text)}: write {plain}; domain_suffix matches it and every name below it")
    if not name.isascii():
        name = _to_ascii(name)
    name = name.lower()
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):
        raise ValueError(f"{describe(text)} is not a domain name")
    return name


def _to_ascii(name: str) -> str:
    try:
        return idna.encode(name, uts46=True).decode()
    except idna.IDNAError:
        raise ValueError(f"{describe(name)} is not a domain name (RFC 5891)") from None


def parse_keyword(value: Any) -> str:
    """A part of a name. Names are compared as A-labels, so only what can stand in one makes sense."""
    text = need_text(value).lower()
    if not re.fullmatch(r"[a-z0-9._-]{1,253}", text):
        raise ValueError(f"{describe(text)} is in no name; names are compared as A-labels: a-z, 0-9, '-', '_' and '.'")
    return text


def parse_ports(value: Any) -> tuple[int, int]:
    """A port (80) or a closed range ("8000-8999") as first and last."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f'must be a port or a range like "8000-8999", not {describe(value)}')
    first, dash, last = str(value).partition("-")
    if isinstance(value, int) and value < 0:
        first, dash, last = str(value), "", ""
    ends = parse_port_number(first.strip()), parse_port_number((last if dash else first).strip())
    if ends[0] > ends[1]:
        raise ValueError(f"{describe(value)} runs backwards; write {ends[1]}-{ends[0]}")
    return ends


def write_ports(ports: tuple[int, int]) -> str:
    """As parse_ports reads them."""
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"


def parse_country(value: Any) -> str:
    text = need_text(value).lower()
    if not re.fullmatch(r"[a-z]{2}", text):
        raise ValueError(f"{describe(value)} is not a country code of two letters (ISO 3166-1), as in 'de'")
    return text


def parse_mac(value: Any) -> str:
    """The MAC address of a client (EUI-48) in any usual spelling, as `aa:bb:cc:dd:ee:ff`."""
    text = need_text(value)
    if not _MAC.fullmatch(text):
        raise ValueError(f"{describe(text)} is not a MAC address, as in '52:54:00:12:34:56'")
    packed = bytes.fromhex(re.sub("[:.-]", "", text))
    if packed[0] & 1 or not any(packed):
        raise ValueError(f"{describe(text)} is no client's address, but that of a group or of nobody")
    return packed.hex(":")


def parse_interface_name(value: Any) -> str:
    """A network interface name: 1 to 15 bytes (IFNAMSIZ, linux/if.h), no slash, no space."""
    text = need_text(value)
    if not re.fullmatch(r"[^\s/:]+", text) or text in (".", "..") or len(text.encode()) > 15:
        raise ValueError(f"{describe(text)} is not an interface name (1 to 15 bytes, no space, '/' or ':')")
    return text


def parse_xdp(value: Any) -> bool | str:
    """Whether, or in which form."""
    if value is True or value is False or value in ("native", "generic"):
        return value  # type: ignore[no-any-return]
    raise ValueError(f"must be true, false, 'native' or 'generic', not {describe(value)}")


def parse_tag(value: Any) -> str:
    text = need_text(value)
    if not _TAG.fullmatch(text):
        raise ValueError(f"{describe(text)} is not a tag (1 to 64 letters, digits, '-', '_' and '.')")
    return text


def parse_size(value: Any) -> int:
    """A number of bytes, or a text with a unit: 10MB is 10,000,000 bytes, 10MiB is 10,485,760."""
    try:
        size = -1 if isinstance(value, bool | float) else int(_BYTE_SIZE.validate_python(value))
    except ValidationError:
        size = -1
    if size < 0:
        raise ValueError(f'must be a number of bytes or a size like "10MB", not {describe(value)}')
    if not 4096 <= size <= 1 << 40:
        raise ValueError(f"must be at least 4096 bytes and at most 1 TiB, not {describe(value)}")
    return size


def parse_path(value: Any) -> Path:
    text = need_text(value)
    if not text or "\0" in text:
        raise ValueError("is not a path")
    return Path(text)


def parse_socket_path(value: Any) -> Path:
    """A path for a Unix socket: sun_path takes 108 bytes with the final zero (unix(7))."""
    path = parse_path(value)
    if len(str(path).encode()) > 107:
        raise ValueError("is too long for a Unix socket, which takes 107 bytes; choose a shorter path")
    return path
