"""The JSON Schema against a real validator: it takes what `ztun check` takes, and refuses what has the wrong form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_cases import complaints, design
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_config_errors import JSON, LIKELY, PLACES, changed, read_mistakes
from test_examples import EXAMPLES

from ztun.config.schema import DESCRIPTIONS, DIALECT, keys_of, make_schema

VALIDATOR = Draft202012Validator(make_schema())

# What the mistakes of mistakes.txt are, in words of their lines, that no schema can know: one key against another, and
# values of the right form. Everything else is refused by the schema as well.
BEYOND_A_SCHEMA = (
    "host bits", "is not a network; write", "is not an IPv", "must be the first host", "must be null too",
    "has room for", "is too small for IPv6", "is more than pool.size", "is the TUN itself", "is there twice",
    "ports go from", "is not an address", "runs backwards", "is not a domain name", "is given without",
    "(RFC 7617", "(RFC 1929", "no outbound has the tag", "not everything can go", "needs a database", "ICMP has no",
    "never match together", "no name of `domain`", "107 bytes", "multicast", "a path goes with", "brackets",
    "10 potatoes", "1kB", "carries no datagrams", "is not captured", "no client's address",
)  # fmt: skip


def refusals(document: Any) -> list[str]:
    """The places that the schema refuses."""
    return [".".join(map(str, error.absolute_path)) for error in VALIDATOR.iter_errors(document)]


def test_the_command_prints_it() -> None:
    main = "import sys; from ztun.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", main, "schema"], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == make_schema()


def test_it_is_a_schema() -> None:
    assert make_schema()["$schema"] == DIALECT
    Draft202012Validator.check_schema(make_schema())


def test_every_key_is_described_and_nothing_else() -> None:
    schema = make_schema()
    keys = [(place, holder["properties"][key].get("description")) for place, holder, key in keys_of(schema)]
    assert [place for place, description in keys if not description] == []
    assert set(DESCRIPTIONS) == {place for place, _description in keys}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_takes_the_examples(path: Path) -> None:
    assert refusals(json.loads(path.read_text())) == []


def test_it_takes_the_configuration_of_the_design_and_an_empty_one() -> None:
    assert refusals(design()) == []
    assert refusals({}) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [(place, value) for place, value, said in read_mistakes() if not any(word in said for word in BEYOND_A_SCHEMA)],
)
def test_it_refuses_what_has_the_wrong_form(place: str, value: str) -> None:
    assert refusals(changed(place, json.loads(value)))


def test_it_says_where() -> None:
    wrong = {"tun": {"mtu": "1500"}, "capture": {"lan": ["eth 1"]}, "route": {"rules": [{"outbound": "direct"}]}}
    assert refusals(wrong) == ["tun.mtu", "capture.lan.0", "route.rules.0"]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_it_takes_whatever_is_taken(data: st.DataObject) -> None:
    document: Any = design()
    *way, last = data.draw(st.sampled_from(PLACES))
    holder = document
    for part in way:
        holder = holder[part]
    holder[last] = data.draw(JSON | LIKELY)
    if not complaints(document):
        assert refusals(document) == []
