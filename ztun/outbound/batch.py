"""Many datagrams with one system call: recvmmsg(2), laid out so that datagrams which are alike lie side by side.

The first bytes of each datagram (a proxy's header) go to one place, what follows to its slot, and what exceeds the
slot to a third place. When all are as long as header and slot together, the slots are one run, to be sent as it lies.

Sources: recvmmsg(2), struct msghdr and cmsghdr in bits/socket.h, UDP_GRO in linux/udp.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
from typing import Any, NamedTuple

_COUNT = 64  # datagrams a call, so that one busy link does not hold up the rest of the loop
_MAX_DATAGRAM = 65536
_MAX_RUN = 65507  # bytes of payload: what one IPv4 packet can carry on
_MAX_HEAD = 262  # the longest header of RFC 1928 section 7
_USUAL_SLOT = 2048  # before anything is known: more than what is not fragmented on most links
_MAX_LAYOUTS = 64
_UDP_GRO = 104  # linux/udp.h

_MESSAGE = struct.Struct("@PIPNPNi0PI0P")  # struct mmsghdr: name, iovec, control, each with its length; flags; length
_CONTROL_LENGTH_AT = struct.calcsize("@PIPNP0N")
_LENGTH_AT = struct.calcsize("@PIPNPNi0P")
_CONTROL = struct.Struct("@Nii0Ni0N")  # struct cmsghdr with an int
_NAME_SIZES = {socket.AF_INET: 16, socket.AF_INET6: 28}  # struct sockaddr_in, sockaddr_in6


class Run(NamedTuple):
    """Datagrams from one sender that begin with the same bytes.

    name: the sender, for `sender_of`; empty on a connected socket. head: those first bytes. payload: what follows them
    in each datagram, one behind the other, `size` bytes each, of which the last may be shorter; a view that must be
    copied to be kept.
    """

    name: Any
    head: bytes
    payload: memoryview
    size: int


class _Arena:
    """Where datagrams are read to. Pages that were never written to cost nothing."""

    def __init__(self) -> None:
        self.heads = mmap.mmap(-1, _COUNT * _MAX_HEAD)
        self.slots = mmap.mmap(-1, _COUNT * _MAX_DATAGRAM)
        self.tails = mmap.mmap(-1, _COUNT * _MAX_DATAGRAM)
        self.names = mmap.mmap(-1, _COUNT * _NAME_SIZES[socket.AF_INET6])
        self.controls = mmap.mmap(-1, _COUNT * _CONTROL.size)
        self.slots_view = memoryview(self.slots)
        self.layouts: dict[tuple[int, int, int], _Layout] = {}

    def layout(self, name: int, head: int, slot: int) -> _Layout:
        """name: bytes of a sender's address, 0 on a connected socket; head, slot: bytes of a datagram."""
        layout = self.layouts.get((name, head, slot))
        if layout is None:
            if len(self.layouts) >= _MAX_LAYOUTS:
                self.layouts.clear()
            layout = self.layouts[name, head, slot] = _Layout(self, name, head, slot)
        return layout


class _Layout:
    """The arguments of recvmmsg for one way to lay datagrams out."""

    def __init__(self, arena: _Arena, name: int, head: int, slot: int) -> None:
        self.head = head
        self.slot = slot
        self.count = _COUNT if slot == _USUAL_SLOT else min(_COUNT, _MAX_RUN // slot)
        heads, slots, tails, names, controls = (
            _address(area) for area in (arena.heads, arena.slots, arena.tails, arena.names, arena.controls)
        )
        places: list[int] = []
        for i in range(self.count):
            tail = tails + i * _MAX_DATAGRAM
            places += heads + i * head, head, slots + i * slot, slot, tail, _MAX_DATAGRAM
        self._iovecs = (ctypes.c_size_t * len(places))(*places)
        iovecs = ctypes.addressof(self._iovecs)
        step = ctypes.sizeof(ctypes.c_size_t) * 6
        self._fresh = b"".join(
            _MESSAGE.pack(
                names + i * name if name else 0, name, iovecs + i * step, 3,
                controls + i * _CONTROL.size, _CONTROL.size, 0, 0,
            )
            for i in range(self.count)
        )  # fmt: skip
        self._messages = bytearray(self._fresh)
        self.address = _address(self._messages)
        self.lengths = memoryview(self._messages).cast("I")[_LENGTH_AT // 4 :: _MESSAGE.size // 4]
        words = memoryview(self._messages).cast("P")
        self.controls = words[_CONTROL_LENGTH_AT // words.itemsize :: _MESSAGE.size // words.itemsize]

    def refresh(self) -> None:
        """The kernel writes the lengths that it used over those that it may use."""
        self._messages[:] = self._fresh


def _address(area: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(area))


class BatchReader:
    """Reads a UDP socket up to 64 datagrams at once. head: how many first bytes of each are to be kept apart.

    What one call returns is valid until the next call of any reader.
    """

    calls = 1  # that a wake-up should make
    _arena: _Arena | None = None
    _recvmmsg: Any = None

    def __init__(self, sock: socket.socket, *, connected: bool, head: int) -> None:
        if BatchReader._arena is None:
            BatchReader._arena = _Arena()
            BatchReader._recvmmsg = _find_recvmmsg()
        self._sock = sock
        self._name = 0 if connected else _NAME_SIZES[sock.family]
        self._layout = BatchReader._arena.layout(self._name, head, _USUAL_SLOT)
        with contextlib.suppress(OSError):  # before Linux 5.0; it brings nothing where nobody coalesces
            sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)

    @property
    def head(self) -> int:
        return self._layout.head

    @head.setter
    def head(self, size: int) -> None:
        self._set_layout(size, self._layout.slot)

    def receive(self) -> list[Run]:
        """What is there, in order. Raises OSError, BlockingIOError when there is nothing."""
        layout = self._layout
        layout.refresh()
        count = BatchReader._recvmmsg(self._sock.fileno(), layout.address, layout.count, socket.MSG_DONTWAIT, None)
        if count < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        lengths = layout.lengths[:count].tolist()
        return self._side_by_side(count, lengths) or self._apart(count, lengths)

    def sender_of(self, run: Run) -> tuple[str, int]:
        """Host and port."""
        name: bytes = run.name
        family = int.from_bytes(name[:2], "little" if struct.pack("=H", 1)[0] else "big")
        address = name[4:8] if family == socket.AF_INET else name[8:24]
        return socket.inet_ntop(family, address), int.from_bytes(name[2:4], "big")

    def _side_by_side(self, count: int, lengths: list[int]) -> list[Run] | None:
        """The batch as one run, where it is one."""
        layout, arena = self._layout, BatchReader._arena
        assert arena is not None
        head, whole, last = layout.head, layout.head + layout.slot, lengths[-1]
        if not head < last <= whole or lengths.count(whole) != count - (last < whole):
            return None
        if any(layout.controls[:count].tolist()):
            return None
        first, name = arena.heads[:head], arena.names[: self._name]
        if count > 1 and (
            arena.heads[: count * head] != first * count or arena.names[: count * self._name] != name * count
        ):
            return None
        size = (count - 1) * layout.slot + last - head
        return [Run(name, first, arena.slots_view[:size], layout.slot)]

    def _apart(self, count: int, lengths: list[int]) -> list[Run]:
        """Put together what can be, and prepare for more of the kind that was most of this batch."""
        runs = _Runs()
        head = self._layout.head
        for i in range(count):
            name, whole, size = self._datagrams(i, lengths[i])
            for at in range(0, len(whole) or 1, size or 1):
                runs.add(name, whole[at : at + head], whole[at + head : at + size])
        runs.end()
        self._set_layout(head, runs.usual_size() or _USUAL_SLOT)
        return runs.found

    def _datagrams(self, i: int, length: int) -> tuple[bytes, bytes, int]:
        """(sender, bytes, size): the i-th message. It holds several datagrams of `size` where the kernel put them
        together."""
        layout, arena = self._layout, BatchReader._arena
        assert arena is not None
        head, slot = layout.head, layout.slot
        name = arena.names[i * self._name : (i + 1) * self._name]
        whole = arena.heads[i * head : i * head + min(head, length)]
        if length > head:
            whole += arena.slots[i * slot : i * slot + min(slot, length - head)]
        if length > head + slot:
            tail = i * _MAX_DATAGRAM
            whole += arena.tails[tail : tail + length - head - slot]
        size = length
        if layout.controls[i]:
            _, level, kind, value = _CONTROL.unpack_from(arena.controls, i * _CONTROL.size)
            if (level, kind) == (socket.IPPROTO_UDP, _UDP_GRO) and 0 < value < length:
                size = value
        return name, whole, size

    def _set_layout(self, head: int, slot: int) -> None:
        if (head, slot) != (self._layout.head, self._layout.slot) and head <= _MAX_HEAD:
            assert BatchReader._arena is not None
            self._layout = BatchReader._arena.layout(self._name, head, slot)


class _Runs:
    """Puts datagrams into runs as long as they are alike."""

    def __init__(self) -> None:
        self.found: list[Run] = []
        self._key: tuple[bytes, bytes] = (b"", b"")
        self._pieces: list[bytes] = []
        self._size = 0
        self._room = 0
        self._longest = (1, 0)  # datagrams, size

    def add(self, name: bytes, head: bytes, payload: bytes) -> None:
        size = len(payload)
        if not (self._room and (name, head) == self._key and 0 < size <= self._size):
            self.end()
            self._key = (name, head)
            self._size = size
            self._room = min(_COUNT, _MAX_RUN // size) if size else 1
        self._pieces.append(payload)
        self._room = self._room - 1 if size == self._size else 0

    def end(self) -> None:
        if self._pieces:
            self._longest = max(self._longest, (len(self._pieces), self._size))
            self.found.append(Run(*self._key, memoryview(b"".join(self._pieces)), self._size))
            self._pieces = []

    def usual_size(self) -> int:
        """The size of the datagrams in the longest run; 0 when there is no run worth the name."""
        return self._longest[1]


class PlainReader:
    """The same for a system without recvmmsg: one datagram a call."""

    calls = 64

    def __init__(self, sock: socket.socket, *, connected: bool, head: int) -> None:
        self._sock = sock
        self.head = head

    def receive(self) -> list[Run]:
        """See BatchReader."""
        datagram, address = self._sock.recvfrom(_MAX_DATAGRAM)
        payload = memoryview(datagram)[self.head :]
        return [Run(address, datagram[: self.head], payload, len(payload))]

    def sender_of(self, run: Run) -> tuple[str, int]:
        """See BatchReader."""
        return str(run.name[0]), int(run.name[1])


Reader = BatchReader | PlainReader


def _find_recvmmsg() -> Any:
    function = ctypes.CDLL(None, use_errno=True).recvmmsg
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function


def can_batch() -> bool:
    """Whether the C library has recvmmsg(2)."""
    return hasattr(ctypes.CDLL(None), "recvmmsg")
