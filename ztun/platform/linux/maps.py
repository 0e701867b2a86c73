"""BPF maps as mappings of bytes to bytes."""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

from ztun.platform.linux.bpfcall import (
    MAP_DELETE_BATCH,
    MAP_DELETE_ELEM,
    MAP_LOOKUP_BATCH,
    MAP_LOOKUP_ELEM,
    MAP_UPDATE_BATCH,
    MAP_UPDATE_ELEM,
    attributes,
    bpf,
)

# Entries handed over in one system call. More than any bucket of a hash holds, as lookups in batches need.
_BATCH = 4096
# And of those of a per-CPU map, whose values may be large, and which is an array without buckets.
_MOST_BYTES = 1 << 20
_COUNT_OFFSET = 32  # of `count` among the batch attributes of union bpf_attr

_Memory = ctypes.Array[ctypes.c_char]
_NOTHING: _Memory = ctypes.create_string_buffer(1)


def _hold(data: bytes) -> _Memory:
    return ctypes.create_string_buffer(data, len(data))


class Map:
    """One map, keys and values in the layout that bpf/shared.h gives them. Raises OSError as bpf(2) says."""

    def __init__(self, fd: int, key_size: int, value_size: int) -> None:
        self._fd = fd
        self._key_size = key_size
        self._value_size = value_size

    def update(self, key: bytes, value: bytes) -> None:
        held_key, held_value = _hold(key), _hold(value)
        addresses = ctypes.addressof(held_key), ctypes.addressof(held_value)
        bpf(MAP_UPDATE_ELEM, attributes("=I4xQQQ", self._fd, *addresses, 0))

    def lookup(self, key: bytes) -> bytes | None:
        held_key, value = _hold(key), ctypes.create_string_buffer(self._value_size)
        addresses = ctypes.addressof(held_key), ctypes.addressof(value)
        try:
            bpf(MAP_LOOKUP_ELEM, attributes("=I4xQQQ", self._fd, *addresses, 0))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def delete(self, key: bytes) -> bool:
        """Remove one entry. False when there was none (an LRU map may have been quicker)."""
        held_key = _hold(key)
        try:
            bpf(MAP_DELETE_ELEM, attributes("=I4xQ", self._fd, ctypes.addressof(held_key)))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def update_many(self, entries: Mapping[bytes, bytes]) -> None:
        """Write all entries, thousands with one system call."""
        for _ in self.updating(entries):
            pass

    def updating(self, entries: Mapping[bytes, bytes]) -> Iterator[None]:
        """The same, with a pause for others after each system call. Some milliseconds lie between two of them."""
        pairs = iter(entries.items())
        done = 0
        while some := list(itertools.islice(pairs, _BATCH)):
            keys, values = _hold(b"".join(key for key, _ in some)), _hold(b"".join(value for _, value in some))
            code, count = self._batch(MAP_UPDATE_BATCH, 0, 0, keys, values, len(some))
            if code:
                raise OSError(code, f"{os.strerror(code)} (entry {done + count} of {len(entries)})")
            done += count
            yield

    def delete_many(self, keys: Iterable[bytes]) -> None:
        """Remove those of these entries that there are."""
        for _ in self.deleting(keys):
            pass

    def deleting(self, keys: Iterable[bytes]) -> Iterator[None]:
        """The same, with a pause for others after each system call."""
        rest = iter(keys)
        while some := list(itertools.islice(rest, _BATCH)):
            start = 0
            while start < len(some):
                held = _hold(b"".join(some[start:]))
                code, count = self._batch(MAP_DELETE_BATCH, 0, 0, held, _NOTHING, len(some) - start)
                if code not in (0, errno.ENOENT):
                    raise OSError(code, os.strerror(code))
                start += count + (code == errno.ENOENT)  # what is gone already stops the kernel
            yield

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All entries, read in batches while the programs go on changing them."""
        most = min(_BATCH, max(_MOST_BYTES // self._value_size, 1))
        keys = ctypes.create_string_buffer(self._key_size * most)
        values = ctypes.create_string_buffer(self._value_size * most)
        token = ctypes.create_string_buffer(max(self._key_size, 8))
        start = code = 0
        while code != errno.ENOENT:
            code, count = self._batch(MAP_LOOKUP_BATCH, start, ctypes.addressof(token), keys, values, most)
            if code not in (0, errno.ENOENT):
                raise OSError(code, os.strerror(code))
            start = ctypes.addressof(token)
            yield from zip(_cut(keys, self._key_size, count), _cut(values, self._value_size, count), strict=True)

    def _batch(self, command: int, start: int, end: int, keys: _Memory, values: _Memory, count: int) -> tuple[int, int]:
        """(errno or 0, number of entries done)."""
        addresses = ctypes.addressof(keys), ctypes.addressof(values)
        attr = attributes("=QQQQIIQQ", start, end, *addresses, count, self._fd, 0, 0)
        code = 0
        try:
            bpf(command, attr)
        except OSError as error:
            code = error.errno or errno.EIO
        return code, struct.unpack_from("=I", attr.raw, _COUNT_OFFSET)[0]


class PerCpuCounters:
    """A per-CPU array of struct counter."""

    _PAIR = struct.Struct("=QQ")

    def __init__(self, fd: int) -> None:
        # The kernel gives one value for each possible CPU, in one piece.
        self._map = Map(fd, 4, self._PAIR.size * possible_cpus())

    def read(self, index: int) -> tuple[int, int]:
        """(packets, bytes) at `index`, summed over the CPUs."""
        values = self._map.lookup(struct.pack("=I", index)) or b""
        packets = octets = 0
        for more_packets, more_octets in self._PAIR.iter_unpack(values):
            packets += more_packets
            octets += more_octets
        return packets, octets


@cache
def possible_cpus() -> int:
    """The number of CPUs this machine may ever have, as per-CPU maps count them."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


def _cut(memory: _Memory, size: int, count: int) -> list[bytes]:
    raw = memory.raw
    return [raw[n * size : (n + 1) * size] for n in range(count)]
