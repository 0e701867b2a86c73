"""What one part of a configuration asks of another.

These work on the document as it was written, not on the checked models, so that they find what they can even when
something else in it is wrong. What is ill-formed is passed over here: the models say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Any, TypeVar

from ztun.config import values
from ztun.config.models import FakeIpSettings, PoolSettings, TunSettings, follow_fake_ranges
from ztun.config.problems import Location, Problem
from ztun.rules import BUILTIN_DIRECT

RESERVED_TAGS = ("direct", "block", "dns")
IPV6_MINIMUM_MTU = 1280  # RFC 8200 section 5

_T = TypeVar("_T")

_NAME_CONDITIONS = ("domain", "domain_suffix", "domain_keyword")
_ADDRESS_CONDITIONS = ("ip_cidr", "geoip")
_CONDITIONS = (*_NAME_CONDITIONS, *_ADDRESS_CONDITIONS, "port", "protocol", "source_cidr", "source_mac", "interface")


def check_document(document: dict[str, Any]) -> Iterator[Problem]:
    document = follow_fake_ranges(document)
    yield from _check_tags(document)
    yield from _check_references(document)
    yield from _check_credentials(document)
    yield from _check_udp(document)
    for index, rule in enumerate(_get(document, list, "route", "rules")):
        if isinstance(rule, dict):
            yield from _check_rule(("route", "rules", index), rule)
            yield from _check_captured(("route", "rules", index, "interface"), rule, document)
    yield from _check_geoip(document)
    yield from _check_fake_ranges(document)
    yield from _check_mtu(document)
    yield from _check_interfaces(document)
    yield from _check_pool(document)


def _get(document: Any, kind: type[_T], *path: str) -> _T:
    """The value at the path, or an empty one of its kind where there is none or one of another kind."""
    for part in path:
        document = document.get(part) if isinstance(document, dict) else None
    return document if isinstance(document, kind) else kind()


def _parsed(parse: Callable[[Any], _T], section: dict[str, Any], key: str, default: _T | None) -> _T | None:
    if key not in section:
        return default
    try:
        return parse(section[key])
    except ValueError:
        return None


def _tags(document: dict[str, Any]) -> list[str | None]:
    """The tag of each outbound, None where there is no valid one."""
    outbounds = _get(document, list, "outbounds")
    return [
        _parsed(values.parse_tag, outbound, "tag", None) if isinstance(outbound, dict) else None
        for outbound in outbounds
    ]


def _check_tags(document: dict[str, Any]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, tag in enumerate(_tags(document)):
        if tag is None:
            continue
        location: Location = ("outbounds", index, "tag")
        if tag in RESERVED_TAGS:
            yield Problem(location, f"'{tag}' is always there and cannot be defined; choose another tag")
        elif tag in first:
            yield Problem(location, f"the tag '{tag}' is already that of outbounds[{first[tag]}]; choose another")
        first.setdefault(tag, index)


def _check_references(document: dict[str, Any]) -> Iterator[Problem]:
    if not isinstance(document.get("outbounds", []), list):
        return  # then no tag is known, and that is the one thing to say
    route = _get(document, dict, "route")
    known = list(dict.fromkeys([*RESERVED_TAGS, *filter(None, _tags(document))]))
    for index, rule in enumerate(_get(route, list, "rules")):
        if isinstance(rule, dict):
            yield from _check_reference(("route", "rules", index, "outbound"), rule.get("outbound"), known)
    if route.get("default") == "dns":
        yield Problem(("route", "default"), "not everything can go to 'dns'; choose a proxy, direct or block")
    yield from _check_reference(("route", "default"), route.get("default"), known)


def _check_reference(location: Location, tag: Any, known: list[str]) -> Iterator[Problem]:
    if not isinstance(tag, str) or tag in known:
        return
    yield Problem(location, f"no outbound has the tag {values.describe(tag)}; known: {', '.join(known)}")


def _check_credentials(document: dict[str, Any]) -> Iterator[Problem]:
    for index, outbound in enumerate(_get(document, list, "outbounds")):
        if not isinstance(outbound, dict):
            continue
        username, password = outbound.get("username"), outbound.get("password")
        if not all(value is None or isinstance(value, str) for value in (username, password)):
            continue
        location: Location = ("outbounds", index)
        if (username is None) != (password is None):
            given, wanted = ("username", "password") if password is None else ("password", "username")
            yield Problem((*location, given), f"is given without a {wanted}; add the {wanted}")
        if outbound.get("type") == "socks5":
            for key, value in (("username", username), ("password", password)):
                if isinstance(value, str) and not 1 <= len(value.encode(errors="surrogatepass")) <= 255:
                    yield Problem((*location, key), "must have 1 to 255 bytes for SOCKS5 (RFC 1929 section 2)")
        if outbound.get("type") == "http" and isinstance(username, str) and ":" in username:
            yield Problem((*location, "username"), "cannot have a ':' for HTTP (RFC 7617 section 2)")


def _check_udp(document: dict[str, Any]) -> Iterator[Problem]:
    for index, outbound in enumerate(_get(document, list, "outbounds")):
        if isinstance(outbound, dict) and (outbound.get("type"), outbound.get("udp")) == ("http", "proxy"):
            yield Problem(("outbounds", index, "udp"), "an HTTP proxy carries no datagrams; use reject or direct")


def _check_rule(location: Location, rule: dict[str, Any]) -> Iterator[Problem]:
    """A rule that can never match, or always does, is not what somebody meant."""
    on_name = [key for key in _NAME_CONDITIONS if key in rule]
    on_address = [key for key in _ADDRESS_CONDITIONS if key in rule]
    if on_name and on_address:
        yield Problem(
            location,
            f"{on_name[0]} and {on_address[0]} in one rule never match together, "
            "as a flow has either a name or an address; make it two rules",
        )
    if not any(key in rule for key in _CONDITIONS):
        yield Problem(location, "has no condition; what takes everything else is route.default")
    if "port" in rule and values.as_list(rule.get("protocol")) == ["icmp"]:
        yield Problem((*location, "port"), "ICMP has no ports; leave the port out, or name tcp or udp")
    if "domain" in rule and len(on_name) > 1:
        yield from _check_names(location, rule)


def _check_captured(location: Location, rule: dict[str, Any], document: dict[str, Any]) -> Iterator[Problem]:
    """The interfaces may be given on the command line only, so that none in the file is no mistake."""
    lan = _get(document, list, "capture", "lan")
    for name in _list(rule, "interface") if lan else ():
        if _parsed(values.parse_interface_name, {"": name}, "", None) is not None and name not in lan:
            known = ", ".join(str(one) for one in lan)
            yield Problem(location, f"{values.describe(name)} is not captured; use one of capture.lan: {known}")


def _check_names(location: Location, rule: dict[str, Any]) -> Iterator[Problem]:
    """Conditions are ANDed, which surprises those who meant a list of names with suffixes in it."""
    try:
        names, suffixes = ([values.parse_name(name) for name in _list(rule, key)] for key in _NAME_CONDITIONS[:2])
        keywords = [values.parse_keyword(keyword) for keyword in _list(rule, "domain_keyword")]
    except ValueError:
        return
    for name in names:
        if suffixes and not any(name == suffix or name.endswith("." + suffix) for suffix in suffixes):
            continue
        if keywords and not any(keyword in name for keyword in keywords):
            continue
        return
    others = " and ".join(key for key in _NAME_CONDITIONS[1:] if key in rule)
    yield Problem(location, f"no name of `domain` meets {others}, and all must be met; make it separate rules")


def _list(rule: dict[str, Any], key: str) -> list[Any]:
    return list(values.as_list(rule[key])) if key in rule else []


def _check_geoip(document: dict[str, Any]) -> Iterator[Problem]:
    route = _get(document, dict, "route")
    if route.get("geoip_database") is not None:
        return
    for index, rule in enumerate(_get(route, list, "rules")):
        if isinstance(rule, dict) and "geoip" in rule:
            yield Problem(
                ("route", "rules", index, "geoip"), "needs a database; set route.geoip_database to a MaxMind DB file"
            )


def _check_fake_ranges(document: dict[str, Any]) -> Iterator[Problem]:
    tun, fake = _get(document, dict, "tun"), _get(document, dict, "dns", "fake_ip")
    size = fake.get("size", FakeIpSettings.model_fields["size"].default)
    default, tun_default = FakeIpSettings(), TunSettings()
    range4 = _parsed(values.parse_network4, fake, "range", default.range)
    range6 = _parsed(values.parse_network6, fake, "range6", default.range6)
    if range4 is not None:
        address4 = _parsed(values.parse_interface4, tun, "address", tun_default.address)
        yield from _check_range("range", range4, size)
        yield from _check_address("", address4, range4)
    if range6 is not None:
        yield from _check_range("range6", range6, size)
        if tun.get("address6", tun_default.address6) is None:
            yield Problem(("tun", "address6"), "is null, so dns.fake_ip.range6 must be null too")
        yield from _check_address("6", _parsed(values.parse_interface6, tun, "address6", tun_default.address6), range6)


def _check_range(key: str, network: IPv4Network | IPv6Network, size: Any) -> Iterator[Problem]:
    location: Location = ("dns", "fake_ip", key)
    for builtin in BUILTIN_DIRECT:
        if builtin.version == network.version and builtin.overlaps(network):
            yield Problem(location, f"{network} overlaps {builtin}, which is never forwarded; choose another range")
            return
    room = network.num_addresses - 3  # without the network's address, the TUN's own and the broadcast address
    if isinstance(size, int) and not isinstance(size, bool) and size > room:
        length = network.max_prefixlen - (size + 2).bit_length()
        yield Problem(
            location,
            f"{network} has room for {max(room, 0)} names, and size is {size}; make it a /{length} or size less",
        )


def _check_address(
    suffix: str, interface: IPv4Interface | IPv6Interface | None, network: IPv4Network | IPv6Network
) -> Iterator[Problem]:
    """The pool keeps the first host of each range for the TUN, and the kernel must have a route to all of it."""
    if interface is None or network.num_addresses < 2:
        return
    first = network.network_address + 1
    if interface.ip == first:
        return
    why = "is not in it" if interface.ip not in network else "would be given to a name"
    must = f"must be the first host of dns.fake_ip.range{suffix} {network}, {first}/{network.prefixlen}"
    yield Problem(("tun", "address" + suffix), f"{must}: {interface.ip} {why}")


def _check_mtu(document: dict[str, Any]) -> Iterator[Problem]:
    tun = _get(document, dict, "tun")
    mtu = tun.get("mtu")
    if isinstance(mtu, int) and 576 <= mtu < IPV6_MINIMUM_MTU and tun.get("address6", "") is not None:
        yield Problem(
            ("tun", "mtu"), f"{mtu} is too small for IPv6 ({IPV6_MINIMUM_MTU}, RFC 8200); or set tun.address6 to null"
        )


def _check_interfaces(document: dict[str, Any]) -> Iterator[Problem]:
    name = _get(document, dict, "tun").get("name", TunSettings().name)
    seen: set[str] = set()
    for index, lan in enumerate(_get(document, list, "capture", "lan")):
        if isinstance(lan, str) and lan == name:
            yield Problem(
                ("capture", "lan", index),
                f"{values.describe(lan)} is the TUN itself (tun.name); name the LAN's interface",
            )
        elif isinstance(lan, str) and lan in seen:
            yield Problem(("capture", "lan", index), f"{values.describe(lan)} is there twice; remove one")
        if isinstance(lan, str):
            seen.add(lan)


def _check_pool(document: dict[str, Any]) -> Iterator[Problem]:
    pool, default = _get(document, dict, "pool"), PoolSettings()
    size, warmup = pool.get("size", default.size), pool.get("warmup", default.warmup)
    if isinstance(size, int) and isinstance(warmup, int) and warmup > size >= 0 and "warmup" in pool:
        yield Problem(("pool", "warmup"), f"{warmup} is more than pool.size, {size}")
