"""Attaching a program to the ingress of an interface: TCX links, or clsact filters where there are none."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, Protocol

from ztun.platform.linux import bpfcall, links, netlink

# How our filters are known: together, and with the name, these are a tag that nobody else's filter has.
FILTER_PRIORITY = 0x7A74
FILTER_HANDLE = 0x7A74756E
_CLSACT_PARENT = 0xFFFFFFF1
_INGRESS_PARENT = 0xFFFFFFF2  # TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)


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

    def __init__(self, name: str, program: int, ifname: str) -> None:
        self._about = _about(name, "tcx/ingress", ifname, program)
        self._link = bpfcall.create_tcx_link(program, socket.if_nametoindex(ifname))

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        if self._link >= 0:
            os.close(self._link)
            self._link = -1


class ClsactHook:
    """A bpf filter in direct-action mode on the clsact qdisc (tc-bpf(8)). It outlives a killed process.

    `device` is the TUN's name: it stands in the filter's name, together with whether we made the qdisc, so that a
    later instance knows what it may remove.
    """

    def __init__(self, name: str, program: int, ifname: str, device: str) -> None:
        self._about = _about(name, "clsact/ingress", ifname, program)
        self._index = socket.if_nametoindex(ifname)
        self._is_attached = True
        netlink.run(lambda ip: self._attach(ip, program, f"ztun:{device}:{name}"))

    def _attach(self, ip: Any, program: int, tag: str) -> None:
        is_ours = netlink.ignoring([errno.EEXIST], ip.tc, "add", kind="clsact", index=self._index)
        try:
            ip.tc(
                "add-filter",
                kind="bpf",
                index=self._index,
                handle=FILTER_HANDLE,
                parent=_INGRESS_PARENT,
                prio=FILTER_PRIORITY,
                fd=program,
                name=f"{tag}:qdisc" if is_ours else tag,
                direct_action=True,
            )
        except netlink.NetlinkError:
            if is_ours:
                ip.tc("del", kind="clsact", index=self._index)
            raise

    def describe(self) -> dict[str, Any]:
        return dict(self._about)

    def close(self) -> None:
        if self._is_attached:
            self._is_attached = False
            if links.name_of(self._index) is None:
                return  # the filter went with its interface
            netlink.run(lambda ip: remove_filters(ip, self._index))


def _about(name: str, hook: str, ifname: str, program: int) -> dict[str, Any]:
    info = bpfcall.program_info(program)
    return {"name": name, "hook": hook, "ifname": ifname, "id": info.id, "tag": info.tag}


def find_filters(ip: Any, index: int) -> list[str]:
    """The names of ztun's filters on one interface."""
    names = []
    for message in ip.get_filters(index=index, parent=_INGRESS_PARENT):
        options = netlink.attribute(message, "TCA_OPTIONS")
        name = netlink.attribute(options, "TCA_BPF_NAME") if message["handle"] == FILTER_HANDLE and options else None
        if name and name.startswith("ztun:"):
            names.append(name)
    return names


def remove_filters(ip: Any, index: int, device: str | None = None) -> list[str]:
    """Remove ztun's filter from an interface, and the qdisc if it was ours and nothing else uses it.

    device: only a filter of that TUN. Returns the names of what was removed.
    """
    names = [name for name in find_filters(ip, index) if device in (None, name.split(":")[1])]
    if not names:
        return []
    gone = [errno.ENOENT, errno.EINVAL, errno.ENODEV]
    which = {"handle": FILTER_HANDLE, "parent": _INGRESS_PARENT, "prio": FILTER_PRIORITY}
    netlink.ignoring(gone, ip.tc, "del-filter", kind="bpf", index=index, **which)
    if names[0].endswith(":qdisc") and not _has_filters(ip, index):
        netlink.ignoring(gone, ip.tc, "del", kind="clsact", index=index)
    return names


def _has_filters(ip: Any, index: int) -> bool:
    parents = (_INGRESS_PARENT, _INGRESS_PARENT + 1)
    return any(netlink.attribute(one, "TCA_KIND") for parent in parents for one in ip.get_filters(index, parent=parent))
