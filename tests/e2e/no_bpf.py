"""`python no_bpf.py ERRNO PROGRAM …`: run a program to which every bpf(2) fails with that error.

EPERM is what lockdown and missing privileges say, ENOSYS what a kernel without BPF says. The filter is seccomp(2)'s.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_NUMBERS = {"x86_64": 321, "aarch64": 280}
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # SECCOMP_RET_*


def main(name: str, *argv: str) -> None:
    """Replaces this process. Needs CAP_SYS_ADMIN, as a filter does without no_new_privs."""
    steps = [
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_EQUAL, 0, 1, _NUMBERS[platform.machine()]),
        (_RETURN, 0, 0, _ERRNO | getattr(errno, name)),
        (_RETURN, 0, 0, _ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("=H6xQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP)")
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(*sys.argv[1:])
