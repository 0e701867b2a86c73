"""Who resolves names, for this host and for its clients."""

from __future__ import annotations

import asyncio
from collections import Counter
from ipaddress import ip_interface

from ztun import machine
from ztun.doctor.finding import Finding, Level, judge, ok, problem, warning
from ztun.doctor.network import resolve
from ztun.doctor.scene import MARK, Scene
from ztun.gateway.dns.servers import Server, parse_servers
from ztun.gateway.dns.transport import UpstreamError
from ztun.gateway.dns.upstream import Resolver
from ztun.names.message import Type, make_query
from ztun.platform import facts

# A name that cannot exist (RFC 6761, section 6.4): any answer will do, and nobody is told what we look for.
_QUESTION = "ztun-doctor.invalid"


def check_resolver(scene: Scene) -> Finding:
    servers = _system_servers()
    if not servers:
        remedy = "name a server in /etc/resolv.conf, and set dns.servers"
        return warning("resolver", "/etc/resolv.conf names no server: this host resolves nothing", remedy)
    behind = facts.resolved_servers(servers)
    said = ", ".join(servers) + (f" (systemd-resolved, which asks {', '.join(behind)})" if behind else "")
    if scene.settings.capture.host:
        said += ", and ztun answers" if scene.settings.dns.hijack else ", and ztun does not see it (dns.hijack is off)"
    return ok("resolver", f"this host asks {said}")


def _system_servers() -> list[str]:
    lines = (line.split() for line in machine.read_resolv_conf().splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def check_clients_dns(scene: Scene) -> Finding:
    dns, listen = scene.settings.dns, scene.listen()
    by_name = any(rule.domain or rule.domain_suffix or rule.domain_keyword for rule in scene.settings.route.rules)
    at = ", ".join(listen)
    if dns.hijack and scene.lan:
        where = f"answered on {at}, and " if listen else ""
        detail = f"clients' queries are {where}taken on their way to any server beyond this gateway"
        return ok("clients-dns", f"{detail} (not in their own network, nor by DoH or DoT)")
    if listen:
        remedy = "have DHCP hand out one of these as the resolver, or set dns.hijack to true"
        level = Level.WARNING if by_name else Level.OK
        return judge("clients-dns", level, f"names are known only of clients that ask {at} (dns.hijack is off)", remedy)
    remedy = "set dns.listen or dns.hijack"
    level = Level.PROBLEM if by_name else Level.OK
    return judge("clients-dns", level, "nobody's queries are seen: rules for names match nothing", remedy)


async def check_dhcp(scene: Scene) -> Finding:
    offered = await asyncio.to_thread(facts.dhcp_resolvers)
    if not offered:
        return ok("dhcp", "no DHCP server of this host names another resolver")
    own = {entry.ip for entry in scene.addresses_of(scene.lan)}
    networks = [ip_interface((entry.address, entry.length)).network for entry in scene.addresses_of(scene.lan)]
    beside = [
        f"{address} ({place})"
        for address, place in offered
        if address not in own and any(address in network for network in networks)
    ]
    if beside:
        remedy = "hand out this gateway's address instead"
        return warning("dhcp", f"clients are told to ask {', '.join(beside)}, past this gateway", remedy)
    past = [str(address) for address, _ in offered if address not in own]
    if past and not scene.settings.dns.hijack:
        return warning("dhcp", f"clients are told to ask {', '.join(past)}", "set dns.hijack to true")
    return ok(
        "dhcp", f"clients are told to ask {', '.join(str(address) for address, _ in offered)}, which is seen here"
    )


async def check_dns_servers(scene: Scene) -> Finding:
    servers = parse_servers(_servers(scene))
    answers = await asyncio.gather(*(_ask(scene, server) for server in servers))
    silent = [f"{server} ({reason})" for server, reason in zip(servers, answers, strict=True) if reason is not None]
    if not silent:
        return ok("dns-servers", f"{', '.join(map(str, servers))} {'answers' if len(servers) == 1 else 'answer'}")
    remedy = "correct dns.servers, or the way to them"
    if len(silent) == len(servers):
        return problem("dns-servers", f"no DNS server answers: {', '.join(silent)}", remedy)
    return warning("dns-servers", f"no answer from {', '.join(silent)}", remedy)


def _servers(scene: Scene) -> list[str]:
    if "servers" in scene.settings.dns.model_fields_set:
        return list(scene.settings.dns.servers)
    own = [entry.ip for entry in scene.addresses]
    return machine.default_servers(machine.read_resolv_conf(), scene.listen(), own)


async def _ask(scene: Scene, server: Server) -> str | None:
    """Why a server does not answer, None when it does."""
    if not server.is_address:
        return None if await resolve(server.host, server.port) else "its name has no address"
    resolver = Resolver([server], facts.sockets(MARK), lambda _address: False, Counter(), deadline=scene.timeout)
    try:
        await resolver.ask(make_query(_QUESTION, Type.A))
    except UpstreamError as error:
        return str(error)
    finally:
        await resolver.close()
    return None
