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

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "armv7l": 386, "ppc64le": 361, "s390x": 351}

MAP_LOOKUP_ELEM = 1
MAP_UPDATE_ELEM = 2
MAP_DELETE_ELEM = 3
OBJ_GET_INFO_BY_FD = 15
MAP_LOOKUP_BATCH = 24
MAP_UPDATE_BATCH = 26
LINK_CREATE = 28

TCX_INGRESS = 46

# The size of union bpf_attr that we hand over; the kernel takes any, if what it does not know is zero.
_ATTR_SIZE = 128
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    """Make the call with `attr` (see `attributes`). Raises OSError."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"no number for bpf(2) on {platform.machine()}")
    result = int(_libc.syscall(number, command, attr, len(attr)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


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
