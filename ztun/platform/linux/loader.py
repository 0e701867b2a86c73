"""Having the BPF programs compiled and loaded by a process of its own: the compiler's memory goes with it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

from ztun.errors import ZtunError
from ztun.platform.linux import bpf, bpfcall

# Seconds. It takes less than one on a PC; a small board, or an emulated one on a busy host, a hundred times as long.
DEADLINE = 300.0
_ANSWER_SIZE = 65536
_MOST_BYTES = 64 * 4  # of descriptors, a C int each
_FAILED = "BPF programs not loaded"


class Objects(NamedTuple):
    """Descriptors of loaded programs and their maps, by name. They are the caller's to close.

    refused: program that may be missing -> why the kernel did not take it.
    """

    programs: dict[str, int]
    maps: dict[str, int]
    refused: Mapping[str, str] = MappingProxyType({})

    def close(self) -> None:
        for fd in (*self.programs.values(), *self.maps.values()):
            os.close(fd)
        self.programs.clear()
        self.maps.clear()


async def load(
    directory: Path,
    programs: Iterable[str],
    maps: Mapping[str, tuple[int, int, str]],
    xdp: Mapping[str, str] = MappingProxyType({}),
    optional: Iterable[str] = (),
) -> Objects:
    """Compile classify.c of `directory` (absolute) and load `programs` into the kernel. Takes about half a second.

    xdp: XDP program -> the name by which the kernel is to show it, 15 letters at most; optional: tc programs. Both may
    be missing then.
    maps: name -> (key size, value size in bytes, kind) of those that are wanted. Raises ZtunError with the compiler's
    or the verifier's first complaint, or with how their process ended. When it is cancelled, that process is killed.
    """
    wanted = {"directory": str(directory), "programs": list(programs), "maps": list(maps), "xdp": dict(xdp)}
    wanted["optional"] = list(optional)
    request = json.dumps(wanted)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # Not a pipe, which a talkative compiler could fill, and no file that somebody would have to remove.
    with ours, os.fdopen(os.memfd_create("ztun-bpf"), "w+b") as said:
        with theirs:
            child = _start(request, theirs, said)
        with _ended(child):
            await _readable(ours)
            answer, descriptors = _receive(ours, child)
        objects = _name(answer, descriptors)
        if objects is None:
            raise ZtunError(_explain(answer, child.returncode, said))
    _require_sizes(objects, maps)
    return objects


def _start(request: str, theirs: socket.socket, said: IO[bytes]) -> subprocess.Popen[bytes]:
    # -P: what lies beside the file is not to be taken for modules of the standard library.
    argv = [sys.executable, "-P", bpf.__file__, request]
    try:
        return subprocess.Popen(
            argv,
            stdin=theirs.fileno(),
            stdout=said,
            stderr=said,
            cwd="/",  # bcc goes elsewhere and has to find back; our own may have been deleted
            start_new_session=True,  # Ctrl-C is for us, and what becomes of the child our business
        )
    except OSError as error:
        raise ZtunError(f"{_FAILED}: cannot run {sys.executable or 'Python'}: {error.strerror}") from error


@contextmanager
def _ended(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens inside, the child is gone afterwards."""
    try:
        yield
    finally:
        child.kill()
        child.wait()


async def _readable(sock: socket.socket) -> None:
    """Wait for a message or the other side's end. Raises ZtunError after DEADLINE."""
    loop = asyncio.get_running_loop()
    is_readable = asyncio.Event()
    loop.add_reader(sock, is_readable.set)
    try:
        async with asyncio.timeout(DEADLINE):
            await is_readable.wait()
    except TimeoutError as error:
        raise ZtunError(f"{_FAILED}: not compiled within {DEADLINE:g} s") from error
    finally:
        loop.remove_reader(sock)


def _receive(ours: socket.socket, child: subprocess.Popen[bytes]) -> tuple[dict[str, Any], list[int]]:
    """The child's answer; {} when it ended without one."""
    # socket.recv_fds() of Python 3.11 forgets to hand its flags on.
    data, passed, _, _ = ours.recvmsg(_ANSWER_SIZE, socket.CMSG_SPACE(_MOST_BYTES), socket.MSG_CMSG_CLOEXEC)
    if not data:
        with suppress(subprocess.TimeoutExpired):
            child.wait(1)  # how it ended is all that is left to know
    descriptors = array("i", b"".join(item for _, _, item in passed))
    return json.loads(data or "{}"), descriptors.tolist()


def _name(answer: Mapping[str, Any], descriptors: Sequence[int]) -> Objects | None:
    """The descriptors under their names, None when the child had nothing to give."""
    if "programs" not in answer:
        return None
    programs, maps = answer["programs"], answer["maps"]
    if len(descriptors) != len(programs) + len(maps):
        for fd in descriptors:
            os.close(fd)
        raise ZtunError(f"{_FAILED}: too few file descriptors are left; raise the limit (ulimit -n)")
    passed = iter(descriptors)
    return Objects(
        {name: next(passed) for name in programs}, {name: next(passed) for name in maps}, answer.get("refused", {})
    )


def _require_sizes(objects: Objects, maps: Mapping[str, tuple[int, int, str]]) -> None:
    """A map of another layout than ours would have the kernel write behind our buffers."""
    for name, fd in objects.maps.items():
        sizes = bpfcall.map_sizes(fd)
        if sizes != maps[name][:2]:
            objects.close()
            raise ZtunError(
                f"BPF map {name} has keys and values of {sizes} bytes, not {maps[name][:2]}: install ztun anew"
            )


def _explain(answer: Mapping[str, Any], code: int, said: IO[bytes]) -> str:
    if "missing" in answer:
        return str(answer["missing"])
    said.seek(0)
    complaint = _find_complaint(said.read().decode(errors="replace"))
    if "error" not in answer:
        end = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
        return ": ".join(filter(None, (_FAILED, f"the compiler {end}", complaint)))
    told = [complaint] if "error:" in complaint.lower() else [answer["error"], complaint]
    hint = "; needs root, or CAP_BPF and CAP_NET_ADMIN" if os.strerror(errno.EPERM) in "".join(told) else ""
    return ": ".join(filter(None, (_FAILED, *told))) + hint


def _find_complaint(text: str) -> str:
    """The line that says most of what bcc, clang, LLVM or the verifier wrote."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in lines:
        if "error:" in line.lower():
            return line
    # The verifier says what it dislikes in the line before its statistics.
    lines = [line for line in lines if not line.startswith(("processed ", "HINT", "libbpf"))]
    return lines[-1] if lines else ""
