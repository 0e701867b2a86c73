"""Addresses and routes of the TUN device.

All that is set here hangs on ztun's own interface, so it also goes when the process dies.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network, ip_interface, ip_network
from typing import Any

import structlog

from ztun.errors import ZtunError
from ztun.platform.linux import netlink, sysctl
from ztun.platform.linux.table_numbers import dns_table_of, table_of, table_of_rule

log = structlog.get_logger("ztun.routes")

# Marks our routes and ip rules (rtnetlink(7), rtm_protocol). 122 is "z", in nobody's rt_protos.
PROTOCOL = 122
# 500 packets, the kernel's choice, overflow under the bursts of a few fast flows.
QUEUE_LENGTH = 4000
_IFA_F_NODAD = 0x02
_IFF_MULTICAST = 0x1000
_IPV6_MIN_MTU = 1280  # RFC 8200, section 5

Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network


class TunRoutes:
    """A ztun.ports.Routes: brings the TUN up, gives it its addresses, and routes the Fake-IP ranges into it."""

    def __init__(self, device: str, mtu: int, addresses: Iterable[str], ranges: Iterable[str]) -> None:
        self._device = device
        self._mtu = mtu
        self._addresses: list[Interface] = [ip_interface(address) for address in addresses]
        self._ranges: list[Network] = [ip_network(network) for network in ranges]
        self._is_up = False
        self._prepared = 0  # the index of the device that multicast was taken from
        self._sysctls = sysctl.Sysctls()

    def up(self) -> None:
        """Set the link up with addresses and routes. Raises ZtunError naming what the kernel refused."""
        if not self._is_up:
            self._set_up()
            self._is_up = True

    def restore(self) -> None:
        """Put back what somebody took: link up, addresses, routes. Raises ZtunError. Without effect unless up."""
        if self._is_up:
            self._set_up()

    def down(self) -> None:
        """Take addresses (and with them the routes) away and the link down. The sysctls go with the device."""
        if not self._is_up:
            return
        self._is_up = False
        try:
            netlink.run(self._remove)
        except netlink.NetlinkError as error:
            log.warning("device not taken down", device=self._device, error=netlink.explain(error))

    def snapshot(self) -> dict[str, Any]:
        """{"routes": [{"destination", "device", "protocol"}], "ip_rules": [{"priority", "table", …}], "sysctls": …}.

        The ip rules are those of the routes backend; with BPF there are none. The sysctls are those of the device.
        """
        if not self._is_up:
            return {"routes": [], "ip_rules": [], "sysctls": []}
        tables = table_of(self._device), dns_table_of(self._device)
        routes, rules = netlink.run(lambda ip: (self._list(ip), list_rules(ip, tables)))
        return {"routes": routes, "ip_rules": rules, "sysctls": self._sysctls.describe()}

    def _set_up(self) -> None:
        try:
            index = socket.if_nametoindex(self._device)
            if index != self._prepared:  # it holds as long as the device is the same
                netlink.run(self._renounce_multicast)
                self._prepared = index
            self._set_sysctls()
            netlink.run(self._install)
        except (netlink.NetlinkError, OSError) as error:
            what = netlink.explain(error) if isinstance(error, netlink.NetlinkError) else error.strerror or error
            raise ZtunError(f"cannot set up {self._device}: {what}") from error

    def _set_sysctls(self) -> None:
        settings = self._sysctls
        # A packet from the TUN has the address of a server that is reached elsewhere. The higher of `all` and the
        # interface holds, and loose is 2, strict 1 (Documentation/networking/ip-sysctl.rst).
        loosest = "0" if sysctl.read("ipv4/conf/all/rp_filter") == "0" else "2"
        settings.set(f"ipv4/conf/{self._device}/rp_filter", loosest)
        settings.set(f"ipv6/conf/{self._device}/disable_ipv6", "0")
        settings.set(f"ipv6/conf/{self._device}/accept_ra", "0")
        # No link-local address of the kernel's own: it would send router solicitations and MLD reports into ztun.
        settings.set(f"ipv6/conf/{self._device}/addr_gen_mode", "1")

    def _usable_addresses(self) -> list[Interface]:
        if sysctl.read(f"ipv6/conf/{self._device}/disable_ipv6") == "0":
            return self._addresses
        left_out = [str(address) for address in self._addresses if address.version == 6]
        if left_out:
            log.warning("this kernel has no IPv6: going on without", addresses=left_out)
        return [address for address in self._addresses if address.version == 4]

    def _renounce_multicast(self, ip: Any) -> None:
        """A host that forwards joins ff02::2 on each link that can multicast, and the reports of it (RFC 3810) would
        come to us as packets. Below 1280 octets Linux forgets IPv6 on a link, and begins anew above.
        """
        index = socket.if_nametoindex(self._device)
        ip.link("set", index=index, flags=0, change=_IFF_MULTICAST, mtu=_IPV6_MIN_MTU - 1)
        ip.link("set", index=index, mtu=self._mtu)

    def _install(self, ip: Any) -> None:
        index = socket.if_nametoindex(self._device)
        ip.link("set", index=index, txqlen=QUEUE_LENGTH, state="up")
        addresses = self._usable_addresses()
        for address in addresses:
            flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
            where = {"index": index, "address": str(address.ip), "prefixlen": address.network.prefixlen}
            netlink.ignoring([errno.EEXIST], ip.addr, "add", **where, **flags)
        versions = {address.version for address in addresses}
        for network in self._uncovered_ranges():
            if network.version in versions:
                ip.route("replace", dst=str(network), oif=index, proto=PROTOCOL, **_family(network))

    def _uncovered_ranges(self) -> list[Network]:
        """The ranges that the connected routes of the addresses do not bring to the TUN already."""
        connected = [address.network for address in self._addresses]
        return [
            network
            for network in self._ranges
            if not any(network.version == own.version and network.subnet_of(own) for own in connected)  # type: ignore[arg-type]
        ]

    def _remove(self, ip: Any) -> None:
        try:
            index = socket.if_nametoindex(self._device)
        except OSError:
            return
        ip.flush_addr(index=index)
        ip.link("set", index=index, state="down")

    def _list(self, ip: Any) -> list[dict[str, Any]]:
        index = socket.if_nametoindex(self._device)
        found = []
        for route in ip.get_routes(oif=index, table=254):
            destination = netlink.attribute(route, "RTA_DST")
            if destination is None or netlink.attribute(route, "RTA_OIF") != index:
                continue
            protocol = "ztun" if route["proto"] == PROTOCOL else "kernel"
            where = f"{destination}/{route['dst_len']}"
            found.append({"destination": where, "device": self._device, "protocol": protocol})
        return found


def list_rules(ip: Any, tables: Collection[int] | None = None) -> list[dict[str, Any]]:
    """The ip rules with our tag that are for these tables (None: for any), as `snapshot` gives them."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for rule in ip.get_rules(family=family):
            is_ours = netlink.attribute(rule, "FRA_PROTOCOL") == PROTOCOL
            if is_ours and (tables is None or table_of_rule(rule) in tables):
                found.append(_describe_rule(rule))
    return found


def _describe_rule(rule: Any) -> dict[str, Any]:
    ports = netlink.attribute(rule, "FRA_DPORT_RANGE")
    described = {
        "family": "ipv4" if rule["family"] == socket.AF_INET else "ipv6",
        "priority": netlink.attribute(rule, "FRA_PRIORITY"),
        "iif": netlink.attribute(rule, "FRA_IIFNAME"),
        "table": netlink.attribute(rule, "FRA_TABLE"),
    }
    if netlink.attribute(rule, "FRA_SRC"):
        described["from"] = f"{netlink.attribute(rule, 'FRA_SRC')}/{rule['src_len']}"
    if netlink.attribute(rule, "FRA_IP_PROTO") and not ports:
        described["ip_protocol"] = netlink.attribute(rule, "FRA_IP_PROTO")
    if ports:
        described["ip_protocol"] = netlink.attribute(rule, "FRA_IP_PROTO")
        described["port"] = int(ports.partition(":")[0])
    return described


def _family(network: Network) -> dict[str, int]:
    return {"family": socket.AF_INET if network.version == 4 else socket.AF_INET6}
