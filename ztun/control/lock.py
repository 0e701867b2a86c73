"""One instance at a time: a lock file beside the control socket, and a name in the network namespace.

The file keeps two instances off the same control socket. The name, an abstract unix address (unix(7); such addresses
belong to the network namespace), keeps two instances with different sockets off the same interfaces, routes and rules:
each would take the other's for left-overs and remove them. Both locks vanish with the process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from pathlib import Path

from ztun.errors import ZtunError

NAMESPACE_ADDRESS = "\0ztun-instance"


class AlreadyRunning(ZtunError):  # noqa: N818 (it reads as what it says)
    """Another instance holds the lock."""


class InstanceLock:
    """Held from before the first change until after the last one is undone."""

    def __init__(self, control_socket: str | Path) -> None:
        self.control_socket = Path(control_socket)
        self.path = lock_path(self.control_socket)
        self._fd = -1
        self._namespace: socket.socket | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock without waiting. Raises AlreadyRunning naming the holder, or ZtunError."""
        try:
            self._made = make_directories(self.path.parent)
            self._fd = _lock_file(self.path)
            self._namespace = _claim_namespace()
        except AlreadyRunning:
            self.release()
            raise
        except OSError as error:
            self.release()
            raise ZtunError(
                f"cannot make the lock file {self.path}: {error.strerror}; set control.socket to a writable place"
            ) from error

    def release(self) -> None:
        """Give the lock back and remove what it left in the file system. Idempotent."""
        if self._namespace is not None:
            self._namespace.close()
            self._namespace = None
        if self._fd >= 0:
            # Unlinked while still locked: whoever opened this file meanwhile sees that it is gone and starts over.
            with suppress(OSError):
                self.path.unlink()
            os.close(self._fd)
            self._fd = -1
        for directory in reversed(self._made):
            with suppress(OSError):
                directory.rmdir()
        self._made = []


def lock_path(control_socket: Path) -> Path:
    """The lock file that belongs to a control socket."""
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
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise _already_running(holder) from None
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


def _claim_namespace() -> socket.socket | None:
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(NAMESPACE_ADDRESS)
        claim.listen(1)
    except OSError as error:
        claim.close()
        if error.errno == errno.EADDRINUSE:
            raise _already_running(_namespace_holder(), "in this network namespace ") from None
        return None  # no abstract addresses on this system
    return claim


def _namespace_holder() -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, suppress(OSError):
        probe.setblocking(False)
        probe.connect(NAMESPACE_ADDRESS)
        return str(peer_pid(probe) or "")
    return ""


def _already_running(pid: str, where: str = "") -> AlreadyRunning:
    who = f"as pid {pid}" if pid and pid != "0" else "(its pid is not known here)"
    return AlreadyRunning(f"already running {where}{who}; stop it with `ztun down` first")
