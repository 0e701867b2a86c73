"""This host's own packets, in BPF: the programs `leave` and `arrive` on its ways out, `guard` on the TUN.

docs/host-traffic.md tells what is captured and what is not.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ztun.errors import ZtunError
from ztun.platform.linux import links, tables
from ztun.platform.linux.hooks import Hook, detach
from ztun.platform.linux.layout import CLIENT, FLOW, I32, PIECE, U32, U64, Shared
from ztun.platform.linux.maps import Map
from ztun.platform.linux.netlink import NetlinkError, explain

PROGRAMS = ("guard", "leave", "leave_l3", "arrive")
# Map name -> (key size, value size in bytes, kind as `bpftool map` names it).
MAPS = {
    "exits": (U32.size, U32.size, "hash"),
    "flows": (FLOW.size, I32.size, "lru_hash"),
    "arrivals": (FLOW.size, U64.size, "lru_hash"),
    "pieces": (PIECE.size, I32.size, "lru_hash"),
    "homes": (16, CLIENT.size, "lru_hash"),
}
_CAPTURED, _ABSENT = "captured", "absent"


class MakeHook(Protocol):
    """Attach a program (its name, descriptor) to an interface. Raises OSError or NetlinkError."""

    def __call__(self, name: str, program: int, ifname: str, /, *, direction: str = "ingress") -> Hook: ...


class _Hooked(NamedTuple):
    """What is attached to one interface, and the IP versions it is an exit for, as bits."""

    ifindex: int
    versions: int
    hooks: Sequence[Hook]


class HostCapture:
    """Attaches where this host sends. is_wanted: capture.host; without it, only the TUN is guarded.

    lan: interfaces that have a program on their ingress already, which does what `arrive` would.
    """

    def __init__(
        self,
        programs: Mapping[str, int],
        maps: Mapping[str, int],
        shared: Shared,
        make_hook: MakeHook,
        device: str,
        lan: Collection[str],
        is_wanted: bool,
    ) -> None:
        self._programs = programs
        self._maps = {name: Map(maps[name], key, value) for name, (key, value, _) in MAPS.items()}
        self._bits = {version: shared.constants[f"EXIT_IPV{version}"] for version in (4, 6)}
        self._make_hook = make_hook
        self._device = device
        self._lan = lan
        self._is_wanted = is_wanted
        self._wanted: dict[str, int] = {}
        self._hooked: dict[str, _Hooked] = {}
        self._states: dict[str, str] = {}

    def replace_exits(self, exits: Mapping[str, Collection[int]]) -> None:
        """Take what this host sends by these interfaces, each with the IP versions that it is the way out for."""
        if not self._is_wanted:
            return
        self._wanted = dict.fromkeys(self._lan, 0)  # whose name servers are asked there, too
        for name, versions in exits.items():
            self._wanted[name] = sum(self._bits[version] for version in versions)
        self.follow()

    def follow(self) -> None:
        """Be where one should be, and nowhere else. Raises ZtunError when the TUN cannot be guarded."""
        self._follow_device()
        for name in [name for name in self._hooked if name != self._device and name not in self._wanted]:
            self._let_go(name)
        self._states = {name: self._follow(name, versions) for name, versions in self._wanted.items()}

    def states(self) -> dict[str, str]:
        """Way out -> "captured", "absent", or why this host's packets cannot be had there."""
        return dict(self._states)

    def _follow_device(self) -> None:
        index, hooked = links.index_of(self._device), self._hooked.get(self._device)
        if hooked is not None and hooked.ifindex != index:
            self._let_go(self._device)
        elif hooked is not None:
            return
        if index is not None:
            self._hooked[self._device] = _Hooked(index, 0, self._attach(self._device, {"guard": "egress"}))

    def _follow(self, name: str, versions: int) -> str:
        index, hooked = links.index_of(name), self._hooked.get(name)
        if hooked is not None and hooked.ifindex != index:
            self._let_go(name)
            hooked = None
        if index is None:
            return _ABSENT
        if hooked is not None and hooked.versions == versions:
            return _CAPTURED
        # The program does nothing where the map says nothing.
        self._maps["exits"].update(U32.pack(index), U32.pack(versions))
        try:
            hooks = hooked.hooks if hooked is not None else self._attach(name, self._choose(name, index))
        except ZtunError as error:
            self._maps["exits"].delete(U32.pack(index))
            return _ABSENT if links.index_of(name) != index else str(error)
        self._hooked[name] = _Hooked(index, versions, hooks)
        return _CAPTURED

    def _choose(self, name: str, index: int) -> dict[str, str]:
        """Program -> direction."""
        chosen = {"leave" if links.has_link_header(index) else "leave_l3": "egress"}
        return chosen if name in self._lan else {**chosen, "arrive": "ingress"}

    def _attach(self, ifname: str, chosen: Mapping[str, str]) -> list[Hook]:
        """Attach all of them, or none. Raises ZtunError."""
        hooks: list[Hook] = []
        try:
            for name, direction in chosen.items():
                hooks.append(self._make_hook(name, self._programs[name], ifname, direction=direction))
        except (NetlinkError, OSError) as error:
            detach(hooks)
            raise ZtunError(f"cannot attach to the egress of {ifname}: {explain(error)}") from error
        return hooks

    def _let_go(self, name: str) -> None:
        hooked = self._hooked.pop(name)
        self._maps["exits"].delete(U32.pack(hooked.ifindex))
        detach(hooked.hooks)
        if links.name_of(hooked.ifindex) is None:  # what is put back there now would get lost
            homes = self._maps["homes"]
            homes.delete_many([key for key, value in homes.items() if CLIENT.unpack(value)[0] == hooked.ifindex])

    def forget(self, addresses: Iterable[bytes]) -> None:
        """These (16 bytes each) are this host's no longer: somebody else may have them now."""
        self._maps["homes"].delete_many(addresses)

    def programs(self) -> list[dict[str, Any]]:
        """As in Classifier.snapshot."""
        return [hook.describe() for hooked in self._hooked.values() for hook in hooked.hooks]

    def maps(self) -> dict[str, list[dict[str, Any]]]:
        """Map name -> its entries, for Classifier.snapshot."""
        names = dict(socket.if_nameindex())
        return {
            "exits": [
                {"ifname": names.get(U32.unpack(key)[0], ""), "versions": self._versions(U32.unpack(value)[0])}
                for key, value in self._maps["exits"].items()
            ],
            "flows": [{**show_flow(key), "rule": I32.unpack(value)[0]} for key, value in self._maps["flows"].items()],
            "arrivals": [show_flow(key) for key, _ in self._maps["arrivals"].items()],
            "pieces": [{"remote": tables.show_address(key[:16])} for key, _ in self._maps["pieces"].items()],
            "homes": list(self._homes(names)),
        }

    def _versions(self, bits: int) -> list[int]:
        return [version for version, bit in self._bits.items() if bits & bit]

    def _homes(self, names: Mapping[int, str]) -> Iterator[dict[str, Any]]:
        for key, value in sorted(self._maps["homes"].items()):
            index, mac = CLIENT.unpack(value)
            address, ifname = tables.show_address(key), names.get(index, "")
            yield {"address": address, "ifname": ifname, "mac": mac.hex(":") if any(mac) else None}

    def close(self) -> None:
        """Detach. Idempotent."""
        self._wanted.clear()
        self._states.clear()
        while self._hooked:
            detach(self._hooked.popitem()[1].hooks)


def show_flow(key: bytes) -> dict[str, Any]:
    local, remote, local_port, remote_port = FLOW.unpack(key)
    return {
        "local": tables.show_address(local),
        "local_port": local_port,
        "remote": tables.show_address(remote),
        "remote_port": remote_port,
    }
