"""The map `clients`, read again and again for one client at a time."""

from __future__ import annotations

import ctypes

from ztun.platform.linux import bpfcall
from ztun.platform.linux.layout import CLIENT, U32


class Clients:
    """fd: of the map."""

    def __init__(self, fd: int) -> None:
        self._key, self._value = ctypes.create_string_buffer(16), ctypes.create_string_buffer(CLIENT.size)
        addresses = ctypes.addressof(self._key), ctypes.addressof(self._value)
        self._call = bpfcall.Prepared(bpfcall.MAP_LOOKUP_ELEM, bpfcall.attributes("=I4xQQQ", fd, *addresses, 0))

    def interface_of(self, client: bytes) -> int | None:
        """The index of the interface by which packets of a client (16 bytes) came in last."""
        self._key.raw = client
        return int(U32.unpack(self._value.raw[:4])[0]) if self._call() == 0 else None
