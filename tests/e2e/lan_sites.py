"""More LANs for the laboratory's gateway: a second cable, a VLAN of a trunk, and a bridge with two containers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from e2e.foreign import vlan
from ztun.lab import Lab, Namespace, plan

_HOST = {"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0", "ipv6/conf/all/accept_ra": "0"}


@dataclass
class Site:
    """One host behind a captured interface of the gateway, with an address of each family."""

    interface: str
    namespace: Namespace
    address4: str
    address6: str
    mac: str = field(default="")

    def fetch(self, url: str, *arguments: str) -> dict[str, str]:
        """The page that a server of the lab shows: who it saw, and which name it was asked for."""
        argv = ["curl", "-sS", "--max-time", "10", *arguments, url]
        page: dict[str, str] = json.loads(self.namespace.run(*argv, timeout=40).stdout)
        return page

    def is_refused(self, url: str) -> bool:
        """Whether there is no answer within a second, or a refusal."""
        return self.namespace.run("curl", "-sS", "--max-time", "1", url, check=False).returncode in (7, 28)


@contextlib.contextmanager
def one_cable(lab: Lab) -> Iterator[Site]:
    """The site "cable" alone; it asks the gateway for names."""
    namespace = Namespace(lab.client.name.removesuffix("client") + "cable")
    try:
        namespace.create(resolver="10.10.1.1", sysctls=_HOST)
        lab.gateway.ip(f"link add lan1 type veth peer name eth0 netns {namespace.name}", *_addresses(1, "lan1"))
        yield _settle(namespace, "eth0", Site("lan1", namespace, "10.10.1.2", "fd10:10:0:1::2"))
    finally:
        namespace.delete()
        lab.gateway.run("ip", "link", "del", "lan1", check=False)


@contextlib.contextmanager
def more_lans(lab: Lab) -> Iterator[dict[str, Site]]:
    """The sites by name, all gone at the end: cable (lan1), vlan (trunk0.10), box1 and box2 (both on br0)."""
    stem = lab.client.name.removesuffix("client")
    made = {name: Namespace(stem + name) for name in ("cable", "vlan", "box1", "box2")}
    try:
        for namespace in made.values():
            # Names are asked for elsewhere: the gateway hijacks it.
            namespace.create(resolver=plan.RESOLVER_ELSEWHERE4, sysctls=_HOST)
        _connect(lab.gateway, made)
        with vlan(lab.gateway, "trunk0", 10), vlan(made["vlan"], "eth0", 10):
            yield {site.namespace.name.removeprefix(stem): site for site in _build(lab.gateway, made)}
    finally:
        for namespace in made.values():
            namespace.delete()
        for ifname in ("lan1", "trunk0", "br0"):
            lab.gateway.run("ip", "link", "del", ifname, check=False)


def _connect(gateway: Namespace, made: dict[str, Namespace]) -> None:
    gateway.ip(
        f"link add lan1 type veth peer name eth0 netns {made['cable'].name}",
        f"link add trunk0 type veth peer name eth0 netns {made['vlan'].name}",
        "link add br0 type bridge",
        f"link add port1 type veth peer name eth0 netns {made['box1'].name}",
        f"link add port2 type veth peer name eth0 netns {made['box2'].name}",
        "link set port1 master br0 up",
        "link set port2 master br0 up",
        "link set trunk0 up",
    )
    made["vlan"].ip("link set eth0 up")


def _build(gateway: Namespace, made: dict[str, Namespace]) -> Iterator[Site]:
    for number, ifname in ((1, "lan1"), (10, "trunk0.10"), (20, "br0")):
        gateway.ip(*_addresses(number, ifname))
    yield _settle(made["cable"], "eth0", Site("lan1", made["cable"], "10.10.1.2", "fd10:10:0:1::2"))
    yield _settle(made["vlan"], "eth0.10", Site("trunk0.10", made["vlan"], "10.10.10.2", "fd10:10:0:10::2"))
    yield _settle(made["box1"], "eth0", Site("br0", made["box1"], "10.10.20.2", "fd10:10:0:20::2"))
    yield _settle(made["box2"], "eth0", Site("br0", made["box2"], "10.10.20.3", "fd10:10:0:20::3"))


def _addresses(number: int, ifname: str) -> list[str]:
    return [
        f"address add 10.10.{number}.1/24 dev {ifname}",
        f"address add fd10:10:0:{number}::1/64 dev {ifname} nodad",
        f"link set {ifname} up",
    ]


def _settle(namespace: Namespace, ifname: str, site: Site) -> Site:
    namespace.ip(
        f"address add {site.address4}/24 dev {ifname}",
        f"address add {site.address6}/64 dev {ifname} nodad",
        f"link set {ifname} up",
        f"route add default via {site.address4.rpartition('.')[0]}.1",
        f"route add default via {site.address6.rpartition(':')[0]}:1",
    )
    site.mac = namespace.run("cat", f"/sys/class/net/{ifname}/address").stdout.strip()
    return site
