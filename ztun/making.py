"""Settings turned into the arguments of the parts: nothing here changes the machine."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from ztun import machine, platform
from ztun.config import Settings, to_rules
from ztun.errors import ConfigError
from ztun.gateway.dns import DnsService
from ztun.gateway.gateway import GatewayOptions
from ztun.gateway.limits import Limits
from ztun.geoip import CountryDatabase
from ztun.lifecycle import Undo
from ztun.names.pool import FakeIpPool
from ztun.names.store import SqliteNameStore
from ztun.outbound import OutboundSpec, Tools, make_outbounds
from ztun.placement import Placement
from ztun.ports import Classifier, Outbound, Routes, SystemResolver
from ztun.rules import DIRECT, Network

names_log = structlog.get_logger("ztun.names")


async def make_placement(settings: Settings, addresses: list[machine.InterfaceAddress], undo: Undo) -> Placement:
    """The rules, placed among this host's networks. Raises ConfigError for a country database that is none."""
    country = None
    countries: dict[str, list[Network]] = {}
    path = settings.route.geoip_database
    if path is not None:
        database = CountryDatabase(path)
        undo.push("the country database", database.close)
        country = database.country
        codes = {code for rule in settings.route.rules for code in rule.geoip}
        if codes:
            countries = await asyncio.to_thread(database.networks_of, codes)
    fake = settings.dns.fake_ip
    ranges = [network for network in (fake.range, fake.range6) if network is not None]
    placement = Placement(to_rules(settings, country), ranges, countries.__getitem__)
    placement.place(addresses)
    return placement


def make_names(settings: Settings, undo: Undo) -> FakeIpPool:
    """The pool of Fake-IPs with its store. Raises ConfigError when the ranges are too small for it."""
    fake = settings.dns.fake_ip
    store = None
    if fake.store is not None:
        store = SqliteNameStore(str(fake.store), _warn_of_names)
        undo.push("the store of Fake-IPs", store.close)
    try:
        return FakeIpPool(fake.range, fake.range6, fake.size, float(fake.ttl), store)
    except ValueError as error:
        raise ConfigError(f"dns.fake_ip.size: {error}") from None


def _warn_of_names(line: str) -> None:
    names_log.warning("trouble with the store of Fake-IPs", detail=line)


def make_tun_routes(settings: Settings, device: str) -> Routes:
    """Addresses and routes of the TUN called `device`."""
    tun, fake = settings.tun, settings.dns.fake_ip
    return platform.make_routes(
        device,
        mtu=tun.mtu,
        address=str(tun.address),
        address6=str(tun.address6) if tun.address6 is not None else None,
        ranges=[str(network) for network in (fake.range, fake.range6) if network is not None],
    )


def make_resolver(settings: Settings, device: str) -> SystemResolver | None:
    """What brings this host's own queries for names of the rules to ztun, with capture.host; None where nothing has to
    be done for it. They go to an address of the Fake-IPs, where port 53 is taken for ztun's own.
    """
    if not settings.capture.host or not settings.dns.hijack:
        return None
    rules = [rule for rule in settings.route.rules if rule.outbound != DIRECT]
    domains = [name for rule in rules for name in (*rule.domain, *rule.domain_suffix)]
    return platform.make_resolver(device, str(settings.tun.address.ip + 1), domains)


def with_device(settings: Settings, name: str) -> Settings:
    """The settings with the name that the TUN got: macOS chooses one for "utun"."""
    return settings.model_copy(update={"tun": settings.tun.model_copy(update={"name": name})})


async def make_classifier(
    settings: Settings, device: str, mark: int, addresses: list[machine.InterfaceAddress]
) -> Classifier:
    """What decides in the kernel which packets reach the TUN called `device`. Raises ZtunError."""
    capture = settings.capture
    return await platform.make_classifier(
        capture.backend,
        device,
        capture.lan,
        mark=mark,
        hijack_dns=settings.dns.hijack,
        fail=capture.fail,
        own_addresses=[entry.address for entry in addresses],
        xdp=capture.xdp,
        host=capture.host,
        tun_addresses=[at.ip.packed for at in (settings.tun.address, settings.tun.address6) if at is not None],
        offload=capture.offload,
    )


def make_proxies(settings: Settings, dns: DnsService, sockets: Any, undo: Undo) -> dict[str, Outbound]:
    """The outbounds under their tags. sockets: platform.make_socket_factory()."""
    specs = [
        OutboundSpec(
            tag=outbound.tag,
            type=outbound.type,
            host=outbound.host,
            port=outbound.port,
            username=outbound.username,
            password=outbound.password.get_secret_value() if outbound.password else None,
            udp=outbound.udp,
        )
        for outbound in settings.outbounds
    ]
    tools = Tools(
        platform.poller_of(asyncio.get_running_loop()),
        sockets,
        dns.resolve,
        settings.timeouts.dial,
        round(settings.pool.keepalive_interval),
        settings.pool.warmup,
        settings.pool.size,
    )
    outbounds = make_outbounds(specs, tools)
    for outbound in outbounds.values():
        undo.push(f"outbound {outbound.tag}", outbound.close)
    return outbounds


def gateway_options(settings: Settings) -> GatewayOptions:
    return GatewayOptions(
        mtu=settings.tun.mtu,
        hijack_dns=settings.dns.hijack,
        tcp_idle=settings.timeouts.tcp_idle,
        udp_idle=settings.timeouts.udp_idle,
        buffers=settings.pool.buffers,
        keepalive_interval=round(settings.pool.keepalive_interval),
        limits=Limits(**settings.limits.model_dump()),
    )


def choose_servers(settings: Settings, listen: list[str], addresses: list[machine.InterfaceAddress]) -> list[str]:
    """Whom to ask for names: `dns.servers`, or the resolvers of this host."""
    if "servers" in settings.dns.model_fields_set:
        return list(settings.dns.servers)
    comes_back = settings.capture.host and settings.dns.hijack
    known = machine.read_real_resolv_conf() if comes_back else machine.read_resolv_conf()
    return machine.default_servers(known, listen, [entry.ip for entry in addresses])


def wanted_listeners(settings: Settings) -> list[str] | None:
    """`dns.listen`, None when it is left out."""
    return list(settings.dns.listen) if "listen" in settings.dns.model_fields_set else None


def tun_addresses(settings: Settings) -> list[machine.IpAddress]:
    return [interface.ip for interface in (settings.tun.address, settings.tun.address6) if interface is not None]
