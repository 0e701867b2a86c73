"""The instances on this Mac and their utuns, which tell each other by locked files.

No instance's own sockets follow routes into another one's utun, as on Linux, where they have the same mark: else what
one sends out directly could come to the other, be direct there as well, and come back, without end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from ztun import lockfiles
from ztun.defaults import DEFAULTS
from ztun.platform.shapes import Instance

DIRECTORY = DEFAULTS.claims
_KIND = "device"


def announce(device: str) -> Callable[[], None]:
    """Tell other instances that the utun `device` is ours; call what is returned when it is gone."""
    if DIRECTORY is None:
        return lambda: None
    files = lockfiles.LockFiles(DIRECTORY)
    with suppress(OSError):  # a place that cannot be written; whoever can make a utun can write there
        files.acquire(_KIND, device)
    return files.release


def others() -> list[Instance]:
    """The instances that have a utun now, without this process."""
    if DIRECTORY is None:
        return []
    found = [Instance(value, pid) for kind, value, pid in lockfiles.listed(DIRECTORY) if kind == _KIND]
    return [other for other in found if other.pid != os.getpid()]


def is_alive(pid: int) -> bool:
    """Whether an instance of this number lives. Another process may have got the number since, as after a reboot."""
    if pid == os.getpid():
        return True
    if not pid or not _exists(pid):
        return False
    # From its first change to its last, an instance holds the claim of its control socket, beside our files.
    return DIRECTORY is None or pid in {holder for _kind, _value, holder in lockfiles.listed(DIRECTORY)}


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True
