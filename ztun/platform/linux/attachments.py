"""The programs that hang on interfaces, ours and others', as the kernel lists them. Nothing is changed.

Each is a dictionary: "ifname", "hook" ("tcx/ingress", "clsact/egress", "xdp/generic", …), "direction", "name", "id",
"tag" (hash of its instructions), "filter" (the name of a tc filter) and "owner" ("ztun" or "other"). What the kernel
does not tell us is None.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ztun.platform.linux import bpfcall, netlink

_TCX = (("ingress", bpfcall.TCX_INGRESS), ("egress", bpfcall.TCX_EGRESS))
# TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS) and …_EGRESS, linux/pkt_sched.h. The older qdisc `ingress` has the first too.
_TC = (("ingress", 0xFFFFFFF2), ("egress", 0xFFFFFFF3))
# IFLA_XDP_ATTACHED (linux/if_link.h) as pyroute2 names its values.
_XDP_MODES = {"xdp": "native", "xdpgeneric": "generic", "xdpoffload": "offload", "xdpmulti": "several"}
_TCA_BPF_TAG, _TCA_BPF_ID = 10, 11  # linux/pkt_cls.h
_NLA_HEADER = 4  # bytes, linux/netlink.h
_TAG = "ztun:"  # of tc filters, see hooks
_XDP_TAG = "ztun_"  # see xdp.label
_NONE: Mapping[int, Mapping[str, Any]] = MappingProxyType({})
_REFUSED = (errno.EPERM, errno.EACCES)


class Sight:
    """What could not be seen, once each, in the words of a person."""

    def __init__(self) -> None:
        self.unseen: list[str] = []

    def misses(self, what: str) -> None:
        if what not in self.unseen:
            self.unseen.append(what)


def list_attachments(ip: Any, sight: Sight, own: Mapping[int, Mapping[str, Any]] = _NONE) -> list[dict[str, Any]]:
    """Every program on every interface. own: our programs by their ids, with their names and tags."""
    found: list[dict[str, Any]] = []
    for link in ip.get_links():
        ifname, index = netlink.attribute(link, "IFLA_IFNAME"), link["index"]
        hooked = [*_xdp(link), *_tcx(index, sight), *_filters(ip, index)]
        for each in hooked:
            _complete(each, sight, own)
            each["owner"] = "ztun" if each["id"] in own or _is_tagged(each) else "other"
            found.append({"ifname": ifname, **each})
    return found


def _is_tagged(entry: Mapping[str, Any]) -> bool:
    """Whether its name says that it is ours: a tc filter's, or that of an XDP program."""
    if entry["hook"].startswith("xdp"):
        return str(entry["name"]).startswith(_XDP_TAG)
    return str(entry["filter"]).startswith(_TAG)


def _xdp(link: Any) -> Iterator[dict[str, Any]]:
    about = netlink.attribute(link, "IFLA_XDP")
    mode = netlink.attribute(about, "IFLA_XDP_ATTACHED") if about is not None else None
    if mode:
        number = netlink.attribute(about, "IFLA_XDP_PROG_ID")
        yield _entry(f"xdp/{_XDP_MODES.get(mode, mode)}", "ingress", number)


def _tcx(index: int, sight: Sight) -> Iterator[dict[str, Any]]:
    for direction, attach_type in _TCX:
        try:
            attached = bpfcall.query_tcx(index, attach_type)
        except OSError as error:
            if error.errno in _REFUSED:
                sight.misses("programs on TCX hooks (needs CAP_NET_ADMIN)")
            # EINVAL: a kernel before 6.6, which has none; ENODEV: the interface went meanwhile.
            continue
        for one in attached:
            yield _entry(f"tcx/{direction}", direction, one.program_id)


def _filters(ip: Any, index: int) -> Iterator[dict[str, Any]]:
    for direction, parent in _TC:
        try:
            messages = list(ip.get_filters(index=index, parent=parent))
        except netlink.NetlinkError:  # no such qdisc, or no such interface any more
            continue
        for message in messages:
            options = netlink.attribute(message, "TCA_OPTIONS")
            # Without a handle it is the head of a list of filters, not one of them.
            if netlink.attribute(message, "TCA_KIND") == "bpf" and message["handle"] and options is not None:
                number, tag = _raw(options, _TCA_BPF_ID), _raw(options, _TCA_BPF_TAG)
                yield {
                    **_entry(f"clsact/{direction}", direction, int.from_bytes(number, sys.byteorder) or None),
                    "tag": tag.hex() or None,
                    "filter": netlink.attribute(options, "TCA_BPF_NAME"),
                }


def _raw(options: Any, kind: int) -> bytes:
    """An attribute that pyroute2 does not know, as it came; empty when it is absent."""
    for _name, value in options["attrs"]:
        header = value.get("header") if isinstance(value, Mapping) else None
        if header is not None and header["type"] == kind:
            return bytes(value.data[value.offset + _NLA_HEADER : value.offset + header["length"]])
    return b""


def _entry(hook: str, direction: str, number: int | None) -> dict[str, Any]:
    return {"hook": hook, "direction": direction, "name": None, "id": number, "tag": None, "filter": None}


def _complete(entry: dict[str, Any], sight: Sight, own: Mapping[int, Mapping[str, Any]]) -> None:
    """Fill in what only the program itself tells."""
    if entry["id"] in own:
        entry.update({key: own[entry["id"]].get(key) for key in ("name", "tag")})
        return
    if entry["id"] is None:
        return
    try:
        fd = bpfcall.open_program(entry["id"])
    except OSError as error:
        if error.errno in _REFUSED:
            sight.misses("names and tags of BPF programs (needs CAP_SYS_ADMIN)")
        return
    try:
        info = bpfcall.program_info(fd)
    finally:
        os.close(fd)
    entry["name"], entry["tag"] = info.name, info.tag
