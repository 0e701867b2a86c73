"""What keeps two instances off each other: lock files in the file system, claims in the network namespace.

A lock file lies beside the control socket, another beside the store of Fake-IPs; they are locked with flock(2), so they
are free once the process ends, however it ends. What is claimed in the network namespace is in claims.py.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ztun import lockfiles
from ztun.control.claims import Claim, Claims
from ztun.errors import ZtunError

_UNKNOWN = "(its pid is not known here)"


class AlreadyRunning(ZtunError):  # noqa: N818 (it reads as what it says)
    """Another instance holds the lock. who: its pid, in words."""

    who = ""

    @classmethod
    def of(cls, pid: str) -> AlreadyRunning:
        """For a lock file in which `pid` stands."""
        error = cls(f"already running {f'as pid {pid}' if pid else _UNKNOWN}; stop it with `ztun down` first")
        error.who = f"pid {pid}" if pid else "its pid is not known here"
        return error


class InstanceLock:
    """Held from before the first change until after the last one is undone.

    store: the file of Fake-IPs, None where there is none; claims: what is needed of the network namespace.
    """

    def __init__(self, control_socket: str | Path, store: Path | None = None, claims: Iterable[Claim] = ()) -> None:
        self.control_socket = Path(control_socket)
        self.path = lock_path(self.control_socket)
        self._store = store
        self._wanted = tuple(claims)
        self._claims = Claims()
        self._held: list[tuple[int, Path]] = []
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take all of it without waiting. Raises AlreadyRunning naming the holder, or ZtunError."""
        try:
            self._made = make_directories(self.path.parent)
            self._held.append((_lock_file(self.path), self.path))
            self._claims.acquire(self._wanted)
            self._lock_store()
        except ZtunError:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise ZtunError(
                f"cannot make the lock file {self.path}: {error.strerror}; set control.socket to a writable place"
            ) from error

    def _lock_store(self) -> None:
        """Two that write one file would give a name's address to another name."""
        if self._store is None:
            return
        path = lock_path(self._store)
        try:
            self._made += make_directories(path.parent)
            self._held.append((_lock_file(path), path))
        except AlreadyRunning as error:
            raise AlreadyRunning(
                f"dns.fake_ip.store: {self._store} is in use by another ztun ({error.who}); choose another file"
            ) from None
        except OSError:
            pass  # what cannot be written is nobody's, and the store says so

    def paths(self) -> list[Path]:
        """The files that are held; a killed process leaves them."""
        return [path for _, path in self._held]

    def release(self) -> None:
        """Give the lock back and remove what it left in the file system. Idempotent."""
        lockfiles.remove(self._held)
        self._claims.release()
        for directory in reversed(self._made):
            with suppress(OSError):
                directory.rmdir()
        self._made = []


def lock_path(control_socket: Path) -> Path:
    """The lock file that belongs to a control socket, or to a store of Fake-IPs."""
    return control_socket.with_name(control_socket.name + ".lock")


def make_directories(path: Path) -> list[Path]:
    """Make `path` with its missing parents; returns those it made, outermost first. Raises OSError."""
    missing = []
    for directory in (path, *path.parents):
        if directory.exists():
            break
        missing.append(directory)
    missing.reverse()
    path.mkdir(mode=0o755, parents=True, exist_ok=True)
    return missing


def peer_pid(connection: socket.socket) -> int:
    """The process at the other end of a unix socket (SO_PEERCRED, unix(7)); 0 when the system does not say."""
    option = getattr(socket, "SO_PEERCRED", None)
    if option is None:
        return 0
    size = struct.calcsize("3i")
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, option, size))[0]
    return pid


def _lock_file(path: Path) -> int:
    try:
        fd = lockfiles.open_locked(path, 0o644)
    except lockfiles.HeldError as error:
        raise AlreadyRunning.of(error.holder) from None
    lockfiles.sign(fd)
    return fd
