"""Fake-IPs: names stand behind addresses of ranges that nobody else uses (RFC 2544, RFC 5180).

One slot gives an address in each family, at the same offset into its range. An address keeps its name for as long as
nothing else needs the slot; then the name least recently used gives way. Two things protect clients that still hold an
address: one with live flows is never given away, and none is given away before it has rested, that is before `rest`
seconds went by since it was last handed out or last carried a flow. With `rest` at least the TTL of the answers, no
client that honours the TTL ever meets another name behind an address it holds.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from ztun.ports import NameStore

# Offset 0 is the network's address, offset 1 the TUN device's own.
_FIRST_OFFSET = 2
# The above, and the highest address: IPv4's directed broadcast (RFC 919).
_UNUSABLE = 3
_NEVER = float("-inf")
# Using an address again is written down at most this often, in seconds: the store need not know the order to a hair.
_SAVE_INTERVAL = 300.0


class FakeIp(NamedTuple):
    """The addresses that stand for one name: 4 bytes, and 16 bytes or None when the pool has no IPv6 range."""

    v4: bytes
    v6: bytes | None


class PoolExhaustedError(Exception):
    """Every slot has live flows or is still resting."""


def normalize(name: str) -> str:
    """The form in which names are compared: lower case (RFC 4343), no trailing dot."""
    return name.lower().removesuffix(".")


class FakeIpPool:
    """Gives names addresses, and finds the name again by its address.

    range4, range6: the ranges to take addresses from; range6 None: IPv4 only. size: number of slots, at most
    `capacity(range4, range6)`. rest: seconds between the last use of an address and its next name. store: where
    assignments are kept across restarts; it is read once, here, and told of every change.

    All times (`now`) are seconds of one clock that never runs backwards.

    Raises ValueError when size is not between 1 and the capacity of the ranges.
    """

    def __init__(
        self,
        range4: IPv4Network,
        range6: IPv6Network | None,
        size: int,
        rest: float,
        store: NameStore | None = None,
    ) -> None:
        capacity = self.capacity(range4, range6)
        if not 1 <= size <= capacity:
            raise ValueError(f"{size} names do not fit the ranges, which have room for 1 to {capacity}")
        self.size = size
        self.rest = rest
        self._range4 = _Range(range4)
        self._range6 = _Range(range6) if range6 is not None else None
        self._store = store
        self._now = _NEVER
        self._names: dict[int, str] = {}
        self._slots: dict[str, int] = {}
        self._flows: dict[int, int] = {}
        # Slots with a name and without flows, least recently used first, with the time of that use.
        self._idle: OrderedDict[int, float] = OrderedDict()
        # Idle slots whose last use came without a time. The next time we are told is late enough for them.
        self._untimed: set[int] = set()
        self._saved: dict[int, float] = {}
        self._restore()
        self._free = deque(slot for slot in range(size) if slot not in self._names)

    @staticmethod
    def capacity(range4: IPv4Network, range6: IPv6Network | None) -> int:
        """How many slots the ranges have room for; 0 when a range is too small for any."""
        sizes = [network.num_addresses for network in (range4, range6) if network is not None]
        return max(0, min(sizes) - _UNUSABLE)

    def assign(self, name: str, now: float) -> FakeIp:
        """The addresses of a name, new ones when it has none yet. Raises PoolExhaustedError."""
        self._advance(now)
        name = normalize(name)
        slot = self._slots.get(name)
        if slot is None:
            slot = self._take(name)
        if slot not in self._flows:
            self._set_idle(slot, self._now)
        self._save(slot)
        return FakeIp(self._range4.address(slot), self._range6.address(slot) if self._range6 else None)

    def name_of(self, address: bytes) -> str | None:
        """The name behind an address, or None."""
        slot = self._slot(address)
        return None if slot is None else self._names.get(slot)

    def contains(self, address: bytes) -> bool:
        """Whether the address lies in the pool's ranges, be it assigned or not."""
        addresses = self._range4 if len(address) == 4 else self._range6
        return addresses is not None and addresses.first <= int.from_bytes(address) <= addresses.last

    def acquire(self, address: bytes) -> None:
        """Count one more live flow to an address. Raises ValueError when no name stands behind it."""
        slot = self._slot(address)
        if slot is None or slot not in self._names:
            raise ValueError("acquire of an address that stands for no name")
        self._flows[slot] = self._flows.get(slot, 0) + 1
        self._idle.pop(slot, None)

    def release(self, address: bytes) -> None:
        """Count one live flow less: the counterpart of `acquire`, without which it raises ValueError."""
        slot = self._slot(address)
        flows = 0 if slot is None else self._flows.get(slot, 0)
        if slot is None or not flows:
            raise ValueError("release of an address that has no live flow")
        if flows > 1:
            self._flows[slot] = flows - 1
            return
        del self._flows[slot]
        self._set_idle(slot, None)

    def statistics(self) -> dict[str, int]:
        """How full the pool is, in slots: "size", "assigned" and, among those, "live" (with flows)."""
        return {"size": self.size, "assigned": len(self._names), "live": len(self._flows)}

    def _advance(self, now: float) -> None:
        self._now = max(self._now, now)
        for slot in self._untimed:
            if slot in self._idle:
                self._idle[slot] = self._now
        self._untimed.clear()

    def _set_idle(self, slot: int, used: float | None) -> None:
        """The slot was used just now. None: at a time that is not known, but before the next `now` we are told."""
        if used is None:
            self._untimed.add(slot)
        self._idle[slot] = self._now if used is None else used
        self._idle.move_to_end(slot)

    def _slot(self, address: bytes) -> int | None:
        addresses = self._range4 if len(address) == 4 else self._range6
        if addresses is None or len(address) != addresses.length:
            return None
        slot = int.from_bytes(address) - addresses.first - _FIRST_OFFSET
        return slot if 0 <= slot < self.size else None

    def _take(self, name: str) -> int:
        slot = self._free.popleft() if self._free else self._recycle()
        self._names[slot] = name
        self._slots[name] = slot
        self._saved.pop(slot, None)
        return slot

    def _recycle(self) -> int:
        slot = next(iter(self._idle), None)
        if slot is None:
            raise PoolExhaustedError(f"all {self.size} Fake-IPs have live flows")
        if self._now - self._idle[slot] < self.rest:
            raise PoolExhaustedError(f"all {self.size} Fake-IPs are in use or rest for another while")
        del self._idle[slot]
        del self._slots[self._names.pop(slot)]
        return slot

    def _save(self, slot: int) -> None:
        if self._store is None or self._now - self._saved.get(slot, _NEVER) < _SAVE_INTERVAL:
            return
        self._saved[slot] = self._now
        self._store.save(slot, self._names[slot])

    def _restore(self) -> None:
        for slot, stored in (self._store.load() if self._store is not None else {}).items():
            name = normalize(stored)
            if not 0 <= slot < self.size:
                continue
            if name in self._slots:
                # Written under another size, then again under this one: the later slot is the one clients know.
                stale = self._slots[name]
                del self._names[stale], self._idle[stale]
            self._names[slot] = name
            self._slots[name] = slot
            # A client may have got this address just before we started.
            self._set_idle(slot, None)


class _Range:
    """A network as integers, and its addresses by slot."""

    def __init__(self, network: IPv4Network | IPv6Network) -> None:
        self.length = network.max_prefixlen // 8
        self.first = int(network.network_address)
        self.last = int(network.broadcast_address)

    def address(self, slot: int) -> bytes:
        return (self.first + _FIRST_OFFSET + slot).to_bytes(self.length)
