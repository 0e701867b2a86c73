"""Who has what, where there are no abstract names of sockets, as on macOS: a locked file for each thing.

flock(2) gives the lock back with the process, however that ends. The file stays then; who looks sees that it is free.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

LONGEST = 255  # bytes of a file's name (NAME_MAX)
_TRIES, _PAUSE = 5, 0.02  # seconds


class LockFiles:
    """Those of this process, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._held: list[tuple[int, Path]] = []

    def acquire(self, kind: str, value: str) -> bool:
        """Take it; whether nobody else has it. Raises OSError when the file cannot be made."""
        name = f"{kind}.{quote(value, safe='')}"
        if len(name) > LONGEST:
            return True
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        path = self._directory / name
        for _ in range(_TRIES):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            if _lock(fd) and _is_still_there(fd, path):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                self._held.append((fd, path))
                return True
            os.close(fd)
            time.sleep(_PAUSE)  # its holder removed it since we opened it, or somebody only looks (`listed`)
        return False

    def release(self) -> None:
        """Give all of it back, and remove the files while they are ours. Idempotent."""
        while self._held:
            fd, path = self._held.pop()
            with suppress(OSError):
                path.unlink()
            os.close(fd)
        with suppress(OSError):  # others have theirs there
            self._directory.rmdir()


def listed(directory: Path) -> Iterator[tuple[str, str, int]]:
    """(kind, value, pid) of everything that a living process has; pid: 0 where it does not say."""
    with suppress(OSError):
        for path in sorted(directory.iterdir()):
            kind, _, value = path.name.partition(".")
            with suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    if not _lock(fd, shared=True):
                        yield kind, unquote(value), _pid_in(fd)
                finally:
                    os.close(fd)


def _lock(fd: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_in(fd: int) -> int:
    text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
    return int(text) if text.isdigit() else 0


def _is_still_there(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
