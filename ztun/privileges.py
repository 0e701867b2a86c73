"""What this process may do: capabilities(7). Looked at, asked of it, and given up where it is no longer needed.

Capabilities belong to threads, and a thread takes those of the one that makes it. So they are given up while nothing
but the event loop's thread is at work, and the event loop gets new helpers.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import structlog

log = structlog.get_logger("ztun.app")

# linux/capability.h.
DAC_OVERRIDE, NET_BIND_SERVICE, NET_ADMIN, PERFMON, BPF = 1, 10, 12, 38, 39
_NAMES = {
    0: "CHOWN",
    DAC_OVERRIDE: "DAC_OVERRIDE",
    NET_BIND_SERVICE: "NET_BIND_SERVICE",
    NET_ADMIN: "NET_ADMIN",
    13: "NET_RAW",
    19: "SYS_PTRACE",
    21: "SYS_ADMIN",
    24: "SYS_RESOURCE",
    PERFMON: "PERFMON",
    BPF: "BPF",
}
_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words of 32 capabilities for each of the three sets
_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 23, 24, 38  # linux/prctl.h
_WORD = 0xFFFFFFFF
_HELPERS_END = 2.0  # seconds that threads with the old capabilities may take to end
_libc = ctypes.CDLL(None, use_errno=True)


class Capabilities(NamedTuple):
    """Sets of one thread, a bit for each capability, as proc(5) shows them."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


class Remaining(NamedTuple):
    """What is left after `give_up`. kept: capability -> why it was not given up with the others."""

    kept: dict[int, str]
    given_up: int  # how many
    no_new: bool


def current(thread: str = "thread-self") -> Capabilities | None:
    """The capabilities of a thread of ours; None where there are none, or the thread has ended."""
    where = thread if thread == "thread-self" else f"self/task/{thread}"
    try:
        lines = Path("/proc", where, "status").read_text().splitlines()
    except OSError:
        return None
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    if "CapEff" not in found:
        return None
    return Capabilities(*(int(found[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")))


def name(capability: int) -> str:
    """ "CAP_NET_ADMIN" for 12."""
    return f"CAP_{_NAMES.get(capability, capability)}"


def names(mask: int) -> list[str]:
    """The names of the capabilities in a set."""
    return [name(number) for number in range(mask.bit_length()) if mask >> number & 1]


def has(capability: int) -> bool:
    """Whether this thread can use it now; being root counts where there are no capabilities."""
    now = current()
    return os.geteuid() == 0 if now is None else bool(now.effective >> capability & 1)


def forbid_new() -> bool:
    """No program that we run can gain what we have given up (PR_SET_NO_NEW_PRIVS). To be called before any thread."""
    return bool(_prctl(_PR_SET_NO_NEW_PRIVS, 1) == 0)


def describe() -> dict[str, Any]:
    """{"user": uid, "capabilities": names of those left, "no_new_privileges": bool}: for `ztun status --json`."""
    now = current()
    return {
        "user": os.geteuid(),
        "capabilities": None if now is None else names(now.permitted),
        "no_new_privileges": _no_new_privileges(),
    }


def _no_new_privileges() -> bool:
    with suppress(OSError):
        return "\nNoNewPrivs:\t1" in Path("/proc/thread-self/status").read_text()
    return False


async def give_up(
    wanted: Collection[int], trials: Iterable[tuple[int, Callable[[], str | None]]] = ()
) -> list[tuple[int, str]]:
    """Keep `wanted` alone, as far as we have them, for good and in all threads.

    trials: (capability, what to try without it). A trial returns None when it goes well, else what needs the
    capability, which is kept then. Returns those that were kept because of a trial, with that reason.
    """
    now = current()
    if now is None:
        return []
    kept = _mask(wanted) & now.permitted
    needed = []
    for capability, trial in trials:
        if not now.permitted >> capability & 1:
            continue
        with _without_others(kept, now):
            why = trial()
        if why is not None:
            kept |= 1 << capability
            needed.append((capability, why))
    _drop_bounding()
    _set(kept, kept)
    await _renew_helpers(kept)
    given_up = names(now.permitted & ~kept)
    log.debug("gave up capabilities", kept=names(kept), given_up=len(given_up), user=os.geteuid())
    return needed


@contextmanager
def _without_others(kept: int, before: Capabilities) -> Iterator[None]:
    """Only `kept` is in effect inside."""
    _set(kept, before.permitted)
    try:
        yield
    finally:
        _set(before.effective, before.permitted)


def cannot_write(paths: Iterable[Path]) -> str | None:
    """The first of the paths that this thread could not write or make anew, None when it can all of them."""
    for path in paths:
        for place in (path, path.parent):
            if place.exists() and not os.access(place, os.W_OK, effective_ids=True):
                return str(place)
    return None


async def _renew_helpers(kept: int) -> None:
    """New threads for the event loop's `run_in_executor`, in the place of those with the old capabilities."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="ztun"))
    deadline = asyncio.get_running_loop().time() + _HELPERS_END
    while threads := threads_with_more_than(kept):
        if asyncio.get_running_loop().time() > deadline:
            log.warning("threads that kept their capabilities", threads=threads)
            return
        await asyncio.sleep(0.01)


def threads_with_more_than(kept: int) -> list[int]:
    """Our threads that can do more than that."""
    found = []
    for thread in os.listdir("/proc/self/task"):
        held = current(thread)
        if held is not None and held.permitted & ~kept:
            found.append(int(thread))
    return found


def _drop_bounding() -> None:
    """Nothing for programs that we run; needs CAP_SETPCAP, and without it `forbid_new` has to do."""
    for capability in range(64):
        if _prctl(_PR_CAPBSET_READ, capability) == 1:
            _prctl(_PR_CAPBSET_DROP, capability)


def _set(effective: int, permitted: int) -> None:
    """Set those sets of this thread, and empty its inheritable and so its ambient one. Raises OSError."""
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)
    words = [part >> shift & _WORD for shift in (0, 32) for part in (effective, permitted, 0)]
    if _libc.capset(header, (ctypes.c_uint32 * 6)(*words)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _prctl(option: int, argument: int) -> int:
    if not hasattr(_libc, "prctl"):  # Linux alone has it
        return -1
    return int(_libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _mask(capabilities: Iterable[int]) -> int:
    mask = 0
    for capability in capabilities:
        mask |= 1 << capability
    return mask
