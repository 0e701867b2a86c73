"""The sections of the configuration, as in the JSON file; every one may be left out.

Only what concerns a single section is checked here; what concerns several is in checks.py.
"""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ztun.config import patterns, values
from ztun.config.values import Network, split_endpoint
from ztun.defaults import DEFAULTS, control_of, names_of

InterfaceName = Annotated[str, PlainValidator(values.parse_interface_name), patterns.INTERFACE]
Mac = Annotated[str, PlainValidator(values.parse_mac), patterns.MAC]
Listen = Annotated[str, PlainValidator(values.parse_listen), patterns.LISTEN]
DnsServer = Annotated[str, PlainValidator(values.parse_dns_server), patterns.DNS_SERVER]
Cidr = Annotated[Network, PlainValidator(values.parse_network), patterns.NETWORK]
Cidr4 = Annotated[IPv4Network, PlainValidator(values.parse_network4), patterns.NETWORK4]
Cidr6 = Annotated[IPv6Network, PlainValidator(values.parse_network6), patterns.NETWORK6]
Address4 = Annotated[IPv4Interface, PlainValidator(values.parse_interface4), patterns.ADDRESS4]
Address6 = Annotated[IPv6Interface, PlainValidator(values.parse_interface6), patterns.ADDRESS6]
Name = Annotated[str, PlainValidator(values.parse_name), patterns.NAME]
Keyword = Annotated[str, PlainValidator(values.parse_keyword), patterns.KEYWORD]
Country = Annotated[str, PlainValidator(values.parse_country), patterns.COUNTRY]
Ports = Annotated[
    tuple[int, int], PlainValidator(values.parse_ports), PlainSerializer(values.write_ports), patterns.PORTS
]
Tag = Annotated[str, PlainValidator(values.parse_tag), patterns.TAG]
FilePath = Annotated[Path, PlainValidator(values.parse_path), patterns.PATH]
Seconds = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
DrainSeconds = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Limit = Annotated[Whole, Field(ge=1, le=1 << 20)]
Level = Literal["debug", "info", "warning", "error"]

_ONE_OR_MORE = (BeforeValidator(values.as_list), Field(min_length=1))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TunSettings(Section):
    """The TUN device. mtu in bytes (RFC 791 asks hosts to take 576); addresses with the prefix length of the link."""

    name: InterfaceName = DEFAULTS.device
    mtu: Annotated[Whole, Field(ge=576, le=65535)] = 1500
    address: Address4 = IPv4Interface("198.18.0.1/15")
    address6: Address6 | None = IPv6Interface("2001:2::1/48")


class CaptureSettings(Section):
    """Whose packets are looked at: those that come in on the `lan` interfaces, and with `host` our own.

    xdp: drop what is blocked before the kernel made a packet of it, where that can be had; offload: have the kernel
    carry connections without us, where it can.
    """

    lan: tuple[InterfaceName, ...] = ()
    host: Flag = False
    backend: Literal["auto", "bpf", "tcx", "clsact", "routes"] = "auto"
    fail: Literal["open", "closed"] = "open"
    xdp: Annotated[bool | str, PlainValidator(values.parse_xdp), patterns.XDP] = True
    offload: Flag = True


class FakeIpSettings(Section):
    """The Fake-IPs. size: names at a time; ttl: seconds; store: sqlite3 file, or null to forget them at the end."""

    range: Cidr4 = IPv4Network("198.18.0.0/15")
    range6: Cidr6 | None = IPv6Network("2001:2::/48")
    size: Annotated[Whole, Field(ge=1, le=1 << 22)] = 8192
    ttl: Annotated[Whole, Field(ge=1, le=86400)] = 300
    store: FilePath | None = DEFAULTS.names


class DnsSettings(Section):
    """The DNS service. listen: address:port; servers: URLs with their ports filled in, tried in this order.

    Left out (see model_fields_set), listen is port 53 of the captured interfaces and servers those of the system.
    """

    listen: tuple[Listen, ...] = ()
    hijack: Flag = True
    servers: Annotated[tuple[DnsServer, ...], Field(min_length=1)] = ()
    fake_ip: FakeIpSettings = FakeIpSettings()


class OutboundSettings(Section):
    """A proxy. server: host:port with IPv6 in brackets, as the properties `host` and `port` give it apart.

    udp: whether datagrams go through the proxy, are refused, or go past it; null: "proxy" for socks5, "reject" for
    http.
    """

    tag: Tag
    type: Literal["socks5", "http"]
    server: Annotated[str, PlainValidator(values.parse_server), patterns.SERVER]
    username: str | None = None
    password: SecretStr | None = None
    udp: Literal["proxy", "reject", "direct"] | None = None

    @property
    def host(self) -> str:
        return split_endpoint(self.server)[0]

    @property
    def port(self) -> int:
        return split_endpoint(self.server)[1]


class RuleSettings(Section):
    """One rule. A condition with one value may be written without a list; ports are closed ranges here."""

    ip_cidr: Annotated[tuple[Cidr, ...], *_ONE_OR_MORE] = ()
    domain: Annotated[tuple[Name, ...], *_ONE_OR_MORE] = ()
    domain_suffix: Annotated[tuple[Name, ...], *_ONE_OR_MORE] = ()
    domain_keyword: Annotated[tuple[Keyword, ...], *_ONE_OR_MORE] = ()
    geoip: Annotated[tuple[Country, ...], *_ONE_OR_MORE] = ()
    port: Annotated[tuple[Ports, ...], *_ONE_OR_MORE] = ()
    protocol: Annotated[tuple[Literal["tcp", "udp", "icmp"], ...], *_ONE_OR_MORE] = ()
    source_cidr: Annotated[tuple[Cidr, ...], *_ONE_OR_MORE] = ()
    source_mac: Annotated[tuple[Mac, ...], *_ONE_OR_MORE] = ()
    interface: Annotated[tuple[InterfaceName, ...], *_ONE_OR_MORE] = ()
    priority: Whole = 0
    outbound: Tag


class RouteSettings(Section):
    rules: tuple[RuleSettings, ...] = ()
    default: Tag = "direct"
    geoip_database: FilePath | None = None


class PoolSettings(Section):
    """size, warmup: connections kept open to a proxy; keepalive_interval: seconds; buffer_size: bytes."""

    size: Annotated[Whole, Field(ge=0, le=65535)] = 64
    warmup: Annotated[Whole, Field(ge=0, le=65535)] = 4
    keepalive_interval: Seconds = 75
    buffers: Annotated[Whole, Field(ge=1, le=65536)] = 32
    buffer_size: Annotated[Whole, Field(ge=2048, le=1 << 24)] = 65536


class TimeoutSettings(Section):
    """Seconds. tcp_idle is that of RFC 5382 (REQ-5), udp_idle that of RFC 4787 (REQ-5); drain: what flows have to end
    when ztun is asked to stop."""

    dial: Seconds = 10
    tcp_idle: Seconds = 7440
    udp_idle: Seconds = 300
    drain: DrainSeconds = 5


class LimitSettings(Section):
    """How much clients may make us hold; a source is an IPv4 address or an IPv6 /64. At a bound the newest is refused.

    memory: bytes that all TCP flows hold together, their windows and what they buffer, not what the process takes
    besides; fragments: bytes of datagrams of which pieces are missing.
    """

    tcp_flows: Limit = 65536
    tcp_flows_per_source: Limit = 16384
    half_open: Limit = 4096
    half_open_per_source: Limit = 1024
    udp_sessions: Limit = 16384
    udp_sessions_per_source: Limit = 4096
    memory: Annotated[Whole, Field(ge=1 << 20, le=1 << 40)] = 256 << 20
    fragments: Annotated[Whole, Field(ge=1 << 17, le=1 << 32)] = 4 << 20
    fragments_per_source: Annotated[Whole, Field(ge=1 << 17, le=1 << 32)] = 1 << 20


class LevelSettings(Section):
    """Levels of components that have their own (ztun.log.components says what each is)."""

    lists_all_keys: ClassVar[bool] = True

    app: Level | None = None
    classifier: Level | None = None
    control: Level | None = None
    dns: Level | None = None
    engine: Level | None = None
    flow: Level | None = None
    libraries: Level | None = None
    names: Level | None = None
    network: Level | None = None
    outbound: Level | None = None
    pool: Level | None = None
    routes: Level | None = None
    stack: Level | None = None
    udp: Level | None = None


class RotateSettings(Section):
    """size: bytes, or as "10MB", after which the file is renamed; keep: how many old ones stay."""

    size: Annotated[int, PlainValidator(values.parse_size), patterns.SIZE] = 10_000_000
    keep: Annotated[Whole, Field(ge=1, le=1000)] = 5


class RepeatSettings(Section):
    """How many lines of one kind are written: at once, and a second in the long run."""

    burst: Annotated[Whole, Field(ge=1, le=1_000_000)] = 50
    per_second: Annotated[Seconds, Field(le=1_000_000)] = 5


class FlowRepeatSettings(RepeatSettings):
    burst: Annotated[Whole, Field(ge=1, le=1_000_000)] = 200
    per_second: Annotated[Seconds, Field(le=1_000_000)] = 20


class LogSettings(Section):
    """file: null for standard error; rotate: null to leave it to others; repeats, flows: null for no limit."""

    level: Level = "info"
    levels: LevelSettings = LevelSettings()
    format: Literal["console", "json"] = "console"
    file: FilePath | None = None
    rotate: RotateSettings | None = RotateSettings()
    repeats: RepeatSettings | None = RepeatSettings()
    flows: FlowRepeatSettings | None = FlowRepeatSettings()


class ControlSettings(Section):
    socket: Annotated[Path, PlainValidator(values.parse_socket_path), patterns.PATH] = DEFAULTS.control


class Settings(BaseSettings):
    """The whole configuration. Made by `load`, which brings file, environment and command line together."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix="ZTUN_", env_nested_delimiter="__")

    tun: TunSettings = TunSettings()
    capture: CaptureSettings = CaptureSettings()
    dns: DnsSettings = DnsSettings()
    outbounds: tuple[OutboundSettings, ...] = ()
    route: RouteSettings = RouteSettings()
    pool: PoolSettings = PoolSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()
    control: ControlSettings = ControlSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given, and nothing from the surroundings: `load` says where the environment comes from."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """What is left out and follows from something else: addresses from the Fake-IP ranges, paths from the name."""
        return follow_name(follow_fake_ranges(data)) if isinstance(data, dict) else data


def follow_fake_ranges(document: dict[str, Any]) -> dict[str, Any]:
    """The document with tun.address, tun.address6 and dns.fake_ip.range6 filled in where the others tell them."""
    tun, dns = document.get("tun", {}), document.get("dns", {})
    fake = dns.get("fake_ip", {}) if isinstance(dns, dict) else None
    if not isinstance(tun, dict) or not isinstance(fake, dict):
        return document
    tun, fake = dict(tun), dict(fake)
    if "range" in fake and "address" not in tun:
        tun |= _first_host(fake["range"], "address")
    if "range6" in fake and "address6" not in tun:
        tun |= _first_host(fake["range6"], "address6")
    if "address6" in tun and tun["address6"] is None and "range6" not in fake:
        fake["range6"] = None
    return {**document, "tun": tun, "dns": {**dns, "fake_ip": fake}}


def follow_name(document: dict[str, Any]) -> dict[str, Any]:
    """The document with control.socket and dns.fake_ip.store filled in where tun.name is not the usual one."""
    tun, dns, control = (document.get(key, {}) for key in ("tun", "dns", "control"))
    fake = dns.get("fake_ip", {}) if isinstance(dns, dict) else None
    if not (isinstance(tun, dict) and isinstance(fake, dict) and isinstance(control, dict)):
        return document
    try:
        name = values.parse_interface_name(tun["name"])
    except (KeyError, ValueError):
        return document  # said where the name stands
    if name == DEFAULTS.device:
        return document
    fake = {"store": str(names_of(name)), **fake}
    control = {"socket": str(control_of(name)), **control}
    return {**document, "dns": {**dns, "fake_ip": fake}, "control": control}


def _first_host(value: Any, key: str) -> dict[str, str | None]:
    if value is None:
        return {key: None}
    try:
        network = values.parse_network(value)
    except ValueError:
        return {}  # said where the range stands
    return {key: f"{network.network_address + 1}/{network.prefixlen}"} if network.num_addresses > 1 else {}
