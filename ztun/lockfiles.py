"""Files that are locked by who has something.

flock(2) gives the lock back with the process, however that ends. The file stays then; who looks sees that it is free.
`LockFiles` says who has what where there are no abstract names of sockets, as on macOS: a file for each thing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

LONGEST = 255  # bytes of a file's name (NAME_MAX)
_TRIES, _PAUSE = 5, 0.02  # seconds


class HeldError(BlockingIOError):
    """Somebody has it. holder: what the file says of him, his pid as a rule."""

    def __init__(self, holder: str) -> None:
        super().__init__(errno.EAGAIN, "somebody has locked it")
        self.holder = holder


def open_locked(path: Path, mode: int, *, create: bool = True) -> int:
    """Open the file and lock it; another one that took its place meanwhile is tried in its stead.

    mode: of a file that is made. Returns the descriptor. Raises HeldError, OSError.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)
    while True:
        fd = os.open(path, flags, mode)
        try:
            if not _lock(fd):
                raise HeldError(_text_in(fd))
            if is_still_there(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def is_still_there(fd: int, path: Path) -> bool:
    """Whether an open file is the one that is called so now."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def sign(fd: int) -> None:
    """Write who has it: our pid."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def remove(held: list[tuple[int, Path]]) -> None:
    """Remove files that we have locked, and give the locks back; `held` is empty then.

    A file goes while it is locked: whoever opened it meanwhile sees that it is gone and starts over.
    """
    while held:
        fd, path = held.pop()
        with suppress(OSError):
            path.unlink()
        os.close(fd)


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
            try:
                fd = open_locked(path, 0o644)
            except HeldError:
                time.sleep(_PAUSE)  # somebody may only look (`listed`)
                continue
            sign(fd)
            self._held.append((fd, path))
            return True
        return False

    def release(self) -> None:
        """Give all of it back, and remove the files while they are ours. Idempotent."""
        remove(self._held)
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


def _text_in(fd: int) -> str:
    return os.pread(fd, 32, 0).decode("ascii", "replace").strip()


def _pid_in(fd: int) -> int:
    text = _text_in(fd)
    return int(text) if text.isdigit() else 0
