"""Attaching a program to the ingress or egress of an interface: TCX links, or clsact filters where there are none."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import structlog

from ztun.platform.linux import bpfcall, journal, links, netlink

log = structlog.get_logger("ztun.classifier")

# How our filters are known: together, and with the name, these are a tag that nobody else's filter has.
FILTER_PRIORITY = 0x7A74
FILTER_HANDLE = 0x7A74756E
# TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS) and the same with _EGRESS, linux/pkt_sched.h.
PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
_TCX = {"ingress": bpfcall.TCX_INGRESS, "egress": bpfcall.TCX_EGRESS}
_GONE = (errno.ENOENT, errno.EINVAL, errno.ENODEV)


class Hook(Protocol):
    """A program attached to an interface."""

    def describe(self) -> dict[str, Any]:
        """{"name", "hook", "ifname", "id", "tag"} as `ztun routes --json` prints it."""
        ...

    def close(self) -> None:
        """Detach. Idempotent."""
        ...


class TcxHook:
    """A TCX link (Linux 6.6): gone when its descriptor is closed, however the process ends."""

    def __init__(self, name: str, program: int, ifname: str, direction: str = "ingress") -> None:
        self._about = _about(name, f"tcx/{direction}", ifname, program)
        self._link = bpfcall.create_tcx_link(program, socket.if_nametoindex(ifname), _TCX[direction])

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        if self._link >= 0:
            os.close(self._link)
            self._link = -1


class ClsactHook:
    """A bpf filter in direct-action mode on the clsact qdisc (tc-bpf(8)). It outlives a killed process.

    `device` is the TUN's name: it stands in the filter's name, together with whether we made the qdisc, so that a
    later instance knows what it may remove. A filter that a dead instance left takes the new program as it is: there is
    no moment without (`fail: closed` stays closed).
    """

    def __init__(
        self,
        name: str,
        program: int,
        ifname: str,
        device: str,
        direction: str = "ingress",
    ) -> None:
        self._about = _about(name, f"clsact/{direction}", ifname, program)
        self._index = socket.if_nametoindex(ifname)
        self._device = device
        self._parent = PARENTS[direction]
        self._journal = journal.of(device)
        self._is_attached = True
        netlink.run(lambda ip: self._attach(ip, program, f"ztun:{device}:{name}"))

    def _attach(self, ip: Any, program: int, tag: str) -> None:
        before = [found for found in find_filters(ip, self._index) if self._may_replace(found.device)]
        inherited = self._index in self._journal.record.qdiscs or any(each.name.endswith(":qdisc") for each in before)
        made = self._make_qdisc(ip, inherited)
        is_ours = made or inherited
        is_there = any(found.parent == self._parent for found in before)
        try:
            ip.tc(
                "replace-filter" if is_there else "add-filter",
                kind="bpf",
                index=self._index,
                handle=FILTER_HANDLE,
                parent=self._parent,
                prio=FILTER_PRIORITY,
                fd=program,
                name=f"{tag}:qdisc" if is_ours else tag,
                direct_action=True,
            )
        except netlink.NetlinkError:
            if made:
                ip.tc("del", kind="clsact", index=self._index)
                self._journal.discard_qdisc(self._index)
            raise
        self._journal.attached.add((self._index, self._parent))

    def _may_replace(self, device: str) -> bool:
        """Whether a filter is that of our TUN, whose name nobody else has, or of one that is gone with its process."""
        return device == self._device or links.index_of(device) is None

    def _make_qdisc(self, ip: Any, inherited: bool) -> bool:
        """Written down first: killed between the two, nobody else would know whose it is."""
        if not inherited and has_clsact(ip, self._index):
            return False
        self._journal.add_qdisc(self._index, str(self._about["ifname"]))
        made = netlink.ignoring([errno.EEXIST], ip.tc, "add", kind="clsact", index=self._index)
        if not (made or inherited):
            self._journal.discard_qdisc(self._index)
        return made

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        if not self._is_attached:
            return
        self._is_attached = False
        self._journal.attached.discard((self._index, self._parent))
        if links.name_of(self._index) is not None:  # else the filter went with its interface
            netlink.run(lambda ip: remove_filters(ip, self._index, self._device, [self._parent]))
        if not any(index == self._index for index, _ in self._journal.attached):
            self._journal.discard_qdisc(self._index)


def detach(hooks: Iterable[Hook]) -> None:
    """Close each of them. What resists is said in the log."""
    for hook in hooks:
        try:
            hook.close()
        except (netlink.NetlinkError, OSError) as error:
            log.warning("program not detached", error=str(error), **hook.describe())


def _about(name: str, hook: str, ifname: str, program: int) -> dict[str, Any]:
    info = bpfcall.program_info(program)
    return {"name": name, "hook": hook, "ifname": ifname, "id": info.id, "tag": info.tag}


class Filter(NamedTuple):
    """One of ztun's filters. device: the TUN of its instance."""

    parent: int
    name: str

    @property
    def device(self) -> str:
        return self.name.split(":")[1]


def find_filters(ip: Any, index: int) -> list[Filter]:
    """ztun's filters on one interface, whosever they are."""
    found = []
    for parent in PARENTS.values():
        for message in _filters(ip, index, parent):
            options = netlink.attribute(message, "TCA_OPTIONS")
            name = netlink.attribute(options, "TCA_BPF_NAME") if message["handle"] == FILTER_HANDLE and options else ""
            if name and name.startswith("ztun:"):
                found.append(Filter(parent, name))
    return found


def remove_filters(ip: Any, index: int, device: str, parents: Iterable[int] = tuple(PARENTS.values())) -> list[str]:
    """Remove a TUN's filters from an interface, and the qdisc if it was ours and nothing else uses it.

    Returns the names of what was removed.
    """
    which = [found for found in find_filters(ip, index) if found.device == device and found.parent in parents]
    for found in which:
        same = {"handle": FILTER_HANDLE, "parent": found.parent, "prio": FILTER_PRIORITY}
        netlink.ignoring(_GONE, ip.tc, "del-filter", kind="bpf", index=index, **same)
    if any(found.name.endswith(":qdisc") for found in which):
        remove_unused_qdisc(ip, index)
    return [found.name for found in which]


def remove_unused_qdisc(ip: Any, index: int) -> bool:
    """Remove the clsact qdisc of an interface if it has no filters. Whether there was one to be removed."""
    return is_unused_qdisc(ip, index) and netlink.ignoring(_GONE, ip.tc, "del", kind="clsact", index=index)


def is_unused_qdisc(ip: Any, index: int) -> bool:
    """Whether an interface has a clsact qdisc without a filter."""
    return has_clsact(ip, index) and not any(
        netlink.attribute(one, "TCA_KIND") for parent in PARENTS.values() for one in _filters(ip, index, parent)
    )


def with_clsact(ip: Any) -> list[tuple[int, str]]:
    """Index and name of the interfaces that have a clsact qdisc, ours or another's."""
    indices = [one["index"] for one in ip.get_qdiscs() if netlink.attribute(one, "TCA_KIND") == "clsact"]
    return [(index, name) for index in indices if (name := links.name_of(index)) is not None]


def has_clsact(ip: Any, index: int) -> bool:
    """Whether an interface has a clsact qdisc."""
    try:
        return any(netlink.attribute(one, "TCA_KIND") == "clsact" for one in ip.get_qdiscs(index=index))
    except netlink.NetlinkError:
        return False


def _filters(ip: Any, index: int, parent: int) -> list[Any]:
    try:
        return list(ip.get_filters(index=index, parent=parent))
    except netlink.NetlinkError as error:
        if error.code in _GONE:
            return []
        raise
