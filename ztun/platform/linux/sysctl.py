"""Kernel settings under /proc/sys/net, remembered so that they can be put back."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from ztun.platform.linux import links
from ztun.platform.linux.journal import Change, Journal

log = structlog.get_logger("ztun.app")

_ROOT = Path("/proc/sys/net")
_OF_INTERFACES = ("conf", "neigh")
_OF_NONE = ("all", "default")
_RENAMES = 3  # of one interface while its settings are put back
_PATIENCE = 20  # milliseconds


def read(key: str) -> str | None:
    """The value of a key such as "ipv4/conf/all/rp_filter"; None where the kernel does not have it."""
    try:
        return (_ROOT / key).read_text().strip()
    except OSError:
        return None


class Sysctls:
    """Settings changed by us. `restore` puts back what was there, last change first; twice does no harm.

    journal: where changes are written down before they are made.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal if journal is not None else Journal("")
        self._changes: list[Change] = []

    def set(self, key: str, value: str) -> bool:
        """Set one key. False when the kernel does not have it or does not let us."""
        before = _read_when_there(key)
        if before is None:
            return False
        if before == value:
            return True
        change = self._note(key, before, value)
        try:
            (_ROOT / key).write_text(value)
        except OSError:
            self._drop([change])
            return False
        return True

    def keep(self, key: str, becomes: str) -> None:
        """Put this key back too, though something else is going to change it to `becomes`."""
        before = read(key)
        if before is not None:
            self._note(key, before, becomes)

    def let_go(self, ifname: str, now: str | None) -> None:
        """Put back the settings of one interface, which is called `now` by now; None when it is gone."""
        ours = [change for change in self._changes if f"/{ifname}/" in change.key]
        if now is not None:
            put_back(ours)
        self._drop(ours)

    def changes(self) -> list[str]:
        """The keys that differ now because of us, with their values: "ipv4.ip_forward = 1"."""
        keys = dict.fromkeys(change.key for change in self._changes)
        return [f"{dotted(key)} = {read(key)}" for key in keys]

    def describe(self) -> list[dict[str, str | None]]:
        """[{"key", "before", "now"}], keys as sysctl(8) writes them."""
        first: dict[str, str] = {}  # what was there before our first change
        for change in self._changes:
            first.setdefault(change.key, change.before)
        return [{"key": dotted(key), "before": before, "now": read(key)} for key, before in first.items()]

    def restore(self) -> None:
        for key in put_back(self._changes).left:
            log.warning("setting left as it is: somebody else changed it", sysctl=dotted(key), value=read(key))
        self._drop(list(self._changes))

    def _note(self, key: str, before: str, after: str) -> Change:
        change = Change(key, before, after, _index_of(key))
        self._changes.append(change)
        self._journal.add(change)
        return change

    def _drop(self, changes: Sequence[Change]) -> None:
        if changes:
            gone = set(changes)
            self._changes = [change for change in self._changes if change not in gone]
            self._journal.discard(gone)


class PutBack(NamedTuple):
    """restored: keys that have their old value again; left: keys that somebody else set to something since."""

    restored: list[str]
    left: list[str]


def put_back(changes: Iterable[Change]) -> PutBack:
    """Undo the changes, the last first, where the value is still ours and the interface still there."""
    changes = list(changes)
    restored: list[str] = []
    for _ in range(_RENAMES):
        todo, left = sort_out(changes)
        written = [key for key, value in reversed(todo) if _write(key, value)]
        restored += reversed(written)
        if len(written) == len(todo):
            break  # else an interface is gone or got another name since we asked for it
    return PutBack(restored, left)


def sort_out(changes: Iterable[Change]) -> tuple[list[tuple[str, str]], list[str]]:
    """What `put_back` would write, (key as it is called now, value) in the order of the changes; and what it leaves."""
    by_key: dict[str, list[Change]] = {}
    for change in changes:
        by_key.setdefault(change.key, []).append(change)
    todo: list[tuple[str, str]] = []
    left = []
    for key, ours in by_key.items():
        name, before = _name_now(ours[-1]), ours[0].before
        value = _read_when_there(name) if name is not None else None
        if name is None or value is None:
            continue  # gone with its interface
        # What is written to `all` is written to each interface, so half an undoing shows there as well.
        undone = {by_key[of_all][0].before} if (of_all := _key_of("all", key)) in by_key else set()
        if value in {ours[-1].after} | undone:
            todo.append((name, before))
        elif value != before:
            left.append(name)
    return todo, left


def _key_of(name: str, key: str) -> str:
    """The same setting of `name`: an interface, or all, or default. Empty when it is none of interfaces."""
    parts = key.split("/")
    return "/".join([*parts[:2], name, *parts[3:]]) if len(parts) == 4 else ""


def dotted(key: str) -> str:
    """A key as sysctl(8) prints it. Dots in a name become slashes, as there."""
    return key.translate(str.maketrans("./", "/."))


def _read_when_there(key: str) -> str | None:
    """As `read`; who hears of an interface's name may be earlier than its settings, which are moved to that name after
    all have been told (NETDEV_CHANGENAME in net/ipv4/devinet.c and net/ipv6/addrconf.c).
    """
    value = read(key)
    for _ in range(_PATIENCE):
        if value is not None or read(_key_of("default", key)) is None:
            break
        time.sleep(0.001)
        value = read(key)
    return value


def _index_of(key: str) -> int:
    parts = key.split("/")
    if len(parts) != 4 or parts[1] not in _OF_INTERFACES or parts[2] in _OF_NONE:
        return 0
    return links.index_of(parts[2]) or 0


def _name_now(change: Change) -> str | None:
    """The key under the name that its interface has now; None when that is gone, or another has its name."""
    if not change.ifindex:
        return change.key
    try:
        name = socket.if_indextoname(change.ifindex)
    except OSError:
        return None
    return _key_of(name, change.key)


def _write(key: str, value: str) -> bool:
    try:
        (_ROOT / key).write_text(value)
    except OSError:
        return False
    return True
