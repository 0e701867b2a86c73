"""Compiling and loading bpf/classify.c through bcc. The only place that imports bcc.

bcc wants a kernel source tree. It gets the small one under bpf/kernel, so that neither /lib/modules nor a
linux-headers package is needed; what that tree forwards to are the UAPI headers of linux-libc-dev.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ztun.errors import ZtunError

_UAPI = Path("/usr/include")


class Objects(NamedTuple):
    """Descriptors of loaded programs and their maps, by name. They are the caller's to close."""

    programs: dict[str, int]
    maps: dict[str, int]

    def close(self) -> None:
        for fd in (*self.programs.values(), *self.maps.values()):
            os.close(fd)
        self.programs.clear()
        self.maps.clear()


def load(directory: Path, programs: Sequence[str], maps: Sequence[str]) -> Objects:
    """Compile `directory`/classify.c and load `programs` into the kernel. Takes about half a second.

    Raises ZtunError with the compiler's or the verifier's first complaint.
    """
    factory = _import_bcc()
    if not (_UAPI / "linux" / "ip.h").is_file():
        raise ZtunError(f"{_UAPI}/linux is missing: install linux-libc-dev")
    with _kernel_tree(directory / "kernel"), _stderr_to_file() as said:
        module = None
        try:
            module = factory(src_file=os.fsencode(directory / "classify.c"), cflags=_flags(directory))
            return _take(module, factory, programs, maps)
        except Exception as error:  # bcc raises nothing more exact
            raise ZtunError(f"BPF programs not loaded: {_complaint(said, error)}") from error
        finally:
            # What we keep are duplicates; this gives the compiler's memory back.
            if module is not None:
                module.cleanup()
                atexit.unregister(module.cleanup)


def _import_bcc() -> Any:
    try:
        from bcc import BPF
    except ImportError as error:
        raise ZtunError(f"bcc is not there for this Python ({error}): install python3-bpfcc") from error
    return BPF


def _flags(directory: Path) -> list[str]:
    # After all others: bcc's and the small tree's own headers come first.
    paths = [_UAPI, _UAPI / (sysconfig.get_config_var("MULTIARCH") or "")]
    return [f"-I{directory}", *(f"-idirafter{path}" for path in paths)]


def _take(module: Any, factory: Any, programs: Sequence[str], maps: Sequence[str]) -> Objects:
    taken = Objects({}, {})
    try:
        for name in programs:
            taken.programs[name] = _duplicate(module.load_func(name.encode(), factory.SCHED_CLS).fd)
        for name in maps:
            taken.maps[name] = _duplicate(module.get_table(name.encode()).map_fd)
    except BaseException:
        taken.close()
        raise
    return taken


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


@contextmanager
def _kernel_tree(path: Path) -> Iterator[None]:
    before = os.environ.get("BCC_KERNEL_SOURCE")
    os.environ["BCC_KERNEL_SOURCE"] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["BCC_KERNEL_SOURCE"]
        else:
            os.environ["BCC_KERNEL_SOURCE"] = before


@contextmanager
def _stderr_to_file() -> Iterator[IO[bytes]]:
    """bcc writes its complaints to file descriptor 2."""
    with tempfile.TemporaryFile() as said:
        kept = _duplicate(2)
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _complaint(said: IO[bytes], error: Exception) -> str:
    said.seek(0)
    lines = [line.strip() for line in said.read().decode(errors="replace").splitlines() if line.strip()]
    for line in lines:
        if "error:" in line:
            return line
    # The verifier says what it dislikes in the line before its statistics.
    lines = [line for line in lines if not line.startswith(("processed ", "HINT", "libbpf"))]
    return f"{error}: {lines[-1]}" if lines else str(error)
