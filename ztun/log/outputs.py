"""Where lines go: standard error (the journal among others) or a file that rotates. Neither ever blocks or raises."""

from __future__ import annotations

import errno
import logging
import os
import select
import stat
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Protocol

from ztun.errors import ConfigError

_CHUNK = 4096  # PIPE_BUF: what a pipe with room for anything takes whole (pipe(7))

# sd-daemon(3): SD_DEBUG, SD_INFO, SD_WARNING, SD_ERR, SD_CRIT.
_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class Output(Protocol):
    """`write` takes a line without its end and returns whether it was taken; where not, `fault` says why."""

    fault: str | None

    def write(self, level: int, line: str) -> bool: ...

    def reopen(self) -> bool: ...

    def close(self) -> None: ...


class StreamOutput:
    """Standard error, whatever it is. A line that cannot be written at once is not written.

    with_priority: each line begins with "<N>", which the journal takes for its priority (sd-daemon(3)).
    """

    def __init__(self, fd: int, *, with_priority: bool = False) -> None:
        self.fault: str | None = None
        self._fd = _own_description(fd)
        self._is_own = self._fd != fd
        self._with_priority = with_priority
        self._is_torn = False
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def write(self, level: int, line: str) -> bool:
        if self._with_priority:
            mark = f"<{_PRIORITIES.get(level, 5)}>"
            line = mark + line.replace("\n", "\n" + mark)
        data = ("\n" + line if self._is_torn else line).encode(errors="backslashreplace") + b"\n"
        sent = 0
        try:
            while sent < len(data):
                if not self._poll.poll(0):
                    raise BlockingIOError
                sent += os.write(self._fd, data[sent : sent + _CHUNK])
        except BlockingIOError:
            self.fault = "nobody reads standard error"
        except OSError as error:
            self.fault = error.strerror or str(error)
        else:
            self.fault = None
            self._is_torn = False
            return True
        self._is_torn = self._is_torn or sent > 0
        return False

    def reopen(self) -> bool:
        """There is nothing to re-open."""
        return False

    def close(self) -> None:
        if self._is_own:
            os.close(self._fd)
            self._is_own = False


class FileOutput:
    """A file to append to. limit: bytes after which it is rotated, None for never; keep: how many old ones stay.

    A device or a named pipe is written to as well, but not rotated. Raises ConfigError when it cannot be opened.
    """

    def __init__(self, path: str | Path, *, limit: int | None = None, keep: int = 1) -> None:
        self.path = Path(path)
        self.fault: str | None = None
        self._limit = limit
        # Its part here is the renaming; it opens nothing itself.
        self._rotation = RotatingFileHandler(self.path, backupCount=keep, delay=True)
        self._is_torn = False
        self._is_regular = False
        self._size = 0
        try:
            self._fd = _open(self.path)
        except OSError as error:
            raise ConfigError(f"log.file: cannot write {self.path}: {error.strerror}") from None
        self._look()

    def write(self, level: int, line: str) -> bool:
        data = ("\n" + line if self._is_torn else line).encode(errors="backslashreplace") + b"\n"
        if self._limit is not None and self._is_regular and self._size + len(data) > self._limit:
            self._rotate()
        try:
            sent = os.write(self._fd, data)
        except OSError as error:
            self.fault = error.strerror or str(error)
            return False
        if sent < len(data):
            self._tear(sent)
            return False
        self.fault = None
        self._is_torn = False
        self._size += sent
        return True

    def reopen(self) -> bool:
        """Open the path anew, for who has renamed the file. The old file stays in use when that fails."""
        try:
            fd = _open(self.path)
        except OSError as error:
            self.fault = f"cannot be opened again: {error.strerror}"
            return False
        os.close(self._fd)
        self._fd = fd
        self._look()
        self.fault = None
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _look(self) -> None:
        status = os.fstat(self._fd)
        self._is_regular = stat.S_ISREG(status.st_mode)
        self._size = status.st_size if self._is_regular else 0

    def _rotate(self) -> None:
        self._size = os.fstat(self._fd).st_size  # somebody may have truncated it
        if self._size == 0 or self._limit is None or self._size < self._limit // 2:
            return
        try:
            self._rotation.doRollover()
        except OSError as error:
            self.fault = f"cannot be rotated: {error.strerror}"
            self._size = 0  # it is tried again after as many bytes
            return
        self.reopen()

    def _tear(self, sent: int) -> None:
        """Only the beginning of a line found room: take it back, so that every line in the file is whole."""
        self.fault = os.strerror(errno.ENOSPC) if self._is_regular else "nobody reads it"
        try:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - sent)
        except OSError:
            self._is_torn = True


def is_journal(fd: int, environment: str | None) -> bool:
    """Whether a descriptor leads to the journal. environment: of $JOURNAL_STREAM, "device:inode" (systemd.exec(5))."""
    device, _, inode = (environment or "").partition(":")
    try:
        status = os.fstat(fd)
        return (int(device), int(inode)) == (status.st_dev, status.st_ino)
    except (OSError, ValueError):
        return False


def _open(path: Path) -> int:
    """Without waiting for a reader of a named pipe, and without ever waiting for one later."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    return os.open(path, flags, 0o640)


def _own_description(fd: int) -> int:
    """A pipe or terminal opened anew, non-blocking: that flag of `fd` itself is shared with other programs.

    `fd` where that cannot be; poll(2) then says whether a write would block.
    """
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd)):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        pass
    return fd
