"""BPF programs and filters of somebody else, beside ztun's on the same hooks.

They are a few instructions each, put together here, so that no compiler is needed. Sources: bpf(2),
include/uapi/linux/bpf.h, Documentation/bpf/standardization/instruction-set.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from ztun.lab import Namespace
from ztun.platform.linux import netlink
from ztun.platform.linux.bpfcall import TCX_INGRESS, attributes, bpf, create_tcx_link
from ztun.platform.linux.maps import Map

GO_ON = -1  # TCX_NEXT and TC_ACT_UNSPEC: who comes next decides
_MAP_CREATE, _PROG_LOAD, _LINK_CREATE = 0, 5, 28
_ARRAY, _SCHED_CLS = 2, 3
_BEFORE = 1 << 3  # BPF_F_BEFORE
_LOOKUP, _VLAN_PUSH, _VLAN_POP, _REDIRECT = 1, 18, 19, 23  # enum bpf_func_id
_VLAN_PRESENT = 20  # offset in struct __sk_buff
_PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}  # TC_H_CLSACT with TC_H_MIN_INGRESS, _EGRESS


def _op(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    return struct.pack("=BBhi", code, to | source << 4, offset, value)


def _set(register: int, value: int) -> bytes:
    return _op(0xB7, register, value=value)


def _call(helper: int) -> bytes:
    return _op(0x85, value=helper)


_EXIT = _op(0x95)


def _redirect(ifindex: int) -> bytes:
    return _set(1, ifindex) + _set(2, 0) + _call(_REDIRECT) + _EXIT


def load(name: str, code: bytes) -> int:
    """A descriptor of the program for tc. Raises OSError."""
    held, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(b"GPL")
    attr = attributes(
        "=IIQQIIQII", _SCHED_CLS, len(code) // 8, ctypes.addressof(held), ctypes.addressof(licence), 0, 0, 0, 0, 0
    )
    struct.pack_into("=15s", attr, 48, name.encode())
    return bpf(_PROG_LOAD, attr)


def untag(ifindex: int) -> int:
    """Takes the VLAN tag off and hands the frame to an interface; what has none goes on."""
    rest = _call(_VLAN_POP) + _redirect(ifindex)
    leap = _op(0x15, 2, offset=len(rest) // 8)
    return load("untag", _op(0x61, 2, 1, _VLAN_PRESENT) + leap + rest + _set(0, GO_ON) + _EXIT)


def tag(number: int, ifindex: int) -> int:
    """Puts a VLAN tag on and hands the frame to an interface."""
    return load("tag", _set(2, socket.htons(0x8100)) + _set(3, number) + _call(_VLAN_PUSH) + _redirect(ifindex))


class Counting:
    """A program that counts packets and says `verdict` about each."""

    def __init__(self, name: str, verdict: int) -> None:
        self.name = name
        self._map = bpf(_MAP_CREATE, attributes("=IIII", _ARRAY, 4, 8, 1))
        key = _set(1, 0) + _op(0x63, 10, 1, -4) + _op(0xBF, 2, 10) + _op(0x07, 2, value=-4)
        table = _op(0x18, 1, 1, value=self._map) + _op(0)
        add = _set(1, 1) + _op(0xDB, 0, 1)
        self.program = load(
            name, key + table + _call(_LOOKUP) + _op(0x15, 0, offset=2) + add + _set(0, verdict) + _EXIT
        )

    @property
    def packets(self) -> int:
        return int.from_bytes(Map(self._map, 4, 8).lookup(bytes(4)) or b"", "little")

    def close(self) -> None:
        os.close(self.program)
        os.close(self._map)


def attach_tcx(namespace: Namespace, ifname: str, program: int, *, first: bool = False) -> int:
    """A TCX link on the interface's ingress, before or behind those that are there; gone with its descriptor."""
    with namespace.entered():
        index = socket.if_nametoindex(ifname)
        return bpf(_LINK_CREATE, attributes("=IIII", program, index, TCX_INGRESS, _BEFORE if first else 0))


def attach_filter(
    namespace: Namespace, ifname: str, name: str, program: int, priority: int, hook: str = "ingress"
) -> None:
    """A clsact filter, which stays until somebody removes it."""
    with namespace.entered():
        index = socket.if_nametoindex(ifname)

        def add(ip: Any) -> None:
            netlink.ignoring([17], ip.tc, "add", kind="clsact", index=index)
            where = {"index": index, "parent": _PARENTS[hook], "prio": priority}
            ip.tc("add-filter", kind="bpf", fd=program, name=name, direct_action=True, **where)

        netlink.run(add)


@contextlib.contextmanager
def vlan(namespace: Namespace, trunk: str, number: int) -> Iterator[str]:
    """An interface TRUNK.NUMBER for a VLAN of a trunk (IEEE 802.1Q).

    Where the kernel has no VLAN devices, two programs and a veth pair play one: the frames on the trunk are the same.
    """
    name = f"{trunk}.{number}"
    real = namespace.run(
        "ip", "link", "add", "link", trunk, "name", name, "type", "vlan", "id", str(number), check=False
    )
    if real.returncode == 0:
        yield name
        return
    inner = f"{trunk}-{number}"
    mac = namespace.run("cat", f"/sys/class/net/{trunk}/address").stdout.strip()
    namespace.ip(
        f"link add {name} address {mac} type veth peer name {inner}",
        f"link set {inner} up",
    )
    with namespace.entered():
        indexes = socket.if_nametoindex(trunk), socket.if_nametoindex(inner)
        programs = untag(indexes[1]), tag(number, indexes[0])
        links = [create_tcx_link(program, index) for program, index in zip(programs, indexes, strict=True)]
    try:
        yield name
    finally:
        for fd in (*links, *programs):
            os.close(fd)
