"""Lookups that find the rules of a name or an address without going through all of them.

Every value is filed under the rank of its rule: its place when all rules stand in the order in which they are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ztun.rules.model import Network, canonical_name


def suffixes(name: str) -> Iterator[str]:
    """`a.b.c` gives `a.b.c`, `b.c`, `c`."""
    while name:
        yield name
        name = name.partition(".")[2]


class NameIndex:
    """Ranks by exact name, by suffix, and by keyword. Names given to it are canonical."""

    def __init__(self) -> None:
        self._exact: dict[str, list[int]] = {}
        self._suffix: dict[str, list[int]] = {}
        self._keyword: dict[str, list[int]] = {}

    def add_exact(self, name: str, rank: int) -> None:
        self._exact.setdefault(canonical_name(name), []).append(rank)

    def add_suffix(self, name: str, rank: int) -> None:
        self._suffix.setdefault(canonical_name(name), []).append(rank)

    def add_keyword(self, keyword: str, rank: int) -> None:
        self._keyword.setdefault(keyword.lower(), []).append(rank)

    def ranks(self, name: str) -> set[int]:
        """All ranks that have a value which the name satisfies."""
        found = set(self._exact.get(name, ()))
        if self._suffix:
            for suffix in suffixes(name):
                found.update(self._suffix.get(suffix, ()))
        for keyword, ranks in self._keyword.items():
            if keyword in name:
                found.update(ranks)
        return found


class PrefixIndex:
    """Ranks by prefix. A lookup costs one dict access for each prefix length in use."""

    def __init__(self, entries: Iterable[tuple[Network, int]] = ()) -> None:
        tables: dict[int, dict[int, dict[int, list[int]]]] = {4: {}, 16: {}}
        for network, rank in entries:
            shift = network.max_prefixlen - network.prefixlen
            table = tables[network.max_prefixlen // 8].setdefault(network.prefixlen, {})
            table.setdefault(int(network.network_address) >> shift, []).append(rank)
        # Longest first, so that a lookup with a least length can stop early.
        self._tables = {
            size: [(length, size * 8 - length, table) for length, table in sorted(by_length.items(), reverse=True)]
            for size, by_length in tables.items()
        }

    def ranks(self, address: bytes, at_least: int = 0) -> set[int]:
        """The ranks of all prefixes of at least that length that cover the address."""
        value = int.from_bytes(address)
        found: set[int] = set()
        for length, shift, table in self._tables[len(address)]:
            if length < at_least:
                break
            found.update(table.get(value >> shift, ()))
        return found

    def longest(self, address: bytes) -> int | None:
        """The length of the longest prefix that covers the address."""
        value = int.from_bytes(address)
        for length, shift, table in self._tables[len(address)]:
            if value >> shift in table:
                return length
        return None

    def covers(self, address: bytes) -> bool:
        return self.longest(address) is not None
