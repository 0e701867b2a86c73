"""Names of this Mac itself: files in /etc/resolver, which send the queries for some domains to ztun (resolver(5)).

The file's name is the domain. Ours begin with a tag; a file of somebody else's is never touched. They are removed at
the end, and by the next start where a process was killed.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import structlog

from ztun.errors import ZtunError
from ztun.platform.darwin.instances import is_alive

log = structlog.get_logger("ztun.dns")

DIRECTORY = Path("/etc/resolver")
_TAG = re.compile(r"# made by ztun, pid (\d+), and removed when it stops")
_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")


class ResolverFiles:
    """Queries for `domains` and the names below them go to `server`, port 53."""

    def __init__(self, server: str, domains: Iterable[str], directory: Path | None = None) -> None:
        self._server = server
        self._domains = [domain for domain in dict.fromkeys(domains) if _DOMAIN.fullmatch(domain)]
        self._directory = directory or DIRECTORY
        self._made_directory = False

    def up(self) -> None:
        """Write the files. One of another program's stays as it is, with a warning. Raises ZtunError; none is left."""
        if not self._domains:
            return
        try:
            if not self._directory.is_dir():
                self._directory.mkdir(mode=0o755)
                self._made_directory = True
            for domain in self._domains:
                self._write(self._directory / domain)
        except OSError as error:
            self.down()
            raise ZtunError(f"cannot write {error.filename or self._directory}: {_say(error)}") from error

    def down(self) -> None:
        """Remove the files, and the directory if we made it. Idempotent."""
        for path, pid in _ours(self._directory):
            if pid == os.getpid():
                _remove(path)
        if self._made_directory:
            self._made_directory = False
            with suppress(OSError):  # somebody else uses it by now
                self._directory.rmdir()

    def _write(self, path: Path) -> None:
        if path.exists() and owner_of(path) is None:
            log.warning("this file of another program's keeps the names from ztun", path=str(path))
            return
        # Whole or not at all: mDNSResponder reads it as soon as it is there.
        fd, name = tempfile.mkstemp(prefix=".ztun-", dir=path.parent)
        with os.fdopen(fd, "w") as file:
            file.write(f"{tag(os.getpid())}\nnameserver {self._server}\n")
        os.chmod(name, 0o644)
        os.replace(name, path)


def tag(pid: int) -> str:
    """The first line of a file of ours."""
    return f"# made by ztun, pid {pid}, and removed when it stops"


def owner_of(path: Path) -> int | None:
    """The process that made a file of ours; None where it is not of ours."""
    try:
        with path.open(errors="replace") as file:
            found = _TAG.fullmatch(file.readline().rstrip("\n"))
    except OSError:
        return None
    return int(found[1]) if found is not None else None


def left_over(directory: Path | None = None) -> list[Path]:
    """The files of ours whose process is no more."""
    return [path for path, pid in _ours(directory) if not is_alive(pid)]


def sweep(directory: Path | None = None) -> list[str]:
    """Remove what was left over; returns a line for each."""
    return [f"resolver file {path}" for path in left_over(directory) if _remove(path)]


def _ours(directory: Path | None) -> list[tuple[Path, int]]:
    try:
        paths = sorted((directory or DIRECTORY).iterdir())
    except OSError:
        return []
    return [(path, pid) for path in paths if (pid := owner_of(path)) is not None]


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except OSError as error:
        log.warning("file not removed", path=str(path), error=str(error))
        return False
    return True


def _say(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
