"""Who else is here: other instances, other owners of names, addresses, hooks and rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from ztun import machine, platform
from ztun.control import claims
from ztun.doctor.finding import Finding, Level, judge, ok, problem, warning
from ztun.doctor.scene import Scene
from ztun.platform import facts

Network = IPv4Network | IPv6Network

# A route for half of the internet (VPN clients like 0.0.0.0/1) is a default route, and nobody's network.
_HALVES = 3  # bits


def check_instance(scene: Scene) -> Finding:
    found = claims.conflicts(claims.claims_of(scene.settings), scene.pid)
    if found:
        whole = [line.partition("; ") for line in found]
        remedies = dict.fromkeys(remedy for _, _, remedy in whole)
        return problem("instance", "; ".join(what for what, *_ in whole), "; ".join(["ztun down for it", *remedies]))
    beside = ", ".join(f"{each.device} (pid {each.pid})" for each in facts.instances() if each.pid != scene.pid)
    also = f"; beside it {beside}" if beside else ""
    if scene.running is not None:
        return ok("instance", f"running as pid {scene.pid or '?'}, and looked at beside it{also}")
    return ok("instance", f"no other ztun in the way{also}")


def check_tun_name(scene: Scene) -> Finding:
    name = scene.settings.tun.name
    if name not in scene.links:
        return ok("tun-name", f"{name} is free")
    if scene.running is not None:
        return ok("tun-name", f"{name} is that of the running instance")
    remedy = f"choose another tun.name, or ip link delete {name} if it is nobody's"
    return problem("tun-name", f"somebody has an interface {name} already", remedy)


async def check_port_53(scene: Scene) -> Finding:
    listen = scene.listen()
    if scene.running is not None:
        return ok("port-53", "left to the running instance")
    own = {entry.ip for entry in scene.addresses}
    taken = []
    for text in listen:
        address, port = machine.parse_endpoint(text)
        if address.is_unspecified or address.is_loopback or address in own:
            reason = await machine.probe(address, port)
            taken += [f"{text}: {reason}"] if reason else []
        elif address not in _future(scene):
            taken.append(f"{text}: no interface has this address")
    if not taken:
        return ok("port-53", f"free on {', '.join(listen)}" if listen else "no listener is asked for")
    is_asked_for = "listen" in scene.settings.dns.model_fields_set
    level = Level.PROBLEM if is_asked_for else Level.WARNING
    remedy = "stop that program or bind it elsewhere, or set dns.listen to another address"
    return judge("port-53", level, "; ".join(taken), remedy)


def _future(scene: Scene) -> set[machine.IpAddress]:
    """Addresses that the TUN will have."""
    tun = scene.settings.tun
    return {interface.ip for interface in (tun.address, tun.address6) if interface is not None}


def check_fake_ip(scene: Scene) -> Finding:
    tun, fake = scene.settings.tun, scene.settings.dns.fake_ip
    ours: list[Network] = [network for network in (fake.range, fake.range6) if network is not None]
    ours += [interface.network for interface in (tun.address, tun.address6) if interface is not None]
    found = list(dict.fromkeys([*_used_addresses(scene, ours), *_used_routes(scene, ours)]))
    if not found:
        return ok("fake-ip", f"nobody else uses {', '.join(dict.fromkeys(map(str, ours)))}")
    remedy = "set dns.fake_ip.range and range6 to networks that nobody uses"
    return problem("fake-ip", f"in use already: {', '.join(found)}", remedy)


def _used_addresses(scene: Scene, ours: Iterable[Network]) -> list[str]:
    theirs = [entry for entry in scene.addresses if entry.ifname != scene.settings.tun.name]
    return [f"{entry.ip} on {entry.ifname}" for entry in theirs if any(entry.ip in network for network in ours)]


def _used_routes(scene: Scene, ours: Iterable[Network]) -> list[str]:
    found = []
    for route in scene.routes:
        if route.is_ours or route.device == scene.settings.tun.name or route.network.prefixlen < _HALVES:
            continue
        if any(_overlap(route.network, network) for network in ours):
            found.append(f"route {route.network} by {route.device or 'nothing'}")
    return found


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def check_qdisc(scene: Scene) -> Finding:
    kinds = facts.ingress_qdiscs()
    old = [ifname for ifname in scene.present() if kinds.get(ifname) == "ingress"]
    if not old:
        return ok("qdisc", "no other ingress qdisc on the captured interfaces")
    detail = f"an ingress qdisc, which leaves no room for clsact, on {', '.join(old)}"
    level = Level.PROBLEM if scene.backend == "clsact" else Level.WARNING if scene.wants_bpf else Level.OK
    return judge("qdisc", level, detail, f"tc qdisc del dev {old[0]} ingress, or a kernel with TCX (6.6)")


def check_programs(scene: Scene) -> Finding:
    attached, unseen = facts.attachments()
    theirs = [
        f"{each['name'] or each['filter'] or each['id']} at {each['hook']} of {each['ifname']}"
        for each in attached
        if each["ifname"] in scene.lan and not each["hook"].startswith("xdp") and not _is_ours(scene, each)
    ]
    if theirs:
        remedy = "nothing if they let packets go on; they run before or behind ours, see `ztun routes`"
        return warning("programs", f"others' BPF programs: {', '.join(theirs)}", remedy)
    return ok("programs", "no others' programs on the captured interfaces" if not unseen else f"not seen: {unseen[0]}")


def check_foreign_xdp(scene: Scene) -> Finding:
    attached, _unseen = facts.attachments()
    theirs = [
        f"{each['name'] or each['id']} on {each['ifname']}"
        for each in attached
        if each["ifname"] in scene.lan and each["hook"].startswith("xdp") and not _is_ours(scene, each)
    ]
    if not theirs:
        return ok("foreign-xdp", "no others' XDP program on the captured interfaces")
    remedy = "see that it passes the packets on; ours is left out there, so capture.xdp: false"
    return warning("foreign-xdp", f"an XDP program sees packets first: {', '.join(theirs)}", remedy)


def _is_ours(scene: Scene, attached: Mapping[str, Any]) -> bool:
    return attached["owner"] == "ztun" or (scene.running is not None and attached["id"] in scene.own_programs)


def check_ip_rules(scene: Scene) -> Finding:
    before = [rule for rule in facts.diversions() if rule.priority < facts.RULE_PRIORITY]
    if not before:
        return ok("ip-rules", "no ip rules of others in front of ours")
    said = ", ".join(f"{rule.priority} ({rule.family}) to table {rule.table}" for rule in before[:4])
    detail = f"others' ip rules come first: {said}{f' and {len(before) - 4} more' if len(before) > 4 else ''}"
    if not scene.wants_bpf:
        remedy = f"give them priorities above {facts.RULE_PRIORITY}, or set capture.backend to auto"
        return warning("ip-rules", detail, remedy)
    return ok("ip-rules", f"{detail}; BPF decides before them")


def check_leftovers(scene: Scene) -> Finding:
    found = platform.find_leftovers()
    if not found:
        return ok("leftovers", "nothing is left of a dead instance")
    return warning(
        "leftovers", f"of a dead instance: {', '.join(found)}", "ztun down removes them, as does the next start"
    )
