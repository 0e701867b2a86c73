"""The examples are what a person starts from, so they must hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from ztun.config import load, to_rules
from ztun.ports import Prefix, Verdict
from ztun.rules import compile_prefixes, make_surroundings

DIRECTORY = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(DIRECTORY.glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_compiles(path: Path) -> None:
    settings = load(path, {})
    fake = settings.dns.fake_ip
    around = make_surroundings([], [network for network in (fake.range, fake.range6) if network is not None])
    table = compile_prefixes(to_rules(settings), around.builtin_direct, around.own_networks, around.fake_ranges)
    tunnel = Prefix(fake.range.network_address.packed, fake.range.prefixlen, Verdict.TUNNEL, -3)
    assert tunnel in table


def test_every_example_is_in_the_table_of_the_readme() -> None:
    readme = (DIRECTORY / "README.md").read_text()
    assert EXAMPLES
    assert all(f"| `{path.name}` |" in readme for path in EXAMPLES)
