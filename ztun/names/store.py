"""Fake-IP assignments in an sqlite3 file, so that a restart does not break clients that cached them.

Every assignment is committed before `save` returns: into the write-ahead log and so into the kernel's page cache, where
a kill -9 cannot reach it. That takes about ten microseconds, since in WAL mode with synchronous=NORMAL sqlite waits for
the disk only at a checkpoint (https://www.sqlite.org/wal.html). A power cut may cost the last few assignments.

The file is a convenience: whatever is wrong with it is said once, and the pool goes on without.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

_VERSION = 1
_SCHEMA = """
CREATE TABLE fake_ip (slot INTEGER PRIMARY KEY, name TEXT NOT NULL, sequence INTEGER NOT NULL);
PRAGMA user_version = 1;
"""
# A second instance is refused long before it comes here, so a lock can only be a person's sqlite3 shell.
_LOCK_WAIT_S = 0.05
_SIDE_FILES = ("", "-wal", "-shm")


class _UnusableError(Exception):
    """The file is there and can be read, but is not (or no longer) a store of ours."""


class SqliteNameStore:
    """A `NameStore` (ztun.ports) in the sqlite3 file `path`.

    say: takes one line when the file had to be moved aside or could not be used; the rest goes on without it. A file
    that is damaged or not ours is renamed to `path` + ".unusable" (an older one of that name is replaced).
    """

    def __init__(self, path: str, say: Callable[[str], None]) -> None:
        self.path = Path(path)
        self._say = say
        self._sequence = 0
        # What could not be written yet (disk full, locked), by slot; it is tried again with the next assignment.
        self._unsaved: dict[int, tuple[int, str, int]] = {}
        self._complained = False
        self._database: sqlite3.Connection | None = None
        try:
            self._database = self._open()
        except (_UnusableError, sqlite3.DatabaseError) as error:
            self._move_aside_and_retry(error)
        except OSError as error:
            self._give_up(error)

    def load(self) -> Mapping[int, str]:
        """Slot -> name, least recently used first. Empty when the file cannot be read."""
        if self._database is None:
            return {}
        try:
            rows = self._database.execute("SELECT slot, name FROM fake_ip ORDER BY sequence").fetchall()
        except sqlite3.Error as error:
            self._give_up(error)
            return {}
        return {slot: name for slot, name in rows if isinstance(slot, int) and isinstance(name, str)}

    def save(self, slot: int, name: str) -> None:
        """Remember that `name` has `slot`, as the most recently used one."""
        if self._database is None:
            return
        self._sequence += 1
        self._unsaved[slot] = (slot, name, self._sequence)
        try:
            self._write(self._database)
        except sqlite3.Error as error:
            self._complain(error)
        else:
            self._unsaved.clear()
            self._complained = False

    def close(self) -> None:
        """Close the file. Idempotent; what comes to `save` afterwards is not kept."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_LOCK_WAIT_S, isolation_level=None)  # None: autocommit
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version or tables:
            self._check(database, version)
        # Not before this: another program's database stays as it is.
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        if not version:
            database.executescript(_SCHEMA)

    def _check(self, database: sqlite3.Connection, version: int) -> None:
        if version != _VERSION:
            raise _UnusableError("it is a database of another program or version")
        # This reads every row there is, so it finds damage too.
        (self._sequence,) = database.execute("SELECT coalesce(max(sequence), 0) FROM fake_ip").fetchone()

    def _move_aside_and_retry(self, error: Exception) -> None:
        if isinstance(error, sqlite3.OperationalError) and not _is_damage(error):
            self._give_up(error)
            return
        aside = f"{self.path}.unusable"
        try:
            for suffix in _SIDE_FILES:
                file = Path(f"{self.path}{suffix}")
                if file.exists():
                    file.replace(f"{aside}{suffix}")
            self._database = self._open()
        except (OSError, sqlite3.Error, _UnusableError) as second:
            self._give_up(second)
            return
        self._say(
            f"dns.fake_ip.store: {self.path} cannot be used: {error}; moved to {aside}, starting with an empty one"
        )

    def _write(self, database: sqlite3.Connection) -> None:
        statement = "REPLACE INTO fake_ip VALUES (?, ?, ?)"
        if len(self._unsaved) == 1:
            database.execute(statement, *self._unsaved.values())
            return
        with database:
            database.execute("BEGIN")
            database.executemany(statement, self._unsaved.values())

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            self._say(f"dns.fake_ip.store: {self.path}: {error}; new Fake-IPs are not kept until this is mended")

    def _give_up(self, error: Exception) -> None:
        self.close()
        self._say(f"dns.fake_ip.store: {self.path}: {error}; Fake-IPs will not survive a restart")


def _is_damage(error: sqlite3.Error) -> bool:
    # The low byte is the primary code (https://www.sqlite.org/rescode.html). SQLITE_ERROR: no such table or column.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_ERROR,
    )
