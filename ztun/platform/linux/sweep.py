"""Finding and removing what killed instances left behind. Only what carries our tag, or stands in our state files.

An instance lives while it holds its state file's lock, or where its TUN exists: that goes with the process. What is
found is what is removed: `find_leftovers` gives the lines, `sweep` does the rest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from ztun.platform.linux import hooks, journal, netlink, policy, sysctl, xdp
from ztun.platform.linux.journal import Journal, Record

log = structlog.get_logger("ztun.app")


class Leftover(NamedTuple):
    """line: what it is, in the words of `ztun routes`; remove: does it."""

    line: str
    remove: Callable[[], object]


def find_leftovers() -> list[str]:
    """A line for each thing that a dead instance left in this network namespace. Changes nothing.

    Raises OSError when the kernel does not answer.
    """
    return _run(lambda ip: [each.line for each in chain(_in_kernel(ip, _owners()), _in_files(ip, tell=False))])


def recover(device: str) -> list[str]:
    """Put back what dead instances changed, before this process changes the same; returns a line for each.

    To be called once the journal of `device` is open. Filters, rules and routes are left to `sweep`: with
    `fail: closed` they keep shut what must not pass before the new ones do. Raises OSError.
    """
    own = journal.of(device)
    lines = _put_back(own.record)
    own.discard(list(own.record.sysctls))
    lines += _remove_files(own.record)
    return lines + _run(lambda ip: _remove_all(_in_files(ip, adopter=own)))


def sweep(device: str | None = None) -> list[str]:
    """Remove everything that belongs to no living instance; returns a line for each.

    device: the TUN of this process, whose own filters and rules stay; None when it has none. Raises OSError.
    """
    return _run(lambda ip: _remove_all(chain(_in_kernel(ip, _owners(device)), _in_files(ip))))


def _run(action: Callable[[Any], list[str]]) -> list[str]:
    try:
        return netlink.run(action)
    except netlink.NetlinkError as error:
        raise OSError(max(error.code, 0), f"rtnetlink: {netlink.explain(error)}") from error


class _Owners(NamedTuple):
    """living: TUNs whose instances live, our own among them; own: the journal of this process."""

    living: frozenset[str]
    own: Journal | None

    def owns_filter(self, index: int, found: hooks.Filter) -> bool:
        if self.own is not None and found.device == self.own.record.device:
            return (index, found.parent) in self.own.attached
        return found.device in self.living

    def tables(self) -> set[int]:
        devices = set(self.living)
        if self.own is not None and not self.own.has_policy:
            devices.discard(self.own.record.device)
        return {number for name in devices for number in (policy.table_of(name), policy.dns_table_of(name))}


def _owners(device: str | None = None) -> _Owners:
    living = {name for _, name in socket.if_nameindex()}
    living |= {
        found.record.device
        for found in journal.find_all()
        if found.alive and found.record is not None and found.is_here()
    }
    return _Owners(frozenset(living), journal.of(device) if device is not None else None)


def _in_kernel(ip: Any, owners: _Owners) -> Iterator[Leftover]:
    """ip rules and routes first: their absence alone lets a client's packets pass."""
    tables = owners.tables()
    for table, installed in policy.find_policy(ip).items():
        if table not in tables:
            yield Leftover("; ".join(installed.describe(table)), partial(policy.remove_installed, ip, installed, table))
    for index, ifname in hooks.with_clsact(ip):
        for found in hooks.find_filters(ip, index):
            if not owners.owns_filter(index, found):
                remove = partial(hooks.remove_filters, ip, index, found.device, [found.parent])
                yield Leftover(f"tc filter {found.name} on {ifname}", remove)
    for index, ifname in xdp.find_dead(ip, owners.living):
        yield Leftover(f"XDP program on {ifname}", partial(xdp.remove, ip, index))
    if owners.own is not None:
        yield from _unused_qdiscs(ip, owners.own)


def _unused_qdiscs(ip: Any, own: Journal) -> Iterator[Leftover]:
    """Those that our journal took over, and on which we have nothing."""
    for index, ifname in list(own.record.qdiscs.items()):
        if not any(index == at for at, _ in own.attached):
            if hooks.is_unused_qdisc(ip, index):
                yield Leftover(f"clsact qdisc on {ifname}", partial(hooks.remove_unused_qdisc, ip, index))
            own.discard_qdisc(index)


def _in_files(ip: Any, adopter: Journal | None = None, *, tell: bool = True) -> Iterator[Leftover]:
    """What the state files of dead instances tell of. adopter: takes their qdiscs over, to be removed later.

    tell: of files that are none of ours.
    """
    for found in journal.find_all():
        if found.record is None:
            if tell:
                log.warning("not a state file of ztun's, left alone", file=str(found.path), reason=found.problem)
            continue
        if found.alive:
            continue
        if found.is_here():
            for line in _lines(ip, found.record, adopter):
                yield Leftover(line, _nothing)
            yield Leftover(f"state file {found.path}", partial(_clear_up, ip, found.path, adopter))
        elif found.record.boot != journal.boot_id():
            yield Leftover(f"state file {found.path}, of an earlier boot", partial(_forget, found.path))


def _lines(ip: Any, record: Record, adopter: Journal | None) -> Iterator[str]:
    for key, value in sysctl.sort_out(record.sysctls)[0]:
        yield f"sysctl {sysctl.dotted(key)}, which was {value}"
    if adopter is None:
        for index, ifname in record.qdiscs.items():
            if hooks.is_unused_qdisc(ip, index):
                yield f"clsact qdisc on {ifname}"
    for name in record.files:
        if _is_dead(Path(name)):
            yield f"file {name}"


def _clear_up(ip: Any, path: Path, adopter: Journal | None) -> None:
    """Undo what one file tells of, and remove it at last: killed on the way, the next one finds the rest."""
    with journal.taken_over(path) as record:
        if record is None:
            return
        _put_back(record)
        for index, ifname in record.qdiscs.items():
            if adopter is not None:
                adopter.add_qdisc(index, ifname)
            else:
                hooks.remove_unused_qdisc(ip, index)
        _remove_files(record)
        _forget(path, record)


def _remove_files(record: Record) -> list[str]:
    removed = []
    for name in record.files:
        if _is_dead(Path(name)):
            with suppress(OSError):
                os.unlink(name)
                removed.append(f"file {name}")
    return removed


def _forget(path: Path, record: Record | None = None) -> None:
    with suppress(OSError):
        path.with_name(path.name + ".new").unlink()
    journal.remove(path, record if record is not None else Record(""))


def _put_back(record: Record) -> list[str]:
    done = sysctl.put_back(record.sysctls)
    for key in done.left:
        log.warning(
            "setting left as it is: somebody else changed it since", sysctl=sysctl.dotted(key), value=sysctl.read(key)
        )
    return [f"sysctl {sysctl.dotted(key)}, now {sysctl.read(key)} again" for key in done.restored]


def _is_dead(path: Path) -> bool:
    """Whether a socket or lock file is nobody's any more. Anything else is not ours."""
    try:
        mode = path.stat(follow_symlinks=False).st_mode
    except OSError:
        return False
    if stat.S_ISSOCK(mode):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            return probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
    if not (stat.S_ISREG(mode) and path.suffix == ".lock"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _nothing() -> None:
    """Done with the file that tells of it."""


def _remove_all(found: Iterable[Leftover]) -> list[str]:
    lines = []
    for each in found:
        each.remove()
        lines.append(each.line)
    return lines
