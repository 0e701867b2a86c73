"""Maps that every carried connection needs: calls that are made again and again on the same memory."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from ztun.platform.linux import bpfcall
from ztun.platform.linux.layout import CLIENT, FLOW, U32

_PAIR = struct.Struct("=II")
_COUNT = struct.Struct("=I")
_COUNT_AT: Final = 32  # of `count` among the batch attributes of union bpf_attr


class Pairs:
    """Writes two entries of `carried` with one system call."""

    def __init__(self, fd: int) -> None:
        keys, values = ctypes.create_string_buffer(2 * FLOW.size), ctypes.create_string_buffer(_PAIR.size)
        self._keys, self._values = memoryview(keys).cast("B"), memoryview(values).cast("B")
        self._attr = bpfcall.attributes("=QQQQIIQQ", 0, 0, ctypes.addressof(keys), ctypes.addressof(values), 2, fd, 0, 0)
        self._call = bpfcall.Prepared(bpfcall.MAP_UPDATE_BATCH, self._attr)

    def write(self, key: bytes, value: int, other_key: bytes, other_value: int) -> bool:
        """Whether both are there now."""
        self._keys[:] = key + other_key
        _PAIR.pack_into(self._values, 0, value, other_value)
        _COUNT.pack_into(self._attr, _COUNT_AT, 2)  # where the kernel says how many it has done
        return self._call() == 0


class Clients:
    """Reads the map `clients`."""

    def __init__(self, fd: int) -> None:
        self._key, self._value = ctypes.create_string_buffer(16), ctypes.create_string_buffer(CLIENT.size)
        addresses = ctypes.addressof(self._key), ctypes.addressof(self._value)
        self._call = bpfcall.Prepared(bpfcall.MAP_LOOKUP_ELEM, bpfcall.attributes("=I4xQQQ", fd, *addresses, 0))

    def interface_of(self, client: bytes) -> int | None:
        """The index of the interface by which packets of a client (16 bytes) came in last."""
        self._key.raw = client
        return int(U32.unpack(self._value.raw[:4])[0]) if self._call() == 0 else None


class Queue:
    """A BPF_MAP_TYPE_QUEUE of u32."""

    def __init__(self, fd: int) -> None:
        self._value = ctypes.create_string_buffer(U32.size)
        attr = bpfcall.attributes("=I4xQQQ", fd, 0, ctypes.addressof(self._value), 0)
        self._call = bpfcall.Prepared(bpfcall.MAP_LOOKUP_AND_DELETE_ELEM, attr)

    def pop(self) -> int | None:
        """The oldest; None when there is none."""
        return int(U32.unpack(self._value.raw)[0]) if self._call() == 0 else None
