"""The prefix and address tables of the classifier: maps whose values are struct decision."""

from __future__ import annotations

import errno
import itertools
import socket
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ztun.errors import ZtunError
from ztun.platform.linux.layout import DECISION, RECENT, U32
from ztun.platform.linux.maps import Map
from ztun.ports import Prefix, Verdict

_STEP = 4096  # prefixes that are looked at before others have their turn
_MAPPED = b"\0" * 10 + b"\xff\xff"  # ::ffff:0:0/96 (RFC 4291, 2.5.5.2)


class PrefixTable:
    """An LPM trie that knows what it holds, so that only differences are written."""

    def __init__(self, trie: Map) -> None:
        self._trie = trie
        self._installed: dict[bytes, tuple[Verdict, int]] = {}

    def replace(self, prefixes: Iterable[Prefix]) -> None:
        """Make the trie equal to `prefixes`, all of one address family. Hits of what stays are kept.

        Raises ZtunError when there are more than the map takes.
        """
        for _ in self.replacing(prefixes):
            pass

    def replacing(self, prefixes: Iterable[Prefix]) -> Iterator[None]:
        """The same in steps of some milliseconds. `rules` tells of the former ones until the last."""
        wanted: dict[bytes, tuple[Verdict, int]] = {}
        changed: dict[bytes, bytes] = {}
        rest = iter(prefixes)
        while some := list(itertools.islice(rest, _STEP)):
            for prefix in some:
                key, decision = U32.pack(prefix.length) + prefix.network, (prefix.verdict, prefix.rule)
                wanted[key] = decision
                if self._installed.get(key) != decision:
                    changed[key] = DECISION.pack(*decision, 0)
                else:
                    changed.pop(key, None)
            yield
        # New ones first: an address never falls through to a shorter prefix on the way.
        try:
            yield from self._trie.updating(changed)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise ZtunError(f"{len(wanted)} prefixes are more than the kernel table takes: use fewer") from error
            raise
        yield from self._trie.deleting(key for key in self._installed if key not in wanted)
        self._installed = wanted

    def rules(self) -> set[int]:
        """The ids of the rules that decided something here."""
        return {rule for _, rule in self._installed.values()}

    def describe(self, untold: Mapping[bytes, int] = MappingProxyType({})) -> list[dict[str, Any]]:
        """[{"prefix", "verdict", "rule", "hits"}], in the order of addresses. untold: see the function."""
        entries = sorted(self._trie.items(), key=lambda item: (item[0][U32.size :], item[0]))
        more = self._share(untold, {key for key, _ in entries}) if untold else {}
        return [{"prefix": _show_prefix(key), **_show_decision(value, more.get(key, 0))} for key, value in entries]

    @staticmethod
    def _share(untold: Mapping[bytes, int], keys: Collection[bytes]) -> Counter[bytes]:
        """Key of the longest prefix -> hits of the addresses in it."""
        shared: Counter[bytes] = Counter()
        size = len(next(iter(keys), b"")) - U32.size
        lengths = sorted({U32.unpack_from(key)[0] for key in keys}, reverse=True)
        for address, hits in untold.items():
            packed = narrow(address)
            matching = (_key_of(packed, length) for length in lengths if len(packed) == size)
            key = next((key for key in matching if key in keys), None)
            if key is not None:
                shared[key] += hits
        return shared


def describe_learned(table: Map, untold: MutableMapping[bytes, int] | None = None) -> Iterator[dict[str, Any]]:
    """{"address", "verdict", "rule", "hits"} of each learned address. Takes what is its own out of `untold`."""
    for key, value in table.items():
        more = untold.pop(widen(key), 0) if untold else 0
        yield {"address": show_address(key), **_show_decision(value, more)}


class Recent(NamedTuple):
    """struct recent: an address, as 16 bytes, that packets went to directly a moment ago, by way of one CPU."""

    address: bytes
    generation: int
    rule: int
    has_decision: int
    hits: int


def read_recents(table: Map) -> list[Recent]:
    """All there are; more than one of an address that several CPUs see."""
    found = (Recent._make(fields) for _, values in table.items() for fields in RECENT.iter_unpack(values))
    return [recent for recent in found if recent.generation]


def untold(recents: Iterable[Recent]) -> dict[bytes, int]:
    """Address -> hits that the entry of a table which decides about it does not have yet."""
    found: Counter[bytes] = Counter()
    for recent in recents:
        if recent.has_decision and recent.hits:
            found[recent.address] += recent.hits
    return found


def describe_recents(recents: Iterable[Recent], generation: int) -> list[dict[str, Any]]:
    """[{"address", "rule"}] of those that still hold, by address."""
    rules = {recent.address: recent.rule for recent in recents if recent.generation == generation}
    return [{"address": show_address(address), "rule": rule} for address, rule in sorted(rules.items())]


def widen(address: bytes) -> bytes:
    """A packed address as 16 bytes, IPv4 as ::ffff:a.b.c.d: the keys of the maps that take both families."""
    return _MAPPED + address if len(address) == 4 else address


def show_address(packed: bytes) -> str:
    """4 or 16 bytes as text; an IPv4-mapped address as IPv4."""
    packed = narrow(packed)
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def narrow(address: bytes) -> bytes:
    """The opposite of `widen`."""
    return address[len(_MAPPED) :] if address.startswith(_MAPPED) else address


def _key_of(address: bytes, length: int) -> bytes:
    rest = len(address) * 8 - length
    return U32.pack(length) + (int.from_bytes(address) >> rest << rest).to_bytes(len(address))


def _show_prefix(key: bytes) -> str:
    network = key[U32.size :]
    family = socket.AF_INET if len(network) == 4 else socket.AF_INET6
    return f"{socket.inet_ntop(family, network)}/{U32.unpack_from(key)[0]}"


def _show_decision(value: bytes, more_hits: int) -> dict[str, Any]:
    verdict, rule, hits = DECISION.unpack(value)
    return {"verdict": Verdict(verdict).name.lower(), "rule": rule, "hits": hits + more_hits}
