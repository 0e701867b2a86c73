"""Tables in the kernel that are changed a part at a time."""

from __future__ import annotations

import itertools

import pytest
from lan_world import Bench

from ztun.platform.linux.layout import DECISION, U32
from ztun.platform.linux.maps import Map
from ztun.platform.linux.tables import PrefixTable
from ztun.ports import Prefix, Verdict

MANY = 10_000  # more than two system calls take


def prefixes(count: int, rule: int) -> list[Prefix]:
    return [Prefix((0x0B000000 + (n << 8)).to_bytes(4), 24, Verdict.TUNNEL, rule) for n in range(count)]


@pytest.fixture
def trie(bench: Bench) -> Map:
    return Map(bench.objects.maps["prefixes4"], 8, DECISION.size)


def shown(table: PrefixTable) -> list[tuple[str, int]]:
    return [(entry["prefix"], entry["rule"]) for entry in table.describe()]


def test_rules_are_replaced_in_steps(trie: Map) -> None:
    table = PrefixTable(trie)
    table.replace(prefixes(MANY, 1))
    assert len(shown(table)) == MANY

    steps = table.replacing(prefixes(MANY // 2, 2))
    seen = []
    for _ in steps:
        seen.append(table.rules())  # others have their turn here
    assert len(seen) >= 2 + 2 + 2  # to compare, to write, to remove
    assert set(itertools.chain.from_iterable(seen)) == {1}
    assert table.rules() == {2}
    assert len(shown(table)) == MANY // 2
    assert {rule for _, rule in shown(table)} == {2}

    table.replace([])
    assert shown(table) == []


def test_hits_of_what_stays_are_kept(trie: Map) -> None:
    table = PrefixTable(trie)
    table.replace(prefixes(3, 1))
    key = U32.pack(24) + prefixes(1, 1)[0].network
    trie.update(key, DECISION.pack(Verdict.TUNNEL, 1, 77))
    table.replace([*prefixes(1, 1), *prefixes(3, 2)[1:]])
    assert [entry["hits"] for entry in table.describe()] == [77, 0, 0]


@pytest.mark.parametrize("absent", [[0], [5], [9], [0, 1, 2], [3, 4, 9], list(range(10)), []])
def test_what_is_gone_already_does_not_keep_the_rest(trie: Map, absent: list[int]) -> None:
    keys = [U32.pack(24) + prefix.network for prefix in prefixes(11, 1)]
    trie.update_many({key: DECISION.pack(1, 1, 0) for n, key in enumerate(keys) if n not in absent})
    trie.delete_many(keys[:10])
    assert [key for key, _ in trie.items()] == [keys[10]]
