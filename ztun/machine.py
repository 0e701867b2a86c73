"""What this machine has to offer, compared with what the settings ask for, before anything is changed."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import resource
import socket
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ztun.errors import ConfigError, ZtunError

CAP_NET_ADMIN = 12  # linux/capability.h
DNS_PORT = 53
# What is asked for where the hard limit cannot be had: as many as limits.tcp_flows, and OPEN_MAX of macOS.
_OPEN_FILES = (65536, 10240)
# Of two that want one processor, this process gets three quarters of it (sched(7)): it is one thread, and what it does
# not get to holds up clients and proxies alike.
PRECEDENCE = -5
FALLBACK_SERVER = "udp://9.9.9.9:53"
# That of the host, and what systemd-resolved(8) and NetworkManager(8) know where that one names their stub.
RESOLV_CONFS = tuple(
    map(
        Path,
        (
            "/etc/resolv.conf",
            "/run/systemd/resolve/resolv.conf",
            "/run/NetworkManager/no-stub-resolv.conf",
            "/run/NetworkManager/resolv.conf",
        ),
    )
)
# Duplicate address detection keeps a new IPv6 address from being used for a second (RFC 4862, section 5.4).
_DETECTION_TIME = 3.0

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class InterfaceAddress(NamedTuple):
    """One address of an interface, packed, with its prefix length in bits."""

    ifname: str
    address: bytes
    length: int

    @property
    def ip(self) -> IpAddress:
        return ipaddress.ip_address(self.address)


def require_privilege() -> None:
    """Raises ZtunError unless this process may change the network (CAP_NET_ADMIN, or root where there are none)."""
    if not _may_change_network():
        raise ZtunError("needs root (CAP_NET_ADMIN) to change the network; run it with sudo")


def allow_many_sockets() -> None:
    """Raise the soft limit of open files to the hard one: every flow is a socket, and 1024 is soon reached."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, *_OPEN_FILES):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        except (ValueError, OSError):  # macOS calls its hard limit infinite, and takes less (setrlimit(2))
            continue
        return


def take_precedence() -> None:
    """Have packets wait less for other programs where processors are busy (nice(2)). Who chose otherwise, or may not do
    this, keeps what there is.
    """
    with suppress(OSError):
        if os.getpriority(os.PRIO_PROCESS, 0) == 0:
            os.setpriority(os.PRIO_PROCESS, 0, PRECEDENCE)


def _may_change_network() -> bool:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "CapEff":
                return bool(int(value, 16) >> CAP_NET_ADMIN & 1)
    return os.geteuid() == 0


def absent_interfaces(names: Sequence[str]) -> list[str]:
    """Those of capture.lan that do not exist (yet)."""
    present = {name for _, name in socket.if_nameindex()}
    return [name for name in names if name not in present]


def parse_endpoint(text: str) -> tuple[IpAddress, int]:
    """ "10.0.0.1:53", "[2001:db8::1]:53", or an address alone (port 53). Raises ValueError."""
    with suppress(ValueError):
        return ipaddress.ip_address(text), DNS_PORT
    host, _, port = text.rpartition(":")
    number = int(port)
    if not 0 < number < 65536:
        raise ValueError(f"{number} is no port")
    return ipaddress.ip_address(host.strip("[]")), number


def format_endpoint(address: IpAddress, port: int) -> str:
    """The inverse of parse_endpoint."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


async def check_listen(listen: Sequence[str], own: Collection[IpAddress], *, waiting: bool = False) -> list[str]:
    """Every address of dns.listen is ours and its port is free, or an error names the entry. Returns the entries.

    waiting: for interfaces to appear; entries whose address is on none are left out then.
    Raises ConfigError for an address that is on no interface, ZtunError for a port that another program holds.
    """
    usable = []
    for index, text in enumerate(listen):
        key = f"dns.listen[{index}]"
        address, port = parse_endpoint(text)
        if not (address.is_unspecified or address.is_loopback or address in own):
            if waiting:
                continue
            raise ConfigError(f"{key}: {address} is not an address of any interface of this machine; {_advice(own)}")
        problem = await probe(address, port)
        if problem:
            raise ZtunError(f"{key}: cannot listen on {text}: {problem}; stop that program or choose another address")
        usable.append(text)
    return usable


def _advice(own: Iterable[IpAddress]) -> str:
    usable = [str(address) for address in own if not (address.is_loopback or address.is_link_local)]
    return f"use one of {', '.join(usable)}" if usable else "give an interface an address first"


async def default_listen(lan: Collection[str], addresses: Iterable[InterfaceAddress]) -> tuple[list[str], list[str]]:
    """Where to answer DNS when dns.listen is absent: port 53 of every address of the LAN interfaces.

    Clients usually ask their gateway; queries to other servers are hijacked. Returns the free ones, and a line for each
    that is not, since a default must not keep ztun from starting.
    """
    free, taken = [], []
    for entry in addresses:
        if entry.ifname in lan and not entry.ip.is_link_local:
            text = format_endpoint(entry.ip, DNS_PORT)
            problem = await probe(entry.ip, DNS_PORT)
            if problem:
                taken.append(f"{text}: {problem}")
            else:
                free.append(text)
    return free, taken


async def probe(address: IpAddress, port: int) -> str | None:
    """Whether UDP and TCP can be bound there; None when they can, else the reason in a few words."""
    deadline = asyncio.get_running_loop().time() + _DETECTION_TIME
    while True:
        error = _bind_both(address, port)
        if error is None:
            return None
        tentative = error.errno == errno.EADDRNOTAVAIL and address.version == 6
        if not tentative or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.1)
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by {find_holder(port) or 'another program'}"
    if error.errno == errno.EACCES:
        return f"port {port} needs root or CAP_NET_BIND_SERVICE"
    return (error.strerror or str(error)).lower()


def _bind_both(address: IpAddress, port: int) -> OSError | None:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
        with socket.socket(family, kind) as trial:
            if kind == socket.SOCK_STREAM:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                trial.bind((str(address), port))
            except OSError as error:
                return error
    return None


def find_holder(port: int) -> str | None:
    """ "dnsmasq (pid 77)": a program that has `port` open (proc(5), /proc/net and /proc/PID/fd); None if unknown."""
    inodes = set()
    for table in ("udp", "udp6", "tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                is_open = table.startswith("udp") or fields[3] == "0A"  # TCP_LISTEN
                if is_open and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for directory in Path("/proc").glob("[0-9]*") if inodes else ():
        with suppress(OSError):
            if any(_link(fd) in inodes for fd in (directory / "fd").iterdir()):
                return f"{(directory / 'comm').read_text().strip()} (pid {directory.name})"
    return None


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def default_servers(resolv_conf: str, listen: Sequence[str], own: Collection[IpAddress]) -> list[str]:
    """Upstream resolvers when dns.servers is absent: the name servers of resolv.conf(5) that are not ourselves.

    listen: the addresses ztun answers on; own: those of this machine, which count when it listens on all of them.
    """
    ours = {parse_endpoint(text)[0] for text in listen if parse_endpoint(text)[1] == DNS_PORT}
    if any(address.is_unspecified for address in ours):
        ours |= set(own)
    servers = []
    for line in resolv_conf.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            with suppress(ValueError):
                address = ipaddress.ip_address(words[1])
                if address not in ours and not address.is_unspecified:
                    servers.append(f"udp://{format_endpoint(address, DNS_PORT)}")
    return servers or [FALLBACK_SERVER]


def read_resolv_conf(path: Path = Path("/etc/resolv.conf")) -> str:
    """The text of /etc/resolv.conf, empty when there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_real_resolv_conf(paths: Iterable[Path] = RESOLV_CONFS) -> str:
    """The first of these files that names a server beyond this host, without those that are on it.

    What a resolver on this host asks comes to us where this host is captured, so that asking it would be asking
    ourselves. Those that serve a stub there write down whom they ask.
    """
    for path in paths:
        lines = [line for line in read_resolv_conf(path).splitlines() if not _names_loopback(line)]
        if any(line.split()[:1] == ["nameserver"] for line in lines):
            return "\n".join(lines)
    return ""


def _names_loopback(line: str) -> bool:
    words = line.split()
    if len(words) < 2 or words[0] != "nameserver":
        return False
    try:
        return ipaddress.ip_address(words[1]).is_loopback
    except ValueError:
        return False
