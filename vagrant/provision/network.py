"""Give a virtual machine its place in the laboratory, as root in it: `python3 network.py client|gateway|upstream`.

The addresses are those of `ztun.lab.plan`. They are written for systemd-networkd, so that a reboot finds them again.
Run by the Python of provision/python.sh, with the source tree on PYTHONPATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ztun.lab import internet, plan

_MACHINES = Path(__file__).resolve().parents[1] / "machines.json"
_NETWORKD = Path("/etc/systemd/network")
_ROUTING = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}


class Role(NamedTuple):
    """links: interface -> addresses with their lengths. routes: interface -> (destination, gateway, source)."""

    links: Mapping[str, tuple[str, ...]]
    routes: Mapping[str, tuple[tuple[str, str, str], ...]]
    resolver: str
    sysctls: Mapping[str, str]


ROLES = {
    "client": Role(
        {"lan0": tuple(f"{each}/24" for each in (plan.CLIENT4, plan.CLIENT4_OTHER))
         + tuple(f"{each}/64" for each in (plan.CLIENT6, plan.CLIENT6_OTHER))},
        {"lan0": (("0.0.0.0/0", plan.GATEWAY_LAN4, plan.CLIENT4), ("::/0", plan.GATEWAY_LAN6, plan.CLIENT6))},
        plan.GATEWAY_LAN4,
        {},
    ),
    "gateway": Role(
        {"lan0": (f"{plan.GATEWAY_LAN4}/24", f"{plan.GATEWAY_LAN6}/64"),
         "wan0": (f"{plan.GATEWAY_WAN4}/24", f"{plan.GATEWAY_WAN6}/64")},
        {"wan0": (("0.0.0.0/0", plan.UPSTREAM4, ""), ("::/0", plan.UPSTREAM6, ""))},
        plan.UPSTREAM4,
        _ROUTING,
    ),
    "upstream": Role(
        {"wan0": (f"{plan.UPSTREAM4}/24", f"{plan.UPSTREAM6}/64")},
        {"wan0": (("10.10.0.0/16", plan.GATEWAY_WAN4, ""), ("fd10:10::/32", plan.GATEWAY_WAN6, ""))},
        plan.UPSTREAM4,
        {**_ROUTING, **internet.SYSCTLS},
    ),
}  # fmt: skip


def main(name: str) -> None:
    role, links = ROLES[name], json.loads(_MACHINES.read_text())[name]["links"]
    for link in links:
        _write(f"20-{link['name']}.link", link_file(link["mac"], link["name"]))
        _write(f"20-{link['name']}.network", network_file(role, link["name"]))
        _rename(link["mac"], link["name"])
    settings = "".join(f"net.{key.replace('/', '.')}={value}\n" for key, value in role.sysctls.items())
    Path("/etc/sysctl.d/90-ztun-lab.conf").write_text(settings)
    Path("/etc/hostname").write_text(f"{name}\n")
    Path("/etc/resolv.conf").unlink(missing_ok=True)  # may be a link to what another program writes
    Path("/etc/resolv.conf").write_text(f"nameserver {role.resolver}\noptions timeout:2 attempts:2\n")
    for command in ("hostname -F /etc/hostname", "sysctl -q --system", "systemctl enable -q --now systemd-networkd"):
        subprocess.run(command.split(), check=True)
    subprocess.run(["networkctl", "reload"], check=True)


def link_file(mac: str, name: str) -> str:
    """systemd.link(5): the name at every later boot."""
    return f"[Match]\nPermanentMACAddress={mac}\n\n[Link]\nName={name}\n"


def network_file(role: Role, name: str) -> str:
    """systemd.network(5)."""
    lines = ["[Match]", f"Name={name}", "", "[Network]", "IPv6AcceptRA=no"]
    lines += [f"Address={address}" for address in role.links[name]]
    return "\n".join([*lines, *_routes(role, name)]) + "\n"


def _routes(role: Role, name: str) -> Iterator[str]:
    for destination, gateway, source in role.routes.get(name, ()):
        yield from ("", "[Route]", f"Destination={destination}", f"Gateway={gateway}")
        if source:
            yield f"PreferredSource={source}"


def _rename(mac: str, name: str) -> None:
    """udev names an interface when it appears; for the one that is here already it is done by hand."""
    found = json.loads(subprocess.run(["ip", "-j", "link"], check=True, capture_output=True).stdout)
    now = next((link["ifname"] for link in found if link.get("address") == mac), None)
    if now is None:
        raise SystemExit(f"network.py: no interface has the address {mac}")
    if now != name:
        for command in (f"link set {now} down", f"link set {now} name {name}"):
            subprocess.run(["ip", *command.split()], check=True)


def _write(name: str, text: str) -> None:
    _NETWORKD.mkdir(parents=True, exist_ok=True)
    (_NETWORKD / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
