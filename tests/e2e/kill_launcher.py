"""Runs `ztun ARGUMENTS` again and again in forks of itself, and has each killed at a point that it was told.

A point is a count: of the calls by which a process changes something (system calls to netlink and bpf(2), files opened
for writing, renamed and removed, ioctls, sockets bound and connected), seen through audit events (PEP 578). So the
points lie where there is progress, each run meets the same ones, and the gateway itself knows nothing of it.

Each line of stdin is a request, {"argv", "phase", "at", "signal", "output", "compiled"}; each line of stdout an answer:
{"pid"} at once and {"status", "count", "ids"} at the end. phase: from when on is counted, "start", "run" or "stop"; at:
the call before which the signal comes, 0 for never; compiled: take the BPF programs that were compiled here once; ids:
what else the process had of bpf(2).

On SIGUSR1 a callback of the event loop raises an exception, on SIGUSR2 one that ends the loop. On SIGRTMIN the process
has no memory from then on.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ztun.app
import ztun.cli.down
import ztun.cli.up
import ztun.lifecycle
from ztun import report
from ztun.cli import main
from ztun.platform.linux import bpfcall, loader
from ztun.platform.linux.maps import Map, possible_cpus

_CALLS = frozenset(
    (
        "fcntl.flock",
        "fcntl.ioctl",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "socket.bind",
        "socket.connect",
        "socket.sendmsg",
        "socket.sendto",
        "subprocess.Popen",
    )
)


class Counter:
    """Counts the calls from `phase` on, and sends this process a signal before number `at`."""

    def __init__(self, phase: str, at: int, number: int, path: Path) -> None:
        self.phase = phase
        self.at = at
        self.signal = number
        self.path = path
        self.count = 0
        self.wanted: list[Any] | None = None  # of the compiler
        self.is_on = phase == "start"

    def begin(self, phase: str) -> None:
        self.is_on = self.is_on or phase == self.phase

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.is_on and (event in _CALLS or (event == "open" and _is_writing(arguments))):
            self.step()

    def step(self) -> None:
        if not self.is_on:
            return
        self.count += 1
        if self.count == self.at:
            self.is_on = False
            self.tell()
            os.kill(os.getpid(), self.signal)

    def tell(self) -> None:
        self.is_on = False
        self.path.write_text(json.dumps({"count": self.count, "ids": self._own_ids(), "wanted": self.wanted}))

    @staticmethod
    def _own_ids() -> list[tuple[str, int]]:
        return [each for each in _bpf_ids() if each not in compiled.ids]


def _is_writing(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def _bpf_ids() -> list[tuple[str, int]]:
    found = set()
    for path in Path("/proc/self/fdinfo").iterdir():
        try:
            text = path.read_text()
        except OSError:
            continue
        found |= {(kind, int(number)) for kind, number in re.findall(r"^(prog|link|map)_id:\s*(\d+)", text, re.M)}
    return sorted(found)


# Programs write there, or others read, only where the map `carried` says so.
_NOT_EMPTIED = ("splices", "ended", "jumps")


class Compiled:
    """The BPF programs of one request to the compiler, loaded in this process and handed to its forks."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[loader.Objects, Mapping[str, tuple[int, int, str]]]] = {}
        self.ids: set[tuple[str, int]] = set()

    def keep(self, request: list[Any]) -> None:
        """Compile what a run asked for."""
        directory, programs, maps, *more = request
        key = json.dumps(request)
        if key not in self._kept:
            maps = {name: tuple(sizes) for name, sizes in maps.items()}
            self._kept[key] = asyncio.run(loader.load(Path(directory), programs, maps, *more)), maps
            self.ids = set(_bpf_ids())

    def take(self, request: list[Any]) -> loader.Objects | None:
        """Descriptors of them for a fork, the maps as good as new; None when it wants others."""
        kept, maps = self._kept.get(json.dumps(request), (None, {}))
        if kept is None:
            return None
        for name, (key_size, value_size, kind) in maps.items():
            if name in _NOT_EMPTIED:
                continue
            size = value_size * possible_cpus() if kind.startswith("percpu") else value_size
            table = Map(kept.maps[name], key_size, size)
            keys = [key for key, _ in table.items()]
            if kind.endswith("array"):
                table.update_many(dict.fromkeys(keys, bytes(size)))
            else:
                table.delete_many(keys)
        fresh = ({name: os.dup(fd) for name, fd in part.items()} for part in (kept.programs, kept.maps))
        return loader.Objects(*fresh, *kept[2:])


compiled = Compiled()


class _CountedLibrary:
    """Stands before the C library where bpf(2) is called."""

    def __init__(self, library: Any, counter: Counter) -> None:
        self._library = library
        self._counter = counter

    def syscall(self, *arguments: Any) -> Any:
        self._counter.step()
        return self._library.syscall(*arguments)


def _run(request: dict[str, Any], path: Path) -> None:
    """In the child."""
    counter = Counter(request["phase"], request["at"], request["signal"], path)
    ask, summary = ztun.lifecycle.StopRequest.ask, report.Report.summary

    def counted_ask(self: Any) -> None:
        counter.begin("stop")
        ask(self)

    def counted_summary(self: Any) -> Any:
        counter.begin("run")
        return summary(self)

    ztun.lifecycle.StopRequest.ask = counted_ask  # type: ignore[method-assign]
    report.Report.summary = counted_summary  # type: ignore[method-assign]
    _count_what_has_no_audit_event(counter)
    _look_at_the_compiler(counter, request["compiled"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.addaudithook(counter.hook)
    signal.signal(signal.SIGUSR1, lambda *_: asyncio.get_running_loop().call_soon(_fail))
    signal.signal(signal.SIGUSR2, lambda *_: asyncio.get_running_loop().call_soon(sys.exit, 3))
    signal.signal(signal.SIGRTMIN, lambda *_: _starve())
    code = 70
    try:
        sys.argv = ["ztun", *request["argv"]]
        code = main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        counter.tell()
        sys.stdout.flush()
        os._exit(code)


def _fail() -> None:
    raise RuntimeError("nobody expected this")


_ballast: list[bytearray] = []


def _starve() -> None:
    """Forbid more memory than there is, and take what there is."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
    for size in (1 << 20, 1 << 16, 1 << 12, 1 << 10):
        try:
            while True:
                _ballast.append(bytearray(size))
        except MemoryError:
            pass


def _count_what_has_no_audit_event(counter: Counter) -> None:
    bpfcall._libc = _CountedLibrary(bpfcall._libc, counter)  # type: ignore[assignment]
    send, close = socket.socket.send, os.close

    def counted_send(self: socket.socket, *arguments: Any) -> int:
        counter.step()
        return send(self, *arguments)

    def counted_close(fd: int) -> None:
        counter.step()
        close(fd)

    socket.socket.send = counted_send  # type: ignore[method-assign]
    os.close = counted_close


def _look_at_the_compiler(counter: Counter, may_be_compiled: bool) -> None:
    load = loader.load

    async def looked_at(directory: Path, programs: Any, maps: Any, *more: Any) -> loader.Objects:
        counter.wanted = [str(directory), list(programs), {name: list(sizes) for name, sizes in maps.items()}]
        counter.wanted += [dict(each) if isinstance(each, Mapping) else list(each) for each in more]
        taken = compiled.take(counter.wanted) if may_be_compiled else None
        return taken if taken is not None else await load(directory, programs, maps, *more)

    loader.load = looked_at


def serve() -> None:
    for number, line in enumerate(sys.stdin):
        request = json.loads(line)
        path = Path(f"{request['output']}.{number}")
        pid = os.fork()
        if pid == 0:
            _run(request, path)
        _answer({"pid": pid})
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = json.loads(path.read_text()) if path.exists() else {"count": 0, "ids": []}
        path.unlink(missing_ok=True)
        if (wanted := told.pop("wanted", None)) is not None and request["compiled"]:
            compiled.keep(wanted)
        _answer({"status": status, **told})


def _answer(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    # Who starts the tests in the background of a shell has them ignored (POSIX, 2.11), and children inherit that.
    for each in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(each, signal.SIG_DFL)
    serve()
