"""The JSON Schema (draft 2020-12) of the configuration, for editors and for other programs that write one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ztun.config.models import LevelSettings, Settings
from ztun.config.problems import write_location

DIALECT = "https://json-schema.org/draft/2020-12/schema"

_CONDITIONS = "any of these is met; a single one may be written without a list"

# What every key means, by its place; elements of lists have no number here.
DESCRIPTIONS = {
    "tun": "The TUN device through which captured packets come.",
    "tun.name": "Name of the interface.",
    "tun.mtu": "Bytes; at least 1280 unless address6 is null.",
    "tun.address": "Its IPv4 address with the prefix length: the first host of dns.fake_ip.range.",
    "tun.address6": "Its IPv6 address with the prefix length: the first host of dns.fake_ip.range6; null for no IPv6.",
    "capture": "Whose packets are looked at.",
    "capture.lan": "Interfaces behind which the clients are.",
    "capture.host": "Whether what this host's own programs begin is captured as well; no lan is needed for it.",
    "capture.backend": "How packets are captured; auto takes the best that this kernel has.",
    "capture.fail": "What happens to traffic of the proxies while ztun does not answer: open lets it pass.",
    "capture.offload": "Whether the kernel carries connections once they stand, where it can.",
    "capture.xdp": "Whether XDP drops blocked prefixes, in the form that costs least, or in one form only.",
    "dns": "The DNS service.",
    "dns.listen": "Where it listens, address:port; left out: port 53 of the captured interfaces.",
    "dns.hijack": "Whether queries to other servers are answered too.",
    "dns.servers": "Upstream servers as URLs, asked in this order; left out: those of the system.",
    "dns.fake_ip": "Addresses that stand for names.",
    "dns.fake_ip.range": "IPv4 network from which they are taken.",
    "dns.fake_ip.range6": "IPv6 network from which they are taken; null for none.",
    "dns.fake_ip.size": "How many names have one at a time.",
    "dns.fake_ip.ttl": "Seconds for which clients may keep them.",
    "dns.fake_ip.store": "The sqlite3 file that keeps them over a restart; null to forget them.",
    "outbounds": "The proxies. direct, block and dns are always there.",
    "outbounds.tag": "The name by which rules call it.",
    "outbounds.type": "Kind of proxy.",
    "outbounds.server": "host:port, an IPv6 address in brackets.",
    "outbounds.username": "User name; goes with a password.",
    "outbounds.password": "Password; goes with a user name.",
    "outbounds.udp": "What happens to datagrams that this proxy cannot carry.",
    "route": "Which traffic goes where.",
    "route.rules": "The first that matches decides, in this order unless they have priorities.",
    "route.rules.ip_cidr": f"Destination networks; {_CONDITIONS}.",
    "route.rules.domain": f"Names; {_CONDITIONS}.",
    "route.rules.domain_suffix": f"Names with all names below them; {_CONDITIONS}.",
    "route.rules.domain_keyword": f"Parts of names; {_CONDITIONS}.",
    "route.rules.geoip": f"Countries of the destination (ISO 3166-1); {_CONDITIONS}.",
    "route.rules.port": f"Destination ports, or ranges as texts; {_CONDITIONS}.",
    "route.rules.protocol": f"Transport protocols; {_CONDITIONS}.",
    "route.rules.source_cidr": f"Networks of clients; {_CONDITIONS}.",
    "route.rules.source_mac": f"MAC addresses of clients, or of the router they are behind; {_CONDITIONS}.",
    "route.rules.interface": f"Captured interfaces by which packets come in; {_CONDITIONS}.",
    "route.rules.priority": "Rules with a smaller number are asked first.",
    "route.rules.outbound": "Tag of an outbound, or direct, block or dns.",
    "route.default": "Where everything else goes.",
    "route.geoip_database": "The MaxMind DB file with the countries.",
    "pool": "Connections and memory that are kept ready.",
    "pool.size": "The most connections that are kept open to one proxy.",
    "pool.warmup": "How many are made before they are needed.",
    "pool.keepalive_interval": "Seconds after which a waiting connection is probed.",
    "pool.buffers": "How many buffers are kept.",
    "pool.buffer_size": "Bytes in each.",
    "timeouts": "All in seconds.",
    "timeouts.dial": "For an outbound to connect.",
    "timeouts.tcp_idle": "After which a silent TCP flow ends.",
    "timeouts.udp_idle": "After which a silent UDP session ends.",
    "timeouts.drain": "For flows to end when ztun stops.",
    "limits": "How much clients may make us hold. A source is an IPv4 address or an IPv6 /64.",
    "limits.tcp_flows": "TCP flows of all clients.",
    "limits.tcp_flows_per_source": "TCP flows of one source.",
    "limits.half_open": "TCP flows that are not established yet.",
    "limits.half_open_per_source": "Those of one source.",
    "limits.udp_sessions": "UDP sessions of all clients.",
    "limits.udp_sessions_per_source": "UDP sessions of one source.",
    "limits.memory": "Bytes that all TCP flows hold together.",
    "limits.fragments": "Bytes of datagrams of which pieces are missing.",
    "limits.fragments_per_source": "Those of one source.",
    "log": "The log.",
    "log.level": "From which level on lines are written.",
    "log.levels": "Levels of components that have their own.",
    "log.format": "console for people, json for programs.",
    "log.file": "File to append to; null for standard error.",
    "log.rotate": "When the file is renamed; null to leave that to others.",
    "log.rotate.size": "Bytes, or as 10MB, from which on it is renamed.",
    "log.rotate.keep": "How many old ones stay.",
    "log.repeats": "How many lines of one kind are written; null for no limit.",
    "log.repeats.burst": "At once.",
    "log.repeats.per_second": "A second in the long run.",
    "log.flows": "How many lines about flows are written; null for no limit.",
    "log.flows.burst": "At once.",
    "log.flows.per_second": "A second in the long run.",
    "control": "How the other commands find the instance.",
    "control.socket": "Path of its socket; left out: one that is named after tun.name, if that is not the usual one.",
    **{f"log.levels.{name}": f"That of {name}; null for log.level." for name in LevelSettings.model_fields},
}


def make_schema() -> dict[str, Any]:
    """The schema as a document. What one key asks of another is not in it: `ztun check` says that."""
    schema = Settings.model_json_schema()
    definitions = schema["$defs"]
    _allow_single_values(definitions["RuleSettings"])
    for place, holder, key in keys_of(schema):
        described = holder["properties"][key]
        described.pop("title", None)
        described["description"] = DESCRIPTIONS.get(place, "")
    for definition in definitions.values():
        definition.pop("title", None)
        definition.pop("description", None)  # these are for readers of the source
    return {"$schema": DIALECT, **schema, "title": "ztun", "description": "The configuration of ztun (JSON)."}


def keys_of(
    schema: dict[str, Any], holder: dict[str, Any] | None = None, way: tuple[str, ...] = ()
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Place, object that has it, and key of everything that can be configured."""
    holder = schema if holder is None else holder
    for key, described in holder.get("properties", {}).items():
        yield write_location((*way, key)), holder, key
        for inner in _objects_in(schema, described):
            yield from keys_of(schema, inner, (*way, key))


def _objects_in(schema: dict[str, Any], described: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for choice in (described, described.get("items", {}), *described.get("anyOf", ())):
        if "$ref" in choice:
            yield schema["$defs"][choice["$ref"].rpartition("/")[2]]


def _allow_single_values(rule: dict[str, Any]) -> None:
    """A condition with one value may be written without a list; a rule without any is none."""
    conditions = [key for key, described in rule["properties"].items() if described.get("type") == "array"]
    for key in conditions:
        described = rule["properties"][key]
        described.pop("default")
        rule["properties"][key] = {"anyOf": [described["items"], {**described, "minItems": 1}]}
    rule["anyOf"] = [{"required": [key]} for key in conditions]
