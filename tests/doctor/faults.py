"""Faults, each with the check that finds it: made by commands in the namespace, or by what only a program can do."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from doctor.conftest import FAR4, LAN4, WAN4, Patient
from ztun.platform.linux import facts, layout, loader, xdp
from ztun.platform.linux.hooks import TcxHook
from ztun.platform.linux.policy import table_of

Provoke = Callable[[Patient], AbstractContextManager[object]]


@dataclass(frozen=True)
class Fault:
    """words: of what is said and what is to be done; commands: run in the namespace; provoke: holds the fault."""

    check: str
    level: str
    words: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    provoke: Provoke = lambda _patient: nullcontext()

    def __str__(self) -> str:
        return f"{self.check}-{self.level}-{self.words[0]}".replace(" ", "-")


@contextmanager
def living_instance(_patient: Patient) -> Iterator[None]:
    """What an instance claims as long as it lives (ztun.control.claims), here the interface alone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        claim.bind("\0ztun/1/lan/lan0")
        yield


@contextmanager
def port_taken(_patient: Patient) -> Iterator[None]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind((LAN4, 53))
        yield


@contextmanager
def foreign_tcx(_patient: Patient) -> Iterator[None]:
    """To the doctor a program is another's unless a running instance calls it its own."""
    objects = asyncio.run(loader.load(layout.find_sources(), ["reply"], {}))
    hook = TcxHook("reply", objects.programs["reply"], "lan0")
    try:
        yield
    finally:
        hook.close()
        objects.close()


@contextmanager
def foreign_xdp(_patient: Patient) -> Iterator[None]:
    objects = asyncio.run(loader.load(layout.find_sources(), [], {}, {xdp.PROGRAM: "somebody"}))
    hook = xdp.LinkHook(objects.programs[xdp.PROGRAM], socket.if_nametoindex("lan0"), 1 << 1)  # XDP_FLAGS_SKB_MODE
    try:
        yield
    finally:
        hook.close()
        objects.close()


def answering(*answers: bytes) -> Provoke:
    """A server on port 1080 that says `answers`, one for each thing it hears, and nothing more."""

    @contextmanager
    def serve(_patient: Patient) -> Iterator[None]:
        with socket.create_server((WAN4, 1080)) as listener:
            thread = threading.Thread(target=work, args=(listener,), daemon=True)
            thread.start()
            yield
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)

    def work(listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    connection.recv(4096)
                    connection.sendall(answer)
                while connection.recv(4096):
                    pass
        except OSError:
            pass

    return serve


def proxy(kind: str = "socks5", host: str = WAN4, **more: str) -> dict[str, Any]:
    return {"outbounds": [{"tag": "office", "type": kind, "server": f"{host}:1080", **more}]}


LOGIN = {"username": "user", "password": "xyzzy"}
BY_NAME = {"rules": [{"domain_suffix": ["example.org"], "outbound": "block"}]}
TAGGED = f"ip rule add iif lan0 table {table_of('gone0')} protocol 122 priority {facts.RULE_PRIORITY}"
DROPPING = "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"
ADDRESS = "ip address add 198.18.7.1/24 dev wan0"
ROUTES = {"capture": {"backend": "routes"}}

FAULTS = [
    Fault("ipv6", "warning", ("disable_ipv6 is 1", "sysctl"), commands=("sysctl -w net.ipv6.conf.all.disable_ipv6=1",)),
    Fault("instance", "problem", ("lan0 is in use by another ztun", "leave it out"), provoke=living_instance),
    Fault("leftovers", "warning", ("ip rule", "ztun down"), commands=(TAGGED,)),
    Fault("tun-name", "problem", ("ztun0", "choose another"), commands=("ip tuntap add dev ztun0 mode tun",)),
    Fault(
        "fake-ip", "problem", ("198.18.7.1 on wan0", "dns.fake_ip"), commands=("ip address add 198.18.7.1/24 dev wan0",)
    ),
    Fault("fake-ip", "problem", ("198.19.0.0/16",), commands=("ip route add 198.19.0.0/16 dev wan0",)),
    Fault("fake-ip", "problem", ("2001:2::/32",), commands=("ip route add 2001:2::/32 dev wan0",)),
    Fault(
        "qdisc",
        "problem",
        ("lan0", "tc qdisc del dev lan0 ingress"),
        {"capture": {"backend": "clsact"}},
        ("tc qdisc add dev lan0 ingress",),
    ),
    Fault("programs", "warning", ("reply at tcx/ingress of lan0",), provoke=foreign_tcx),
    Fault("foreign-xdp", "warning", ("somebody on lan0", "capture.xdp"), provoke=foreign_xdp),
    Fault("ip-rules", "warning", ("100 (ipv4) to table 77",), ROUTES, ("ip rule add priority 100 table 77",)),
    Fault("lan", "warning", ("lan7 absent", "wan0"), {"capture": {"lan": ["lan7"]}}),
    Fault(
        "lan",
        "problem",
        ("lan0 is a port of br0", "capture br0"),
        commands=("ip link add br0 type bridge", "ip link set lan0 master br0"),
    ),
    Fault("lan", "warning", ("lan0 down", "ip link set"), commands=("ip link set lan0 down",)),
    Fault("lan", "warning", ("without carrier",), commands=("ip link set lan0peer down",)),
    Fault("lan", "warning", ("nothing is captured", "--lan"), {"capture": {"lan": []}}),
    Fault("forwarding", "warning", ("ipv4", "net.ipv4.ip_forward=1"), commands=("sysctl -w net.ipv4.ip_forward=0",)),
    Fault("forward-policy", "problem", ("ip filter FORWARD", "ztun0"), ROUTES, (f"nft '{DROPPING}'",)),
    Fault("forward-policy", "warning", ("ip filter FORWARD",), commands=(f"nft '{DROPPING}'",)),
    Fault(
        "rp-filter",
        "problem",
        ("strict on lan1", "rp_filter=2"),
        {"capture": {"lan": ["lan1"]}},
        (
            "ip link add lan1 type veth peer name lan1peer",
            "ip link set lan1 up",
            "sysctl -w net.ipv4.conf.lan1.rp_filter=1",
            "sysctl -w net.ipv6.conf.lan1.disable_ipv6=1",
        ),
    ),
    Fault("mtu", "warning", ("lan0", "tun.mtu to 1400"), commands=("ip link set lan0 mtu 1400",)),
    Fault("path-mtu", "problem", ("no route to office",), proxy(host="192.0.2.1")),
    Fault("path-mtu", "warning", ("office 1000",), proxy(host=FAR4), ("ip link set wan0 mtu 1000",)),
    Fault("port-53", "problem", ("taken by", "dns.listen"), {"dns": {"listen": [f"{LAN4}:53"]}}, provoke=port_taken),
    Fault("port-53", "warning", ("taken by",), provoke=port_taken),
    Fault("port-53", "problem", ("no interface has this address",), {"dns": {"listen": ["192.0.2.53:53"]}}),
    Fault("clients-dns", "problem", ("dns.hijack",), {"dns": {"listen": [], "hijack": False}, "route": BY_NAME}),
    Fault("clients-dns", "warning", (LAN4, "DHCP"), {"dns": {"hijack": False}, "route": BY_NAME}),
    Fault("dns-servers", "problem", (FAR4, "dns.servers")),
    Fault("proxies", "problem", ("connection refused", "outbounds[].server"), proxy()),
    Fault("proxies", "problem", ("is silent for 0.3 s",), proxy(), provoke=answering()),
    Fault("proxies", "problem", ("no SOCKS5 server",), proxy(), provoke=answering(b"HTTP/1.0 400 Bad Request\r\n\r\n")),
    Fault("proxies", "problem", ("wants a username and password",), proxy(), provoke=answering(b"\5\xff")),
    Fault("proxies", "problem", ("refuses username and",), proxy(**LOGIN), provoke=answering(b"\5\2", b"\1\1")),
    Fault("proxies", "problem", ("no HTTP proxy",), proxy("http"), provoke=answering(b"220 mail.example\r\n")),
    Fault("proxies", "problem", ("refuses",), proxy("http", **LOGIN), provoke=answering(b"HTTP/1.1 407 No\r\n\r\n")),
    Fault("proxies", "problem", ("without CONNECT",), proxy("http"), provoke=answering(b"HTTP/1.1 405 No\r\n\r\n")),
]
