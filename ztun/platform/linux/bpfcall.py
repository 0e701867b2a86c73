"""The bpf(2) system call: maps, TCX links, object ids.

bcc loads the programs, in a process of its own; the rest is done here. Sources: bpf(2),
include/uapi/linux/bpf.h (union bpf_attr).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "ppc64le": 361, "s390x": 351}

MAP_LOOKUP_ELEM = 1
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
PROG_GET_FD_BY_ID = 13
MAP_GET_FD_BY_ID = 14
OBJ_GET_INFO_BY_FD = 15
PROG_QUERY = 16
MAP_LOOKUP_BATCH = 24
MAP_UPDATE_BATCH = 26
MAP_DELETE_BATCH = 27
LINK_CREATE = 28

XDP = 37
TCX_INGRESS = 46
TCX_EGRESS = 47

# The size of union bpf_attr that we hand over; the kernel takes any, if what it does not know is zero.
_ATTR_SIZE = 128
_MOST_MAPS = 64
_MOST_PROGRAMS = 64  # on one hook: BPF_MPROG_MAX (include/linux/bpf_mprog.h)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    """Make the call with `attr` (see `attributes`). Raises OSError."""
    if _NUMBER < 0:
        raise OSError(errno.ENOSYS, f"no number for bpf(2) on {platform.machine()}")
    result = int(_libc.syscall(_NUMBER, command, attr, len(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


_NUMBER = _NUMBERS.get(platform.machine(), -1)


class Prepared:
    """A call that is made again and again on the same memory, at half the price."""

    def __init__(self, command: int, attr: ctypes.Array[ctypes.c_char]) -> None:
        self._attr = attr  # as the kernel reads and writes it
        self._arguments = tuple(map(ctypes.c_long, (_NUMBER, command, ctypes.addressof(attr), len(attr))))

    def __call__(self) -> int:
        """0, or the errno."""
        return ctypes.get_errno() if _libc.syscall(*self._arguments) < 0 else 0


def attributes(layout: str, *values: int) -> ctypes.Array[ctypes.c_char]:
    """A union bpf_attr that starts with `values` in the struct format `layout`."""
    return ctypes.create_string_buffer(struct.pack(layout, *values), _ATTR_SIZE)


def create_tcx_link(program: int, ifindex: int, attach_type: int = TCX_INGRESS) -> int:
    """Attach a program to an interface for as long as the returned descriptor is open. Raises OSError."""
    return bpf(LINK_CREATE, attributes("=IIII", program, ifindex, attach_type, 0))


def has_tcx(program: int) -> bool:
    """Whether this kernel has TCX: asked to attach to an interface that cannot be, it complains about that one."""
    try:
        os.close(create_tcx_link(program, 0x7FFFFFFF))
    except OSError as error:
        return error.errno == errno.ENODEV
    return True


def program_id(program: int) -> int:
    """The id of a loaded program, as bpftool shows it (struct bpf_prog_info: type, id). Raises OSError."""
    info = ctypes.create_string_buffer(8)
    bpf(OBJ_GET_INFO_BY_FD, attributes("=IIQ", program, len(info), ctypes.addressof(info)))
    return int(struct.unpack_from("=I", info.raw, 4)[0])


def map_sizes(fd: int) -> tuple[int, int]:
    """Key and value size of a map in bytes (struct bpf_map_info: type, id, key_size, value_size). Raises OSError."""
    info = ctypes.create_string_buffer(16)
    bpf(OBJ_GET_INFO_BY_FD, attributes("=IIQ", fd, len(info), ctypes.addressof(info)))
    key_size, value_size = struct.unpack_from("=II", info.raw, 8)
    return key_size, value_size


class ProgramInfo(NamedTuple):
    """A loaded program, as bpftool shows it. tag: hash of its instructions, in hex; map_ids: those it uses."""

    id: int
    name: str
    tag: str
    map_ids: tuple[int, ...]


class Attached(NamedTuple):
    """A program on a TCX hook. link_id: 0 where it was attached without a link."""

    program_id: int
    link_id: int


def program_info(program: int) -> ProgramInfo:
    """What the kernel says of a program (struct bpf_prog_info). Raises OSError."""
    map_ids = (ctypes.c_uint32 * _MOST_MAPS)()
    info = ctypes.create_string_buffer(80)
    struct.pack_into("=IQ", info, 52, _MOST_MAPS, ctypes.addressof(map_ids))  # nr_map_ids, map_ids
    bpf(OBJ_GET_INFO_BY_FD, attributes("=IIQ", program, len(info), ctypes.addressof(info)))
    _type, number, tag = struct.unpack_from("=II8s", info.raw, 0)
    count = min(struct.unpack_from("=I", info.raw, 52)[0], _MOST_MAPS)
    return ProgramInfo(number, _text(info.raw[64:80]), tag.hex(), tuple(map_ids[:count]))


def map_name(fd: int) -> str:
    """The name of a map (struct bpf_map_info), 15 bytes at most. Raises OSError."""
    info = ctypes.create_string_buffer(40)
    bpf(OBJ_GET_INFO_BY_FD, attributes("=IIQ", fd, len(info), ctypes.addressof(info)))
    return _text(info.raw[24:40])


def open_program(number: int) -> int:
    """A descriptor of the program with this id. Raises OSError; needs CAP_SYS_ADMIN."""
    return bpf(PROG_GET_FD_BY_ID, attributes("=III", number, 0, 0))


def open_map(number: int) -> int:
    """A descriptor of the map with this id. Raises OSError; needs CAP_SYS_ADMIN."""
    return bpf(MAP_GET_FD_BY_ID, attributes("=III", number, 0, 0))


def query_tcx(ifindex: int, attach_type: int) -> list[Attached]:
    """The programs on a TCX hook in the order in which they run. Raises OSError (EINVAL: the kernel has no TCX)."""
    programs, links = (ctypes.c_uint32 * _MOST_PROGRAMS)(), (ctypes.c_uint32 * _MOST_PROGRAMS)()
    # target_ifindex, attach_type, query_flags, attach_flags, prog_ids, count, -, prog_attach_flags, link_ids
    where = ifindex, attach_type, 0, 0, ctypes.addressof(programs), _MOST_PROGRAMS, 0, 0, ctypes.addressof(links)
    attr = attributes("=IIIIQIIQQ", *where)
    bpf(PROG_QUERY, attr)
    count = struct.unpack_from("=I", attr.raw, 24)[0]
    return [Attached(programs[n], links[n]) for n in range(min(count, _MOST_PROGRAMS))]


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode(errors="replace")
