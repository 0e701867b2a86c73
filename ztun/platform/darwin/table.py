"""The prefix table in Python: longest match by one binary search.

Prefixes are nested or have nothing in common. So they cut the addresses into ranges, each of which has one longest
match, and to look an address up is to find the last range that does not begin behind it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from ztun.ports import Prefix, Verdict

Key = tuple[bytes, int]
"""(packed network, prefix length)."""


class Entry:
    """What was decided for a prefix or an address, and how often that was asked for."""

    __slots__ = ("hits", "rule", "verdict")

    def __init__(self, verdict: Verdict, rule: int) -> None:
        self.verdict = verdict
        self.rule = rule
        self.hits = 0


class PrefixTable:
    """Entries of one address family; size: of its addresses in bytes.

    starts, owners: the ranges, for who cannot spare a call: `owners[bisect_right(starts, address) - 1]`.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.entries: dict[Key, Entry] = {}
        self.starts: list[bytes] = [bytes(size)]
        self.owners: list[Entry | None] = [None]

    def replace(self, prefixes: Iterable[Prefix]) -> None:
        """Hold these prefixes and no others. Hits of what stays as it was are kept."""
        before = self.entries
        self.entries = {}
        for prefix in prefixes:
            key, entry = (prefix.network, prefix.length), Entry(prefix.verdict, prefix.rule)
            old = before.get(key)
            is_same = old is not None and (old.verdict, old.rule) == (entry.verdict, entry.rule)
            self.entries[key] = old if old is not None and is_same else entry
        self._lay_out()

    def find(self, address: bytes) -> Entry | None:
        """The entry of the longest prefix that covers a packed address."""
        return self.owners[bisect_right(self.starts, address) - 1]

    def _lay_out(self) -> None:
        bits = self._size * 8
        ranges: dict[int, Entry | None] = {0: None}
        around: list[tuple[int, Entry]] = []  # the prefixes that cover where we are: last address, entry
        for (network, length), entry in sorted(self.entries.items(), key=lambda item: item[0]):
            first = int.from_bytes(network)
            for ended in _leave(around, first):
                ranges[ended] = around[-1][1] if around else None
            ranges[first] = entry
            around.append((first + (1 << bits - length) - 1, entry))
        for ended in _leave(around, 1 << bits):
            ranges[ended] = around[-1][1] if around else None
        ranges.pop(1 << bits, None)
        ordered = sorted(ranges)
        self.starts = [start.to_bytes(self._size) for start in ordered]
        self.owners = [ranges[start] for start in ordered]


def _leave(around: list[tuple[int, Entry]], first: int) -> Iterator[int]:
    """Leave the prefixes that end before `first`; where each of them is over."""
    while around and around[-1][0] < first:
        yield around.pop()[0] + 1


def outermost(prefixes: Iterable[Prefix]) -> list[Key]:
    """The prefixes that are tunnelled or dropped and lie in no other one that is: all that has to come to us."""
    found: list[Key] = []
    reach = (0, -1)  # size of the addresses, last address that is covered so far
    wanted = [(len(one.network), one.network, one.length) for one in prefixes if one.verdict is not Verdict.DIRECT]
    for size, network, length in sorted(wanted):
        last = int.from_bytes(network) + (1 << size * 8 - length) - 1
        if reach[0] == size and reach[1] >= last:
            continue
        reach = (size, last)
        found.append((network, length))
    return found


def halves(key: Key) -> list[Key]:
    """The same addresses without a default route, which is the system's: 0/0 is 0/1 and 128/1."""
    network, length = key
    if length:
        return [key]
    return [(network, 1), (b"\x80" + network[1:], 1)]
