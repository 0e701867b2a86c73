"""What this kernel and this network namespace offer, for `ztun doctor`. Everything here only looks."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, TypeVar

from ztun.errors import ZtunError
from ztun.platform.linux import bpfcall, firewall, journal, layout, loader, netlink, sysctl, xdp
from ztun.platform.linux.attachments import Sight, list_attachments
from ztun.platform.linux.classifier import MAPS, PROGRAMS
from ztun.platform.linux.routes import PROTOCOL
from ztun.platform.linux.sockets import MarkedSockets
from ztun.platform.linux.tun import open_tun
from ztun.platform.shapes import BpfFacts, Diversion, Instance, Route, TunFacts
from ztun.ports import SocketFactory

T = TypeVar("T")

_UAPI = Path("/usr/include/linux/ip.h")
_IP_MTU, _IPV6_MTU = 14, 24  # linux/in.h, linux/in6.h
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_LOCAL_TABLE = 255
_UNICAST = 1  # RTN_UNICAST
_DHCP_FILES = ("dnsmasq.conf", "dnsmasq.d/*", "dhcp/dhcpd.conf")  # below /etc
_DHCP_OPTIONS = (
    re.compile(
        r"^\s*dhcp-option(?:-force)?=(?:tag:[^,]*,)*(?:option:dns-server|option6:dns-server|6),(.*)$", re.MULTILINE
    ),
    re.compile(r"^\s*option\s+(?:domain-name-servers|dhcp6\.name-servers)\s+([^;]*);", re.MULTILINE),
)
RULE_PRIORITY = 31330  # of the first of our ip rules, see policy
STATE_DIRECTORY = journal.DIRECTORY
_libc = ctypes.CDLL(None, use_errno=True)


def kernel() -> str:
    """The release of the kernel."""
    return platform.release()


def bcc_problem() -> str | None:
    """Why bcc's Python module cannot be used, None when it can. It is not imported: that would cost 110 MB."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or not spec.submodule_search_locations:
        return "there is no module bcc for this Python"
    # What PyPI calls bcc is another program.
    if not any(Path(place, "libbcc.py").is_file() for place in spec.submodule_search_locations):
        return f"the module bcc in {spec.submodule_search_locations[0]} is another one"
    return None


def headers_problem() -> str | None:
    """Why the UAPI headers cannot be used, None when they can."""
    return None if _UAPI.is_file() else f"{_UAPI} is not there"


async def probe_bpf() -> BpfFacts:
    """Compile and load the programs and let them go again. Attaches nothing."""
    wanted = {xdp.PROGRAM: xdp.label("")}
    try:
        objects = await loader.load(layout.find_sources(), PROGRAMS, {**MAPS, **xdp.MAPS}, wanted)
    except ZtunError as error:
        return BpfFacts(str(error), None, None)
    except OSError as error:
        return BpfFacts(error.strerror or str(error), None, None)
    try:
        refused = ", ".join(objects.refused.values()) or None
        return BpfFacts(None, bpfcall.has_tcx(objects.programs["reply"]), refused is None, refused)
    finally:
        objects.close()


def jit() -> str | None:
    """net.core.bpf_jit_enable: "0" interpreted, "1" compiled; None where the kernel does not say."""
    return sysctl.read("core/bpf_jit_enable")


def probe_tun() -> TunFacts:
    """Make a TUN in a network namespace of its own, which is gone with the thread that made it."""

    def work() -> TunFacts:
        if _libc.unshare(_CLONE_NEWNET):
            code = ctypes.get_errno()
            return _can_open_tun(os.strerror(code).lower())
        try:
            device = open_tun("ztun-doctor", 1500)
        except ZtunError as error:
            return TunFacts(str(error), None)
        try:
            return TunFacts(None, device.cuts_datagrams)
        finally:
            device.close()

    return _in_thread(work)


def _can_open_tun(reason: str) -> TunFacts:
    """What is left to know without a namespace to try it in."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return TunFacts(f"/dev/net/tun: {(error.strerror or reason).lower()}", None)
    return TunFacts(None, None)


def _in_thread(work: Callable[[], T]) -> T:
    outcome: list[T] = []
    thread = threading.Thread(target=lambda: outcome.append(work()), name="ztun-probe")
    thread.start()
    thread.join()
    return outcome[0]


def ipv6_problem() -> str | None:
    """Why this network namespace has no IPv6, None when it has."""
    value = sysctl.read("ipv6/conf/all/disable_ipv6")
    if value is None:
        return "the kernel has none"
    return "net.ipv6.conf.all.disable_ipv6 is 1" if value == "1" else None


def forwarding() -> dict[str, bool]:
    """ "ipv4" and "ipv6" -> whether the kernel forwards. What it does not have is missing."""
    found = {"ipv4": sysctl.read("ipv4/ip_forward"), "ipv6": sysctl.read("ipv6/conf/all/forwarding")}
    return {family: value != "0" for family, value in found.items() if value is not None}


def rp_filter(ifname: str) -> int | None:
    """0 none, 1 strict, 2 loose: the higher of `all` and the interface holds (ip-sysctl.rst). None without one."""
    values = [sysctl.read(f"ipv4/conf/{which}/rp_filter") for which in ("all", ifname)]
    return max(int(value) for value in values if value) if values[1] is not None else None


def links() -> dict[str, dict[str, Any]]:
    """Interface -> {"up", "carrier", "mtu", "bridge"}; bridge: the one it is a port of, else ""."""

    def read(ip: Any) -> dict[str, dict[str, Any]]:
        messages = list(ip.get_links())
        names = {link["index"]: netlink.attribute(link, "IFLA_IFNAME") for link in messages}
        return {names[link["index"]]: describe(link, names) for link in messages}

    def describe(link: Any, names: Mapping[int, str]) -> dict[str, Any]:
        info = netlink.attribute(link, "IFLA_LINKINFO")
        is_port = info is not None and netlink.attribute(info, "IFLA_INFO_SLAVE_KIND") == "bridge"
        return {
            "up": bool(link["flags"] & 0x1),
            "carrier": bool(link["flags"] & 0x40),
            "mtu": netlink.attribute(link, "IFLA_MTU"),
            "bridge": names.get(netlink.attribute(link, "IFLA_MASTER"), "") if is_port else "",
        }

    return netlink.run(read)


def routes() -> list[Route]:
    """Every unicast route of this namespace, of all tables but `local`."""

    def read(ip: Any) -> list[Route]:
        names = {link["index"]: netlink.attribute(link, "IFLA_IFNAME") for link in ip.get_links()}
        found = []
        for route in ip.get_routes():
            table = netlink.attribute(route, "RTA_TABLE") or route["table"]
            if table == _LOCAL_TABLE or route["type"] != _UNICAST:
                continue
            anywhere = "0.0.0.0" if route["family"] == socket.AF_INET else "::"
            network = ip_network(f"{netlink.attribute(route, 'RTA_DST') or anywhere}/{route['dst_len']}")
            device = names.get(netlink.attribute(route, "RTA_OIF"))
            found.append(Route(network, device, table, route["proto"] == PROTOCOL))
        return found

    return netlink.run(read)


def diversions() -> list[Diversion]:
    """The ip rules that are not ours, apart from those that every host has (local, main, default)."""

    def read(ip: Any) -> Iterator[Diversion]:
        for family, word in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
            for rule in ip.get_rules(family=family):
                about = {key: netlink.attribute(rule, f"FRA_{key.upper()}") for key in ("priority", "table", "fwmark")}
                if (about["priority"] or 0, about["table"]) in ((0, 255), (32766, 254), (32767, 253)):
                    continue
                if netlink.attribute(rule, "FRA_PROTOCOL") != PROTOCOL:
                    iif = netlink.attribute(rule, "FRA_IIFNAME")
                    yield Diversion(about["priority"] or 0, word, about["table"], iif, about["fwmark"])

    return netlink.run(lambda ip: list(read(ip)))


def attachments() -> tuple[list[dict[str, Any]], list[str]]:
    """Every program on every interface (see ztun.platform.linux.attachments), and what could not be seen."""
    sight = Sight()
    return netlink.run(lambda ip: list_attachments(ip, sight)), sight.unseen


def ingress_qdiscs() -> dict[str, str]:
    """Interface -> "clsact" or "ingress", where it has one of these."""

    def read(ip: Any) -> dict[str, str]:
        names = {link["index"]: netlink.attribute(link, "IFLA_IFNAME") for link in ip.get_links()}
        kinds = ((names.get(qdisc["index"]), netlink.attribute(qdisc, "TCA_KIND")) for qdisc in ip.get_qdiscs())
        return {ifname: kind for ifname, kind in kinds if ifname and kind in ("clsact", "ingress")}

    return netlink.run(read)


def forward_drops(ifname: str) -> list[str]:
    """The chains that drop what is forwarded and have no rule about an interface, as "ip filter FORWARD"."""
    return firewall.find_forward_drops(ifname)


def accepting(chains: Iterable[str], ifname: str) -> str:
    """The commands that have those chains accept what comes from and goes to an interface."""
    return firewall.remedy(chains, ifname)


def path_mtu(address: str, mark: int) -> tuple[int, str] | None:
    """(MTU in bytes of the path to an address as far as the kernel knows it, our source address); None without a way.

    Nothing is sent: connecting a datagram socket only looks the route up.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    level, option = (socket.IPPROTO_IP, _IP_MTU) if family == socket.AF_INET else (socket.IPPROTO_IPV6, _IPV6_MTU)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        with suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        try:
            probe.connect((address, 9))
            return probe.getsockopt(level, option), probe.getsockname()[0]
        except OSError:
            return None


def instances() -> list[Instance]:
    """The living instances of this network namespace, by their state files (/run/ztun)."""
    return [
        Instance(found.record.device, found.record.pid)
        for found in journal.find_all()
        if found.alive and found.record is not None and found.is_here()
    ]


def sockets(mark: int) -> SocketFactory:
    """A maker of sockets, marked if we may."""
    marked = MarkedSockets(mark)
    try:
        marked(socket.AF_INET, socket.SOCK_DGRAM).close()
    except ZtunError:
        return MarkedSockets(0)
    return marked


def dhcp_resolvers(root: Path = Path("/etc")) -> list[tuple[IPv4Address | IPv6Address, str]]:
    """(resolver, file) that a DHCP server of this host tells its clients: dnsmasq's, or ISC dhcpd's configuration.

    Without such an option dnsmasq names itself.
    """
    found = []
    for path in (path for pattern in _DHCP_FILES for path in sorted(root.glob(pattern)) if path.is_file()):
        with suppress(OSError):
            text = path.read_text(errors="replace")
            for line in (line for option in _DHCP_OPTIONS for line in option.findall(text)):
                for word in line.replace(",", " ").split():
                    with suppress(ValueError):
                        address = ip_address(word.strip("[]"))
                        if not address.is_unspecified:  # dnsmasq's word for itself
                            found.append((address, str(path)))
    return found


def resolved_servers(stub: Iterable[str]) -> list[str]:
    """Whom systemd-resolved asks (resolved.conf(5)), if resolv.conf's servers `stub` are its stub; else nobody."""
    if not set(stub) & {"127.0.0.53", "127.0.0.54"}:
        return []
    with suppress(OSError):
        lines = Path("/run/systemd/resolve/resolv.conf").read_text().splitlines()
        return [line.split()[1] for line in lines if line.startswith("nameserver ") and len(line.split()) > 1]
    return []
