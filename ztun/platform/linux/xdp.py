"""Dropping what is blocked before there is an skb: one XDP program on each captured interface, while it has work to do.

XDP costs something for every frame, so it is there only while a prefix is blocked. It never decides alone: it drops
what tc would drop by a rule, and all else goes on to tc (bpf/classify.c). So nothing is wrong where it cannot be had.
"""

from __future__ import annotations

import errno
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import structlog

from ztun.platform.linux import bpfcall, netlink, tables
from ztun.platform.linux.layout import DECISION, PORT, U32
from ztun.platform.linux.maps import Map
from ztun.ports import Prefix, Verdict

log = structlog.get_logger("ztun.classifier")

PROGRAM = "xdp"
# Map name -> (key size, value size in bytes, kind), as in classifier.MAPS.
MAPS = {
    "blocked4": (U32.size + 4, DECISION.size, "lpm_trie"),
    "blocked6": (U32.size + 16, DECISION.size, "lpm_trie"),
    "ports": (U32.size, PORT.size, "hash"),
}
_LABEL = re.compile(r"ztun_[0-9a-f]{8}")
_ARPHRD_ETHER = 1  # linux/if_arp.h
# XDP_FLAGS_* of linux/if_link.h.
_IF_NOEXIST, _GENERIC, _NATIVE = 1 << 0, 1 << 1, 1 << 2
FORMS = {"native": _NATIVE, "generic": _GENERIC}
_SOFT_BUSES = frozenset({"virtio", "xen", "vmbus"})
_FOREIGN = frozenset({errno.EBUSY, errno.EEXIST})


class Hook(Protocol):
    """The program on an interface."""

    def close(self) -> None:
        """Detach. Idempotent."""
        ...


class LinkHook:
    """A BPF link (Linux 5.9): gone when its descriptor is closed, however the process ends."""

    def __init__(self, program: int, index: int, flags: int) -> None:
        self._fd = bpfcall.bpf(bpfcall.LINK_CREATE, bpfcall.attributes("=IIII", program, index, bpfcall.XDP, flags))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class NetlinkHook:
    """IFLA_XDP (rtnetlink(7)), for older kernels. It outlives a killed process, and passes everything then."""

    def __init__(self, program: int, index: int, flags: int) -> None:
        self._id, self._index, self._flags = bpfcall.program_id(program), index, flags
        self._is_attached = True
        try:
            netlink.run(lambda ip: _set_program(ip, index, program, flags | _IF_NOEXIST))
        except netlink.NetlinkError as error:
            raise OSError(error.code, os.strerror(error.code)) from error

    def close(self) -> None:
        if self._is_attached:
            self._is_attached = False
            netlink.run(self._remove)

    def _remove(self, ip: Any) -> None:
        links = _links(ip)
        # Somebody may have put another one in its place.
        if self._index in links and attached(links[self._index]) == self._id:
            netlink.ignoring([errno.ENODEV], _set_program, ip, self._index, -1, self._flags)


class _Place(NamedTuple):
    """One interface. hook: None where there is no program; form: how it runs, or why there is none."""

    ifindex: int
    hook: Hook | None
    form: str
    again: bool = True  # whether to try when something changed


class XdpFilter:
    """Keeps the program on the interfaces where it can be, as long as something is blocked.

    program: its descriptor, None where it is not wanted or the kernel does not take it; form: "native" or "generic"
    and not the other, True for what costs least.
    """

    def __init__(self, program: int | None, maps: Mapping[str, int], form: bool | str = True) -> None:
        self._program = program
        self._forms = FORMS if form is True else {str(form): FORMS[str(form)]} if form else {}
        self._id = bpfcall.program_id(program) if program is not None else 0
        self._tag = bpfcall.program_info(program).tag if program is not None else ""
        self._places: dict[str, _Place] = {}
        self._macs: dict[int, bytes] = {}
        if program is not None:
            opened = {name: Map(maps[name], key, value) for name, (key, value, _) in MAPS.items()}
            self._blocked4, self._blocked6 = (tables.PrefixTable(opened[name]) for name in ("blocked4", "blocked6"))
            self._ports = opened["ports"]
        self._is_needed = False

    def replacing_rules(self, prefixes: Mapping[int, Iterable[Prefix]]) -> Iterator[None]:
        """Tell which prefixes are blocked; others are left out here. By the size of an address, 4 and 16 bytes."""
        if self._program is None:
            return
        blocked = {size: [one for one in some if one.verdict == Verdict.DROP] for size, some in prefixes.items()}
        yield from self._blocked4.replacing(blocked[4])
        yield from self._blocked6.replacing(blocked[16])
        self._is_needed = any(blocked.values())

    def follow(self, captured: Mapping[str, int]) -> None:
        """Have the program on these interfaces (name -> index), if it is needed, and on no others."""
        if self._program is None or not (self._is_needed or self._places):
            return
        wanted = captured if self._is_needed else {}
        found = netlink.run(_links)
        for ifname in [name for name, place in self._places.items() if wanted.get(name) != place.ifindex]:
            self._close_hook(ifname, self._places.pop(ifname).hook)
        self._write_macs([found[index] for index in wanted.values() if index in found])
        for ifname, index in wanted.items():
            if index in found:
                self._follow_one(ifname, index, self._program, found)

    def _follow_one(self, ifname: str, index: int, program: int, found: Mapping[int, Any]) -> None:
        before = self._places.get(ifname)
        if attached(found[index]) not in (None, 0, self._id) and self._is_left_over(found[index]):
            netlink.run(lambda ip: remove(ip, index))
            found = netlink.run(_links)
        obstacle = _obstacle(found[index], found.values(), self._id) if index in found else "it is gone"
        if obstacle is not None:
            if before is not None:
                self._close_hook(ifname, before.hook)
            now = _Place(index, None, obstacle)
        elif before is not None and (before.hook is not None or not before.again):
            return
        else:
            now = _attach(program, index, _in_order(found[index], self._forms))
        self._places[ifname] = now
        if before is None or before.form != now.form:
            _tell(ifname, now)

    def _is_left_over(self, link: Any) -> bool:
        """Of a dead gateway with our TUN, from a kernel without XDP links: two do not live under one name."""
        assert self._program is not None
        return _name_of(attached(link)) == bpfcall.program_info(self._program).name

    def _write_macs(self, wanted: Iterable[Any]) -> None:
        macs = {link["index"]: _mac(link) for link in wanted if link["ifi_type"] == _ARPHRD_ETHER}
        changed = {index: mac for index, mac in macs.items() if self._macs.get(index) != mac}
        self._ports.update_many({U32.pack(index): PORT.pack(mac) for index, mac in changed.items()})
        self._ports.delete_many([U32.pack(index) for index in self._macs.keys() - macs.keys()])
        self._macs = macs

    def programs(self) -> list[dict[str, Any]]:
        """[{"name", "hook", "ifname", "id", "tag"}] of those that are attached."""
        return [
            {"name": PROGRAM, "hook": f"xdp/{place.form}", "ifname": ifname, "id": self._id, "tag": self._tag}
            for ifname, place in self._places.items()
            if place.hook is not None
        ]

    def describe(self) -> list[dict[str, Any]]:
        """[{"ifname", "form", "reason"}]: form is "native", "generic" or None, and reason then says why."""
        return [
            {
                "ifname": ifname,
                "form": place.form if place.hook is not None else None,
                "reason": place.form if place.hook is None else None,
            }
            for ifname, place in self._places.items()
        ]

    def close(self) -> None:
        """Detach everywhere. Idempotent."""
        while self._places:
            ifname, place = self._places.popitem()
            self._close_hook(ifname, place.hook)

    @staticmethod
    def _close_hook(ifname: str, hook: Hook | None) -> None:
        try:
            if hook is not None:
                hook.close()
        except (netlink.NetlinkError, OSError) as error:
            log.warning("XDP program not detached", interface=ifname, error=str(error))


def label(device: str) -> str:
    """The name under which the kernel shows the program of the gateway with this TUN: the tag it is known by."""
    return f"ztun_{zlib.crc32(device.encode()):08x}"


def attached(link: Any) -> int | None:
    """The id of the XDP program on an interface, as its RTM_NEWLINK tells."""
    about = netlink.attribute(link, "IFLA_XDP")
    return netlink.attribute(about, "IFLA_XDP_PROG_ID") if about is not None else None


def find_dead(ip: Any, living: Iterable[str]) -> list[tuple[int, str]]:
    """(index, name) of interfaces with a program of a gateway whose TUN is none of `living`, as older kernels have it.

    Without CAP_SYS_ADMIN nobody can tell whose a program is. It stays then, and passes everything.
    """
    alive = {label(device) for device in living}
    found = []
    for link in ip.get_links():
        name = _name_of(attached(link))
        if name is not None and _LABEL.fullmatch(name) and name not in alive:
            found.append((link["index"], netlink.attribute(link, "IFLA_IFNAME")))
    return found


def remove(ip: Any, index: int) -> None:
    """Take the program from an interface. One that a BPF link holds stays: its process lives."""
    for flags in FORMS.values():
        netlink.ignoring([errno.EBUSY, errno.ENODEV, errno.EOPNOTSUPP], _set_program, ip, index, -1, flags)


def _name_of(number: int | None) -> str | None:
    """The name of a program, None when there is none, or we may not know."""
    try:
        fd = bpfcall.open_program(number or 0)
    except OSError:
        return None
    try:
        return bpfcall.program_info(fd).name
    finally:
        os.close(fd)


def _obstacle(link: Any, links: Iterable[Any], own: int) -> str | None:
    """Why there must be no program of ours on an interface, None when there may."""
    if link["ifi_type"] != _ARPHRD_ETHER:
        return "it has no Ethernet frames"
    # A driver takes VLAN tags off before XDP, which then cannot tell frames of a VLAN from the interface's own.
    if netlink.attribute(link, "IFLA_MASTER"):
        return "it is part of another interface"
    if any(_is_vlan_on(other, link["index"]) for other in links):
        return "it carries VLANs"
    if attached(link) not in (None, 0, own):
        return "there is another XDP program"
    return None


def _is_vlan_on(link: Any, index: int) -> bool:
    is_here = netlink.attribute(link, "IFLA_LINK_NETNSID") is None
    return _kind(link) == "vlan" and is_here and netlink.attribute(link, "IFLA_LINK") == index


def _kind(link: Any) -> str | None:
    about = netlink.attribute(link, "IFLA_LINKINFO")
    return netlink.attribute(about, "IFLA_INFO_KIND") if about is not None else None


def _in_order(link: Any, forms: Mapping[str, int]) -> Mapping[str, int]:
    """The form that costs least first (docs/xdp.md has the figures).

    What comes from software, a container or a virtual machine's host, comes in super-segments of up to 64 KiB. With
    native XDP they would be cut before they are sent (veth_xdp_set(), virtnet_xdp_set()), and each piece goes through
    the whole kernel then. Generic XDP copies each into one piece, which costs less.
    """
    is_soft = _kind(link) == "veth" or netlink.attribute(link, "IFLA_PARENT_DEV_BUS_NAME") in _SOFT_BUSES
    return dict(reversed(list(forms.items()))) if is_soft else forms


def _attach(program: int, index: int, forms: Mapping[str, int]) -> _Place:
    """The first form that the kernel and the driver take."""
    refusals = []
    for form, flags in forms.items():
        try:
            return _Place(index, _make_hook(program, index, flags), form)
        except OSError as error:
            if error.errno in _FOREIGN:
                return _Place(index, None, "there is another XDP program")
            refusals.append(f"{form}: {error.strerror}")
    return _Place(index, None, "; ".join(refusals), again=False)


def _make_hook(program: int, index: int, flags: int) -> Hook:
    try:
        return LinkHook(program, index, flags)
    except OSError as error:
        # What a kernel without XDP links says, and a driver that dislikes something as well.
        if error.errno != errno.EINVAL:
            raise
    return NetlinkHook(program, index, flags)


def _tell(ifname: str, place: _Place) -> None:
    if place.hook is not None:
        log.info("dropping blocked prefixes before there is an skb", interface=ifname, form=place.form)
    else:
        log.warning("no XDP on an interface, tc drops alone", interface=ifname, reason=place.form)


def _links(ip: Any) -> dict[int, Any]:
    return {link["index"]: link for link in ip.get_links()}


def _mac(link: Any) -> bytes:
    return bytes.fromhex((netlink.attribute(link, "IFLA_ADDRESS") or "").replace(":", ""))


def _set_program(ip: Any, index: int, program: int, flags: int) -> None:
    attributes = [("IFLA_XDP_FD", program), ("IFLA_XDP_FLAGS", flags)]
    ip.link("set", index=index, xdp={"attrs": attributes})
