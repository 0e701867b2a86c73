"""Interfaces, forwarding, filters and sizes."""

from __future__ import annotations

import asyncio
import socket

from ztun import privileges
from ztun.doctor.finding import Finding, ok, problem, warning
from ztun.doctor.scene import MARK, Scene
from ztun.platform import facts

_SMALLEST_MTU = 1280  # RFC 8200, section 5
_STRICT = 1
_FAMILIES = {"ipv4": "net.ipv4.ip_forward", "ipv6": "net.ipv6.conf.all.forwarding"}


def check_lan(scene: Scene) -> Finding:
    if not scene.lan:
        if scene.settings.capture.host:
            return ok("lan", "no LAN, this host's own traffic alone")
        return warning("lan", "nothing is captured", "set capture.lan, or give --lan IFACE")
    ports = {ifname: scene.links[ifname]["bridge"] for ifname in scene.present() if scene.links[ifname]["bridge"]}
    if ports:
        detail = ", ".join(f"{ifname} is a port of {bridge}" for ifname, bridge in ports.items())
        return problem("lan", f"{detail}, by which its packets come in", f"capture {', '.join(set(ports.values()))}")
    absent = [ifname for ifname in scene.lan if ifname not in scene.links]
    down = [ifname for ifname in scene.present() if not scene.links[ifname]["up"]]
    idle = [ifname for ifname in scene.present() if ifname not in down and not scene.links[ifname]["carrier"]]
    states = {"absent": absent, "down": down, "without carrier": idle}
    faults = [f"{', '.join(some)} {state}" for state, some in states.items() if some]
    if not faults:
        return ok("lan", f"{', '.join(scene.lan)} up")
    known = ", ".join(name for name in scene.links if name not in ("lo", *scene.lan))
    remedy = f"there are {known}; ip link set IFACE up; ztun waits for those that are absent"
    return warning("lan", "; ".join(faults), remedy)


def check_forwarding(scene: Scene) -> Finding:
    if not scene.lan:
        return ok("forwarding", "no LAN to forward for")
    off = [family for family, is_on in facts.forwarding().items() if not is_on]
    if not off:
        return ok("forwarding", "direct traffic of the LAN is forwarded by the kernel")
    if "ipv6" in off and "ipv4" not in off and not _has_global6(scene):
        return ok("forwarding", "IPv4 is forwarded, and the LAN has no IPv6")
    detail = f"no forwarding of {' and '.join(off)}: what goes direct ends here"
    return warning("forwarding", detail, f"sysctl -w {' '.join(f'{_FAMILIES[family]}=1' for family in off)}")


def _has_global6(scene: Scene) -> bool:
    return any(entry.ip.version == 6 and not entry.ip.is_link_local for entry in scene.addresses_of(scene.lan))


def check_forward_policy(scene: Scene) -> Finding:
    device = scene.settings.tun.name
    if not privileges.has(privileges.NET_ADMIN):
        return ok("forward-policy", "the firewall's chains cannot be read without CAP_NET_ADMIN")
    if not scene.wants_bpf:
        chains = facts.forward_drops(device)
        if chains:
            detail = f"what is tunnelled is dropped, unless a rule accepts it, by {', '.join(chains)}"
            return problem("forward-policy", detail, f"{facts.accepting(chains, device)}; or capture.backend: auto")
    for ifname in scene.present():
        chains = facts.forward_drops(ifname)
        if chains:
            detail = f"what {ifname} sends directly is dropped, unless a rule accepts it, by {', '.join(chains)}"
            return warning("forward-policy", detail, facts.accepting(chains, ifname))
    return ok("forward-policy", "no firewall chain drops what is forwarded")


def check_rp_filter(scene: Scene) -> Finding:
    strict = [ifname for ifname in scene.present() if facts.rp_filter(ifname) == _STRICT]
    reached = {route.device for route in scene.routes}
    deaf = [ifname for ifname in strict if ifname not in reached]
    if deaf:
        detail = f"strict on {', '.join(deaf)}, by which no route leads: every packet that comes in is dropped"
        return problem("rp-filter", detail, f"give it addresses, or sysctl -w net.ipv4.conf.{deaf[0]}.rp_filter=2")
    if strict:
        return ok("rp-filter", f"strict on {', '.join(strict)}; clients are reached by it")
    return ok("rp-filter", "not strict on the captured interfaces")


def check_mtu(scene: Scene) -> Finding:
    mtu = scene.settings.tun.mtu
    smaller = [ifname for ifname in scene.present() if scene.links[ifname]["mtu"] < mtu]
    if smaller:
        least = min(scene.links[ifname]["mtu"] for ifname in smaller)
        detail = f"tun.mtu {mtu} is more than {', '.join(smaller)} takes ({least}): datagrams come in fragments"
        return warning("mtu", detail, f"set tun.mtu to {max(least, _SMALLEST_MTU)}")
    return ok("mtu", f"tun.mtu {mtu} suits the captured interfaces")


async def check_path_mtu(scene: Scene) -> Finding:
    known: dict[str, int] = {}
    lost: list[str] = []
    for outbound in scene.settings.outbounds:
        found = [facts.path_mtu(address, MARK) for address in await resolve(outbound.host, outbound.port)]
        sizes = [each[0] for each in found if each is not None]
        if sizes:
            known[outbound.tag] = min(sizes)
        else:
            lost.append(outbound.tag)
    if lost:
        return problem("path-mtu", f"no route to {', '.join(lost)}", "ip route get ADDRESS shows why")
    small = {tag: size for tag, size in known.items() if size < _SMALLEST_MTU}
    said = ", ".join(f"{tag} {size}" for tag, size in (small or known).items())
    if small:
        remedy = "raise the MTU of the interface on the way, or lower tun.mtu with it"
        return warning("path-mtu", f"less than 1280 bytes to {said}", remedy)
    return ok("path-mtu", f"to {said}" if known else "no proxies")


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, none where it has none."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
