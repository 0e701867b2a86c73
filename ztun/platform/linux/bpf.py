"""Compiling and loading bpf/classify.c through bcc. The only place that imports bcc; it runs as a program of its own.

libbcc brings a whole compiler, about 110 MB that a process does not get rid of again. So `loader` runs this file, gets
the descriptors of what was loaded through the socket that is our standard input, and the rest goes with this process.
Nothing but the standard library and bcc is imported, since ztun need not be on the path of a file that is run.

bcc wants a kernel source tree. It gets the small one under bpf/kernel, so that neither /lib/modules nor a
linux-headers package is needed; what that tree forwards to are the UAPI headers of linux-libc-dev.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_UAPI = Path("/usr/include")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LONGEST_ERROR = 1000


class MissingError(Exception):
    """Something must be installed first. The message is all that is to be told."""


def main(request: str) -> None:
    """Answer one request: JSON with "directory", and the names of the "programs" and "maps" that are wanted.

    The answer is one message on standard input: JSON with the same lists of names, and with it (SCM_RIGHTS, unix(7))
    the descriptors in that order; or {"missing": what to install}, or {"error": what bcc raised}. What the compiler
    and the verifier say goes to standard error.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    wanted = json.loads(request)
    with socket.socket(fileno=0) as asking:
        try:
            programs, maps = load(Path(wanted["directory"]), wanted["programs"], wanted["maps"])
            answer = {"programs": list(programs), "maps": list(maps)}
            socket.send_fds(asking, [json.dumps(answer).encode()], [*programs.values(), *maps.values()])
        except MissingError as missing:
            asking.send(json.dumps({"missing": str(missing)}).encode())
        except Exception as error:  # bcc raises nothing more exact
            asking.send(json.dumps({"error": str(error)[:_LONGEST_ERROR]}).encode())
    sys.stderr.flush()
    os._exit(0)  # a compiler that is taken apart in order takes its time


def load(directory: Path, programs: Sequence[str], maps: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Compile `directory`/classify.c and load it: the descriptors of `programs` and of `maps`, by name.

    They belong to bcc. Raises MissingError, or whatever bcc raises.
    """
    factory = _import_bcc()
    if not (_UAPI / "linux" / "ip.h").is_file():
        raise MissingError(f"{_UAPI}/linux is missing: install linux-libc-dev")
    os.environ["BCC_KERNEL_SOURCE"] = str(directory / "kernel")
    module = factory(src_file=os.fsencode(directory / "classify.c"), cflags=_flags(directory))
    return (
        {name: module.load_func(name.encode(), factory.SCHED_CLS).fd for name in programs},
        {name: module.get_table(name.encode()).map_fd for name in maps},
    )


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
