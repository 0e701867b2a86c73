"""Addresses of the utun and routes into it, by ifconfig(8) and route(8).

All that is set here hangs on ztun's own interface, so it also goes when the process dies.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from ipaddress import IPv4Interface, IPv6Interface, ip_interface, ip_network
from typing import Any

import structlog

from ztun.errors import ZtunError
from ztun.platform.darwin import netstate
from ztun.platform.darwin.calls import Calls, one_line, require
from ztun.platform.darwin.table import Key

log = structlog.get_logger("ztun.routes")

_EXISTS = "File exists"  # what route(8) says of EEXIST
_REFUSED = ("route: ", "writing to routing socket")
_ABSENT = ("not in table", "No such process")


class PrefixRoutes:
    """Routes into the interface `device`, of which only differences are written."""

    def __init__(self, device: str, calls: Calls) -> None:
        self._device = device
        self._calls = calls
        self._installed: list[Key] = []

    @property
    def installed(self) -> list[Key]:
        """The networks, in the order in which they were added."""
        return list(self._installed)

    def replace(self, wanted: Iterable[Key]) -> None:
        """Have routes to these networks and to no others. Raises ZtunError; what was added by then is taken back."""
        keys = list(dict.fromkeys(wanted))
        added: list[Key] = []
        try:
            for key in keys:
                if key not in self._installed:
                    self._add(key)
                    added.append(key)
        except ZtunError:
            for key in reversed(added):
                self._delete(key)
            raise
        for key in [key for key in self._installed if key not in keys]:
            self._delete(key)
        self._installed = keys

    def forget(self) -> None:
        """They went with the interface."""
        self._installed = []

    def _add(self, key: Key) -> None:
        argv = self._argv("add", key)
        try:
            done = self._calls.run(argv)
        except OSError as error:
            raise ZtunError(f"cannot run {argv[0]}: {(error.strerror or str(error)).lower()}") from error
        # route(8) gives 0 in spite of some errors, so what it says counts as well.
        if _EXISTS in done.output:
            self._require_ours(key)
        elif done.code or any(words in done.output for words in _REFUSED):
            raise ZtunError(f"cannot route {show(key)} into {self._device}: {one_line(done)}")

    def _require_ours(self, key: Key) -> None:
        """Raises ZtunError when a route that is there already leads elsewhere."""
        index = netstate.find_route(self._calls, *key)
        if index is not None and index != _index_of(self._device):
            other = _name_of(index)
            raise ZtunError(
                f"a route to {show(key)} exists already, through {other}: "
                f"end what made it (another VPN, another ztun?), or remove it with `route delete {show(key)}`"
            )

    def _delete(self, key: Key) -> None:
        try:
            done = self._calls.run(self._argv("delete", key))
        except OSError as error:
            log.warning("route not removed", network=show(key), error=str(error))
            return
        if done.code and not any(words in done.output for words in _ABSENT):
            log.warning("route not removed", network=show(key), error=one_line(done))

    def _argv(self, verb: str, key: Key) -> list[str]:
        family = "-inet" if len(key[0]) == 4 else "-inet6"
        return ["route", "-n", verb, family, "-net", show(key), "-interface", self._device]


class UtunRoutes:
    """A ztun.ports.Routes: gives the utun its addresses and MTU, and routes the Fake-IP ranges into it."""

    def __init__(self, device: str, mtu: int, addresses: Iterable[str], ranges: Iterable[str], calls: Calls) -> None:
        self._device = device
        self._mtu = mtu
        self._addresses: list[IPv4Interface | IPv6Interface] = [ip_interface(address) for address in addresses]
        self._ranges = [_key(network) for network in ranges]
        self._calls = calls
        self._routes = PrefixRoutes(device, calls)
        self._is_up = False

    def up(self) -> None:
        """Set the link up with addresses and routes. Raises ZtunError naming what was refused; nothing is left then."""
        if self._is_up:
            return
        try:
            self._install()
        except ZtunError:
            self._remove()
            raise
        self._is_up = True

    def restore(self) -> None:
        """Put back what somebody took. Raises ZtunError. Without effect unless up."""
        if self._is_up:
            self._routes.forget()
            self._install()

    def down(self) -> None:
        """Take routes and addresses away and the link down."""
        if self._is_up:
            self._is_up = False
            self._remove()

    def snapshot(self) -> dict[str, Any]:
        """{"routes": [{"destination", "device", "protocol"}], "ip_rules": []}."""
        if not self._is_up:
            return {"routes": [], "ip_rules": []}
        ours = _index_of(self._device)
        ways = netstate.list_routes(self._calls)
        return {
            "routes": [
                {"destination": show((way.network, way.length)), "device": self._device, "protocol": "ztun"}
                for way in ways
                if way.ifindex == ours
            ],
            "ip_rules": [],
        }

    def _install(self) -> None:
        require(self._calls, "ifconfig", self._device, "mtu", str(self._mtu), "up")
        for address in self._addresses:
            require(self._calls, "ifconfig", self._device, *_address_arguments(address), "alias")
        self._routes.replace(self._ranges)

    def _remove(self) -> None:
        self._routes.replace([])
        for address in self._addresses:
            family = "inet" if address.version == 4 else "inet6"
            self._try("ifconfig", self._device, family, str(address.ip), "-alias")
        self._try("ifconfig", self._device, "down")

    def _try(self, *argv: str) -> None:
        try:
            require(self._calls, *argv)
        except ZtunError as error:
            log.debug("not undone", device=self._device, error=str(error))


def _address_arguments(address: IPv4Interface | IPv6Interface) -> list[str]:
    """The ends of a point-to-point link: for IPv4 both are ours, as there is nobody at the other one."""
    if address.version == 4:
        return ["inet", str(address), str(address.ip)]
    return ["inet6", str(address)]


def show(key: Key) -> str:
    """A network as people write it."""
    network, length = key
    return f"{socket.inet_ntop(socket.AF_INET if len(network) == 4 else socket.AF_INET6, network)}/{length}"


def _key(network: str) -> Key:
    parsed = ip_network(network)
    return parsed.network_address.packed, parsed.prefixlen


def _index_of(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"
