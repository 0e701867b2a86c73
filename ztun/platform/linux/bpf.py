"""Compiling and loading bpf/classify.c through bcc. The only place that imports bcc; it runs as a program of its own.

libbcc brings a whole compiler, about 110 MB that a process does not get rid of again. So `loader` runs this file, gets
the descriptors of what was loaded through the socket that is our standard input, and the rest goes with this process.
Nothing but the standard library, bcc and a file beside it is imported, since ztun need not be on the path of a file
that is run.

bcc wants a kernel source tree. It gets the small one under bpf/kernel, so that neither /lib/modules nor a
linux-headers package is needed; what that tree forwards to are the UAPI headers of linux-libc-dev.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import socket
import struct
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_UAPI = Path("/usr/include")
# include/uapi/linux/bpf.h.
_PROG_LOAD = 5
_PROG_TYPE_XDP = 6
_INSTRUCTION_SIZE = 8
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST_ERROR = 1000


class MissingError(Exception):
    """Something must be installed first. The message is all that is to be told."""


class Loaded(NamedTuple):
    """Descriptors by name, which belong to bcc; refused: program that may be missing -> why there is none."""

    programs: dict[str, int]
    maps: dict[str, int]
    refused: dict[str, str]


def main(request: str) -> None:
    """Answer one request: JSON with "directory", and the names of the "programs" and "maps" that are wanted; "xdp" has
    a name for each XDP program besides, under which the kernel is to show it; those and the "optional" may be missing.

    The answer is one message on standard input: JSON with lists of the names that there are and with "refused", what
    the kernel said of those that are missing, and with it (SCM_RIGHTS, unix(7)) the descriptors in that order; or
    {"missing": what to install}, or {"error": what bcc raised}. What the compiler and the verifier say is written to
    standard error.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    wanted = json.loads(request)
    with socket.socket(fileno=0) as asking:
        try:
            loaded = load(
                Path(wanted["directory"]), wanted["programs"], wanted["maps"], wanted["xdp"], wanted["optional"]
            )
            answer = {"programs": list(loaded.programs), "maps": list(loaded.maps), "refused": loaded.refused}
            descriptors = [*loaded.programs.values(), *loaded.maps.values()]
            socket.send_fds(asking, [json.dumps(answer).encode()], descriptors)
        except MissingError as missing:
            asking.send(json.dumps({"missing": str(missing)}).encode())
        except Exception as error:  # bcc raises nothing more exact
            asking.send(json.dumps({"error": str(error)[:_LONGEST_ERROR]}).encode())
    sys.stderr.flush()
    os._exit(0)  # a compiler that is taken apart in order takes its time


def load(
    directory: Path, programs: Sequence[str], maps: Sequence[str], xdp: Mapping[str, str], optional: Sequence[str]
) -> Loaded:
    """Compile `directory`/classify.c and load `programs` for tc; those of `xdp`, and of `optional` for tc, where the
    kernel takes them.

    Raises MissingError, or whatever bcc raises.
    """
    factory = _import_bcc()
    if not (_UAPI / "linux" / "ip.h").is_file():
        raise MissingError(f"{_UAPI}/linux is missing: install linux-libc-dev")
    os.environ["BCC_KERNEL_SOURCE"] = str(directory / "kernel")
    module = factory(src_file=os.fsencode(directory / "classify.c"), cflags=_flags(directory))
    loaded = Loaded(
        {name: module.load_func(name.encode(), factory.SCHED_CLS).fd for name in programs},
        {name: module.get_table(name.encode()).map_fd for name in maps},
        {},
    )
    for name in optional:
        try:
            loaded.programs[name] = module.load_func(name.encode(), factory.SCHED_CLS).fd
        except Exception as error:  # bcc raises nothing more exact
            loaded.refused[name] = str(error)
    for name, shown in xdp.items():
        try:
            loaded.programs[name] = _load_xdp(module.dump_func(name.encode()), shown)
        except OSError as error:
            loaded.refused[name] = error.strerror or str(error)
    return loaded


def _load_xdp(instructions: bytes, shown: str) -> int:
    """Load an XDP program under another name than its function's, which bcc cannot do. Raises OSError.

    Without BPF_F_XDP_HAS_FRAGS: with it, generic XDP (seen with Linux 6.18) hands tc copies of packets whose MAC header
    does not count, so that every tc program on the interface reads 14 octets too far on.
    """
    held, licence = ctypes.create_string_buffer(instructions, len(instructions)), ctypes.create_string_buffer(b"GPL")
    where = ctypes.addressof(held), ctypes.addressof(licence)
    # type, number of instructions, where they are, licence, the verifier's log (level, size, buffer), version, flags
    front = struct.pack("=IIQQIIQII", _PROG_TYPE_XDP, len(instructions) // _INSTRUCTION_SIZE, *where, 0, 0, 0, 0, 0)
    attr = ctypes.create_string_buffer(front + struct.pack("=16s", shown.encode()), 128)
    return int(_import_beside("bpfcall").bpf(_PROG_LOAD, attr))


def _import_beside(name: str) -> Any:
    """A module of this directory that imports nothing of ztun either."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_bcc() -> Any:
    try:
        from bcc import BPF
    except ImportError as error:
        raise MissingError(f"bcc is not there for this Python ({error}): install python3-bpfcc") from error
    return BPF


def _flags(directory: Path) -> list[str]:
    # After all others: bcc's and the small tree's own headers come first.
    paths = [_UAPI, _UAPI / (sysconfig.get_config_var("MULTIARCH") or "")]
    return [f"-I{directory}", *(f"-idirafter{path}" for path in paths)]


if __name__ == "__main__":
    main(sys.argv[1])
