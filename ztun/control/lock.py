"""One instance at a time: a lock file beside the control socket, and one for the network namespace.

The first keeps two instances off the same control socket. The second keeps two with different sockets off the same
interfaces, routes and rules. Both are locked with flock(2), so they are free once the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from ztun.errors import ZtunError

# Only root writes here, so nobody else can keep an instance from starting.
NAMESPACE_DIRECTORY = Path("/run")


class AlreadyRunning(ZtunError):  # noqa: N818 (it reads as what it says)
    """Another instance holds the lock."""


class InstanceLock:
    """Held from before the first change until after the last one is undone."""

    def __init__(self, control_socket: str | Path) -> None:
        self.control_socket = Path(control_socket)
        self.path = lock_path(self.control_socket)
        self._held: list[tuple[int, Path]] = []
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock without waiting. Raises AlreadyRunning naming the holder, or ZtunError."""
        try:
            self._made = make_directories(self.path.parent)
            self._held.append((_lock_file(self.path), self.path))
            self._claim_namespace()
        except AlreadyRunning:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise ZtunError(
                f"cannot make the lock file {self.path}: {error.strerror}; set control.socket to a writable place"
            ) from error

    def _claim_namespace(self) -> None:
        path = namespace_lock_path()
        if path is not None and path != self.path:
            self._held.append((_lock_file(path, "in this network namespace "), path))

    def paths(self) -> list[Path]:
        """The files that are held; a killed process leaves them."""
        return [path for _, path in self._held]

    def release(self) -> None:
        """Give the lock back and remove what it left in the file system. Idempotent."""
        while self._held:
            fd, path = self._held.pop()
            # Unlinked while still locked: whoever opened this file meanwhile sees that it is gone and starts over.
            with suppress(OSError):
                path.unlink()
            os.close(fd)
        for directory in reversed(self._made):
            with suppress(OSError):
                directory.rmdir()
        self._made = []


def lock_path(control_socket: Path) -> Path:
    """The lock file that belongs to a control socket."""
    return control_socket.with_name(control_socket.name + ".lock")


def namespace_lock_path() -> Path | None:
    """The lock file that belongs to our network namespace; None where there are none, or no place for the file."""
    try:
        inode = os.stat("/proc/thread-self/ns/net").st_ino
    except OSError:
        return None
    return NAMESPACE_DIRECTORY / f"ztun-net-{inode}.lock" if os.access(NAMESPACE_DIRECTORY, os.W_OK) else None


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


def _lock_file(path: Path, where: str = "") -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise _already_running(holder, where) from None
        except OSError:
            os.close(fd)
            raise
        if _is_still_there(fd, path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd
        os.close(fd)  # the former holder removed it between our open and our lock


def _is_still_there(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _already_running(pid: str, where: str) -> AlreadyRunning:
    who = f"as pid {pid}" if pid else "(its pid is not known here)"
    return AlreadyRunning(f"already running {where}{who}; stop it with `ztun down` first")
