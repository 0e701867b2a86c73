"""The maps of BPF programs whose process is gone: clsact filters keep them until somebody removes the filter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

from ztun.platform.linux import bpfcall, layout, tables
from ztun.platform.linux.layout import COUNTER, DECISION, U32, U64
from ztun.platform.linux.maps import Map, PerCpuCounters

_PREFIXES = {"prefixes4": 4, "prefixes6": 16}  # bytes of an address
_LEARNED = {"learned4": 4, "learned6": 16}


def read_maps(programs: Iterable[int]) -> dict[str, Any]:
    """{"maps", "counters", "heartbeat"} as `ztun routes --json` has them, from the maps that `programs` use.

    Empty where there are none, or we may not see them (CAP_SYS_ADMIN).
    """
    with ExitStack() as stack:
        fds = dict(_open(programs, stack))
        maps = [entry for name, fd in fds.items() for entry in _describe(name, fd)]
        return {
            "maps": maps,
            "counters": _counters(fds["counters"]) if "counters" in fds else {},
            "heartbeat": _heartbeat(fds["heartbeat"]) if "heartbeat" in fds else None,
        }


def _open(programs: Iterable[int], stack: ExitStack) -> Iterator[tuple[str, int]]:
    seen = set()
    for program in programs:
        with suppress(OSError):
            fd = bpfcall.open_program(program)
            stack.callback(os.close, fd)
            for number in bpfcall.program_info(fd).map_ids:
                if number not in seen:
                    seen.add(number)
                    held = bpfcall.open_map(number)
                    stack.callback(os.close, held)
                    yield bpfcall.map_name(held), held


def _describe(name: str, fd: int) -> Iterator[dict[str, Any]]:
    described: Callable[[], list[dict[str, Any]]] | None = None
    if name in _PREFIXES and _has_layout(fd, U32.size + _PREFIXES[name], DECISION.size):
        trie = Map(fd, U32.size + _PREFIXES[name], DECISION.size)
        described = tables.PrefixTable(trie).describe
    elif name in _LEARNED and _has_layout(fd, _LEARNED[name], DECISION.size):
        table = Map(fd, _LEARNED[name], DECISION.size)
        described = lambda: list(tables.describe_learned(table))  # noqa: E731
    if described is not None:
        with suppress(OSError):
            yield {"name": name, "type": "lpm_trie" if name in _PREFIXES else "lru_hash", "entries": described()}


def _has_layout(fd: int, key: int, value: int) -> bool:
    """Of another version's map nothing is read: the kernel would write behind our buffers."""
    return bpfcall.map_sizes(fd) == (key, value)


def _counters(fd: int) -> dict[str, dict[str, int]]:
    if not _has_layout(fd, U32.size, COUNTER.size):
        return {}
    counters, names = PerCpuCounters(fd), layout.read_shared(layout.find_sources()).counter_names()
    found = {name: counters.read(index) for index, name in names.items()}
    return {name: {"packets": packets, "bytes": octets} for name, (packets, octets) in found.items()}


def _heartbeat(fd: int) -> dict[str, Any] | None:
    if not _has_layout(fd, U32.size, U64.size):
        return None
    beat = U64.unpack(Map(fd, U32.size, U64.size).lookup(U32.pack(0)) or bytes(U64.size))[0]
    return {"age_ms": (time.monotonic_ns() - beat) // 1_000_000 if beat else None}
