"""The state file: what an instance changes that outlives its process, written down before it is changed.

A TUN, TCX links and routes into the TUN go with the process. Sysctls and clsact qdiscs stay, and nothing about them
says whose they are or what was there before; so that is kept in /run/ztun. The file is locked (flock(2)) by its owner:
the lock goes with the process, however that ends, and a file that nobody locks is that of a dead instance.

Each change of the record is a new file, locked before it takes the place of the old one (rename(2)), so a reader finds
a whole record or none. Where the file cannot be written, that is said once, and everything else goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from ztun import lockfiles
from ztun.errors import ZtunError

log = structlog.get_logger("ztun.app")

DIRECTORY = Path("/run/ztun")
SUFFIX = ".state"
_VERSION = 1
_MOST_BYTES = 1 << 22
_PATIENCE = 10
_MODE = 0o600
_SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
# Keys of /proc/sys/net that ztun may have written; nothing else is believed of a file.
_KEY = re.compile(r"ipv[46]/(?:[a-z0-9_]+|(?:conf|neigh)/(?!\.{1,2}/)[^/\s]{1,15}/[a-z0-9_]+)")


class Change(NamedTuple):
    """One sysctl: its key below /proc/sys/net, what it was, what we write, and the interface's index; 0 for none."""

    key: str
    before: str
    after: str
    ifindex: int


@dataclass
class Record:
    """What one instance did. boot, netns: where its numbers mean something; started: of its process, in clock ticks.

    files: what else it has in the file system; qdiscs: index and name of interfaces to which it gave a clsact qdisc;
    made_directory: whether DIRECTORY was not there before.
    """

    device: str
    pid: int = 0
    started: int = 0
    boot: str = ""
    netns: int = 0
    files: list[str] = field(default_factory=list)
    sysctls: list[Change] = field(default_factory=list)
    qdiscs: dict[int, str] = field(default_factory=dict)
    made_directory: bool = False


class Journal:
    """The record of this process. Before `open`, and where there is no place for a file, it is in memory only.

    attached: (interface index, tc parent) of filters that are ours now; has_policy: whether ip rules and tables are.
    """

    def __init__(self, device: str) -> None:
        self.record = Record(device)
        self.attached: set[tuple[int, int]] = set()
        self.has_policy = False
        self._path: Path | None = None
        self._fd = -1
        self._has_told = False

    def open(self, files: Iterable[str | Path] = ()) -> Record | None:
        """Begin the file, taking over what a dead instance of this name wrote into it. Returns that one's record.

        Raises ZtunError when an instance of this name lives. files: see Record.
        """
        record = self.record
        record.pid, record.started = os.getpid(), _start_time()
        record.boot, record.netns = boot_id(), network_namespace()
        record.files = [str(path) for path in files]
        path = path_of(record.device, record.netns)
        try:
            record.made_directory = _make(path.parent)
            self._fd = _lock_patiently(path)
        except BlockingIOError:
            raise ZtunError(f"another ztun has tun.name {record.device}: stop it with `ztun down`") from None
        except OSError as error:
            self._tell(error, path)
            return None
        self._path = path
        dead = None
        try:
            dead = _read(self._fd, path)
        except ValueError as error:
            log.warning("not a state file of ztun's, written anew", file=str(path), reason=str(error))
        if dead is not None and (dead.boot, dead.netns) != (record.boot, record.netns):
            if dead.boot:
                log.info("the state file is of another time, not used", file=str(path))
            dead = None
        if dead is not None:
            record.sysctls, record.qdiscs = list(dead.sysctls), dict(dead.qdiscs)
            record.files += [name for name in dead.files if name not in record.files]
            record.made_directory |= dead.made_directory
        self.save()
        return dead

    def add(self, change: Change) -> None:
        """To be called before the change is made."""
        self.record.sysctls.append(change)
        self.save()

    def discard(self, changes: Iterable[Change]) -> None:
        """To be called when the changes are undone, or were not made after all."""
        gone = set(changes)
        self.record.sysctls = [change for change in self.record.sysctls if change not in gone]
        self.save()

    def add_qdisc(self, index: int, ifname: str) -> None:
        """To be called before the qdisc is made."""
        self.record.qdiscs[index] = ifname
        self.save()

    def discard_qdisc(self, index: int) -> None:
        """To be called when it is gone, or was not ours after all."""
        if self.record.qdiscs.pop(index, None) is not None:
            self.save()

    def save(self) -> None:
        """Write the record. Never raises: what cannot be written is said once."""
        if self._path is None:
            return
        fresh = self._path.with_name(self._path.name + ".new")
        try:
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _write_all(fd, json.dumps({"version": _VERSION, **asdict(self.record)}).encode())
                os.rename(fresh, self._path)
            except BaseException:
                os.close(fd)
                with suppress(OSError):
                    fresh.unlink()
                raise
        except OSError as error:
            self._tell(error, self._path)
            return
        os.close(self._fd)
        self._fd = fd

    def _tell(self, error: OSError, path: Path) -> None:
        if not self._has_told:
            self._has_told = True
            log.warning(
                "no state file: what is changed now is not put back should ztun be killed",
                file=str(path),
                reason=(error.strerror or str(error)).lower(),
            )

    def close(self) -> None:
        """Remove the file, unless something in it could not be undone: then it waits for a sweep. Idempotent."""
        if self._path is None:
            return
        path, self._path = self._path, None
        if not (self.record.sysctls or self.record.qdiscs):
            remove(path, self.record)
        os.close(self._fd)
        self._fd = -1


_of_this_process: dict[str, Journal] = {}


def of(device: str) -> Journal:
    """This process's journal for the TUN `device`: in memory only, unless somebody opened it."""
    return _of_this_process.setdefault(device, Journal(device))


class Found(NamedTuple):
    """A state file. alive: whether its instance is; record: None when it is none of ours; problem: why."""

    path: Path
    record: Record | None
    alive: bool
    problem: str = ""

    def is_here(self) -> bool:
        """Whether it speaks of this network namespace since this boot."""
        return self.record is not None and (self.record.boot, self.record.netns) == (boot_id(), network_namespace())


def find_all() -> list[Found]:
    """Every state file of this machine, by name."""
    return [found for path in sorted(_listing()) if (found := _look(path)) is not None]


@contextmanager
def taken_over(path: Path) -> Iterator[Record | None]:
    """The record of a dead instance, which nobody else can take meanwhile; None when it lives, or is gone."""
    try:
        fd = _lock_patiently(path, create=False)
    except OSError:
        yield None
        return
    record = None
    try:
        with suppress(ValueError):
            record = _read(fd, path)
        yield record
    finally:
        os.close(fd)


def remove(path: Path, record: Record) -> None:
    """Remove a state file, and the directory if it was made for it and is empty."""
    with suppress(OSError):
        path.unlink()
    if record.made_directory:
        with suppress(OSError):
            path.parent.rmdir()


def path_of(device: str, netns: int) -> Path:
    """The state file of the TUN `device` in a network namespace."""
    return DIRECTORY / f"{device}-{netns}{SUFFIX}"


def boot_id() -> str:
    """Another one after each boot (random(4)); empty where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def network_namespace() -> int:
    """A number that no other network namespace has, or had since the boot; before Linux 5.14 its inode."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe, suppress(OSError):
        cookie: int = struct.unpack("=Q", probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0]
        return cookie
    try:
        return os.stat("/proc/thread-self/ns/net").st_ino
    except OSError:
        return 0


def _start_time() -> int:
    """Field 22 of proc_pid_stat(5), counted behind the name, which may have spaces."""
    try:
        return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _listing() -> list[Path]:
    try:
        return list(DIRECTORY.glob(f"*{SUFFIX}"))
    except OSError:
        return []


def _look(path: Path) -> Found | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        alive = False
        try:
            # Shared, so that two who look at the same time do not take each other for the owner.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            alive = True
        alive = alive or not lockfiles.is_still_there(fd, path)
        try:
            return Found(path, _read(fd, path), alive)
        except ValueError as error:
            return Found(path, None, alive, str(error))
    except OSError:
        return None
    finally:
        os.close(fd)


def _make(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o755)
    except FileExistsError:
        return False
    return True


def _lock_patiently(path: Path, *, create: bool = True) -> int:
    """As `lockfiles.open_locked`; somebody who only looks is gone in a moment."""
    for _ in range(_PATIENCE):
        with suppress(lockfiles.HeldError):
            return lockfiles.open_locked(path, _MODE, create=create)
        time.sleep(0.01)
    return lockfiles.open_locked(path, _MODE, create=create)


def _read(fd: int, path: Path) -> Record:
    """The record of an open file, one of no time if it is empty. Raises ValueError, why it is not ours, or OSError."""
    owner = os.fstat(fd).st_uid
    if owner not in (0, os.geteuid(), path.parent.stat().st_uid):
        raise ValueError("it belongs to another user")
    data = os.pread(fd, _MOST_BYTES, 0)
    if not data:  # killed before the first word
        return Record(path.name.rpartition("-")[0])
    try:
        record = _parse(json.loads(data))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(repr(error)) from error
    if owner not in (0, os.geteuid()):
        # A user of its own cannot have us remove what that user could not: in a directory that is theirs they can.
        record.files = [name for name in record.files if Path(name).parent == path.parent]
    return record


def _parse(found: dict[str, Any]) -> Record:
    """Raises ValueError, KeyError, TypeError or AttributeError for anything that `Journal.save` would not write."""
    if found.pop("version") != _VERSION:
        raise ValueError("of another version")
    record = Record(**found)
    changes = [Change(str(key), str(before), str(after), int(index)) for key, before, after, index in record.sysctls]
    for change in changes:
        if not _KEY.fullmatch(change.key):
            raise ValueError(f"{change.key!r} is no sysctl of ours")
    record.sysctls = changes
    record.qdiscs = {int(index): str(ifname) for index, ifname in record.qdiscs.items()}
    record.files = [str(name) for name in record.files]
    record.device, record.made_directory = str(record.device), bool(record.made_directory)
    return record


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
