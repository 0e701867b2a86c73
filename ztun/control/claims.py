"""What two instances in one network namespace cannot share: names, interfaces, addresses. First come, first served.

Each claim is a Unix socket with an abstract name (unix(7)): such names belong to the network namespace, one socket has
each, and it goes with its process, however that ends. /proc/net/unix lists them, so that a second instance can say whom
it is in the way of. macOS has neither network namespaces nor abstract names: there each claim is a locked file.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from ipaddress import ip_network
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ztun import lockfiles
from ztun.defaults import DEFAULTS
from ztun.errors import ZtunError

if TYPE_CHECKING:
    from ztun.config import Settings

_PREFIX = "ztun/1/"
_LONGEST = 107  # bytes of sun_path behind the zero that makes a name abstract
_TABLE = Path("/proc/thread-self/net/unix")
FILES = DEFAULTS.claims  # in the place of abstract names
CONTROL, RANGE = "control", "fake-ip"


class Claim(NamedTuple):
    """key: where the configuration says it; remedy: what somebody who gets it not may do instead."""

    kind: str
    value: str
    key: str
    remedy: str


class Holder(NamedTuple):
    """Who has a claim. pid: 0 where that is not known here, as for a process of another pid namespace."""

    kind: str
    value: str
    pid: int


class Claimed(ZtunError):  # noqa: N818 (it reads as what it says)
    """Another instance has it."""


def claims_of(settings: Settings) -> Iterator[Claim]:
    """Everything that an instance with these settings needs for itself."""
    if settings.tun.name != DEFAULTS.any_device:
        yield Claim("tun", settings.tun.name, "tun.name", "choose another name")
    for name in settings.capture.lan:
        yield Claim("lan", name, "capture.lan", "an interface belongs to one instance only, leave it out of one")
    if settings.capture.host:
        yield Claim("host", "this host's own traffic", "capture.host", "only one instance can capture it")
    fake = settings.dns.fake_ip
    for key, network in (("range", fake.range), ("range6", fake.range6)):
        if network is not None:
            yield Claim(RANGE, str(network), f"dns.fake_ip.{key}", "give each a range of its own")
    if "listen" in settings.dns.model_fields_set:
        for text in settings.dns.listen:
            yield Claim("dns", text, "dns.listen", "choose another address or port")
    yield Claim(CONTROL, str(settings.control.socket), "control.socket", "choose another path")


def _halves(one: str, other: str) -> str:
    """How two could share the wider of two ranges."""
    wider = min(ip_network(one), ip_network(other), key=lambda network: network.prefixlen)
    halves = wider.subnets() if wider.prefixlen < wider.max_prefixlen else ()
    return ", as " + " and ".join(str(half) for half in halves) if halves else ""


class Claims:
    """Those of this process."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}
        self._files = lockfiles.LockFiles(FILES) if FILES is not None else None

    def acquire(self, claims: Iterable[Claim]) -> None:
        """Claim all of it or nothing. Raises Claimed in one line that names who has it."""
        try:
            for claim in claims:
                self._acquire(claim)
        except BaseException:
            self.release()
            raise

    def _acquire(self, claim: Claim) -> None:
        if self._files is not None:
            self._acquire_file(self._files, claim)
            return
        name = _PREFIX + f"{claim.kind}/{claim.value}"
        if not _TABLE.exists() or len(os.fsencode(name)) > _LONGEST:
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.bind(b"\0" + os.fsencode(name))
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise ZtunError(f"{claim.key}: cannot claim {claim.value}: {error.strerror}") from error
            _refuse(claim, [one for one in holders() if one[:2] == claim[:2]] or [Holder(*claim[:2], 0)])
            return
        self._held[name] = sock
        if claim.kind == RANGE:
            mine = {os.fstat(held.fileno()).st_ino for held in self._held.values()}
            others = [one for one in _listed() if one.inode not in mine and _overlap(claim, one.kind, one.value)]
            _refuse(claim, _with_pids(others))

    def _acquire_file(self, files: lockfiles.LockFiles, claim: Claim) -> None:
        try:
            is_ours = files.acquire(claim.kind, claim.value)
        except OSError as error:
            raise ZtunError(f"{claim.key}: cannot claim {claim.value}: {error.strerror}") from error
        others = [one for one in holders() if one.pid != os.getpid()]
        if not is_ours:
            _refuse(claim, [one for one in others if one[:2] == claim[:2]] or [Holder(*claim[:2], 0)])
        _refuse(claim, [one for one in others if _overlap(claim, one.kind, one.value)])

    def release(self) -> None:
        """Give all of it back. Idempotent."""
        if self._files is not None:
            self._files.release()
        while self._held:
            self._held.popitem()[1].close()


def conflicts(claims: Iterable[Claim], own: int | None) -> list[str]:
    """A line for each claim that another instance than the process `own` stands in the way of. Claims nothing."""
    others, found = [one for one in holders() if one.pid != own], []
    for claim in claims:
        try:
            _refuse(claim, [one for one in others if one[:2] == claim[:2] or _overlap(claim, one.kind, one.value)])
        except Claimed as problem:
            found.append(str(problem))
    return found


def _overlap(claim: Claim, kind: str, value: str) -> bool:
    if kind != RANGE:
        return False
    with suppress(ValueError):
        left, right = ip_network(claim.value), ip_network(value)
        return left.version == right.version and left.overlaps(right)
    return False


def _refuse(claim: Claim, found: Iterable[Holder]) -> None:
    """Raise Claimed if one of them is an instance of ztun; anybody may have taken the name of a socket."""
    for holder in found:
        if holder.pid and not _may_be_ztun(holder.pid):
            continue
        what = claim.value if claim.value == holder.value else f"{claim.value} overlaps {holder.value}, which"
        remedy = claim.remedy + (_halves(claim.value, holder.value) if claim.kind == RANGE else "")
        raise Claimed(f"{claim.key}: {what} is in use by another ztun{_who(holder.pid)}; {remedy}")


def _may_be_ztun(pid: int) -> bool:
    """Only root, or who may do as much as we, runs an instance."""
    with suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid in (0, os.geteuid())
    return True


def _who(pid: int) -> str:
    if not pid:
        return " (its pid is not known here)"
    path = next((one.value for one in holders() if one.pid == pid and one.kind == CONTROL), None)
    return f" (pid {pid}, --socket {path})" if path is not None else f" (pid {pid})"


def holders() -> list[Holder]:
    """All claims of this network namespace, our own among them."""
    if FILES is not None:
        return [Holder(*one) for one in lockfiles.listed(FILES)]
    return _with_pids(_listed())


class _Listed(NamedTuple):
    """A claim as the kernel lists it. inode: of its socket."""

    kind: str
    value: str
    inode: int


def _listed() -> list[_Listed]:
    found = []
    with suppress(OSError):
        for line in _TABLE.read_text(errors="surrogateescape").splitlines()[1:]:
            fields = line.split(maxsplit=7)
            if len(fields) == 8 and fields[7].startswith(f"@{_PREFIX}"):
                kind, _, value = fields[7].removeprefix(f"@{_PREFIX}").partition("/")
                found.append(_Listed(kind, value, int(fields[6])))
    return found


def _with_pids(listed: Iterable[_Listed]) -> list[Holder]:
    """Looks at every descriptor of every process, if there is anything to look for."""
    entries = list(listed)
    pids = _owners({f"socket:[{entry.inode}]" for entry in entries}) if entries else {}
    return [Holder(entry.kind, entry.value, pids.get(f"socket:[{entry.inode}]", 0)) for entry in entries]


def _owners(inodes: set[str]) -> dict[str, int]:
    """Socket, as links in /proc/PID/fd show it -> who has it open."""
    owners: dict[str, int] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for fd in os.scandir(directory / "fd"):
                with suppress(OSError):
                    target = os.readlink(fd.path)
                    if target in inodes:
                        owners[target] = int(directory.name)
    return owners


def sockets_in_use() -> list[tuple[str, int]]:
    """(control socket, pid) of each instance that runs in this network namespace."""
    return sorted((one.value, one.pid) for one in holders() if one.kind == CONTROL)
