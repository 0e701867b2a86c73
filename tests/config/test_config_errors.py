"""What is said about a wrong configuration: one line for each thing, naming the place and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from config_cases import complaints, design, parse
from hypothesis import given, settings
from hypothesis import strategies as st

MISTAKES = Path(__file__).with_name("mistakes.txt")


def changed(path: str, value: Any) -> dict[str, Any]:
    """The configuration of the design with the value at the path (dots and numbers) put in."""
    document: Any = design()
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    holder = document
    for part in way:
        holder = holder[part]
    holder[last] = value
    return dict(document)


def read_mistakes() -> Iterator[tuple[str, str, str]]:
    """Place, JSON and line of each case in mistakes.txt."""
    lines = [line for line in MISTAKES.read_text().splitlines() if line and not line.startswith("#")]
    for mistake, said in zip(lines[::2], lines[1::2], strict=True):
        place, value = mistake.split(" = ", 1)
        yield place, value, said.removeprefix("    ")


@pytest.mark.parametrize(("place", "value", "said"), [*read_mistakes()])
def test_a_mistake_gets_one_line(place: str, value: str, said: str) -> None:
    assert complaints(changed(place, json.loads(value))) == [said]


def test_a_key_that_would_break_the_line_is_written_escaped() -> None:
    assert complaints({"tun": {"a\nb": 1}}) == ["tun['a\\nb']: unknown key; known here: name, mtu, address, address6"]


def test_tags_are_ones_own_and_not_reserved() -> None:
    web = {"type": "http", "server": "10.1.1.2:3128"}
    assert complaints({"outbounds": [{"tag": tag, **web} for tag in ("web", "dns", "web", "direct")]}) == [
        "outbounds[1].tag: 'dns' is always there and cannot be defined; choose another tag",
        "outbounds[2].tag: the tag 'web' is already that of outbounds[0]; choose another",
        "outbounds[3].tag: 'direct' is always there and cannot be defined; choose another tag",
    ]


@pytest.mark.parametrize("builtin", ["127.0.0.0/8", "224.0.0.0/4", "169.254.0.0/17", "0.0.0.0/0"])
def test_fake_ips_cannot_be_what_is_never_forwarded(builtin: str) -> None:
    (line,) = complaints({"dns": {"fake_ip": {"range": builtin}}})
    assert line.startswith(f"dns.fake_ip.range: {builtin} overlaps ")
    assert line.endswith("which is never forwarded; choose another range")


@pytest.mark.parametrize("size", [1, 253, 254, 8192, 131069])
def test_the_length_that_is_proposed_for_a_fake_range_is_the_longest_that_fits(size: int) -> None:
    def ranged(length: int) -> list[str]:
        return complaints({"dns": {"fake_ip": {"range": f"10.0.0.0/{length}", "range6": None, "size": size}}})

    proposed = int(ranged(31)[0].partition("make it a /")[2].partition(" ")[0])
    assert ranged(proposed) == []
    assert len(ranged(proposed + 1)) == 1


def test_all_mistakes_are_said_at_once_in_the_order_of_the_design() -> None:
    document = {
        "timeouts": {"dial": 0},
        "route": {
            "rules": [
                {"ip_cidr": "192.0.2/24", "outbound": "offce"},
                {"domain": "a.example", "port": 0},
            ],
        },
        "outbounds": [{"tag": "office", "type": "socks5"}, 4],
        "tun": {"nam": "ztun1", "mtu": 5},
        "dns": {"fake_ip": {"range": "10.0.0.0/24", "sise": 3}},
    }
    assert complaints(document) == [
        "tun.mtu: must be at least 576, not 5",
        "tun.nam: unknown key; did you mean 'name'?",
        "dns.fake_ip.range: 10.0.0.0/24 has room for 253 names, and size is 8192; make it a /18 or size less",
        "dns.fake_ip.sise: unknown key; did you mean 'size'?",
        "outbounds[0].server: is missing",
        "outbounds[1]: must be an object, not 4",
        "route.rules[0].ip_cidr[0]: '192.0.2/24' is not a network; write one as 192.0.2.0/24 or 2001:db8::/32",
        "route.rules[0].outbound: no outbound has the tag 'offce'; known: direct, block, dns, office",
        "route.rules[1].outbound: is missing",
        "route.rules[1].port[0]: '0' is not a port; ports go from 1 to 65535",
        "timeouts.dial: must be more than 0, not 0",
    ]


def everywhere(document: Any, way: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The place of every value in a document."""
    if not isinstance(document, dict | list):
        return [way]
    parts = document.items() if isinstance(document, dict) else enumerate(document)
    return [way, *(place for part, value in parts for place in everywhere(value, (*way, part)))]


PLACES = everywhere(design())[1:]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
LIKELY = st.sampled_from(
    ["10.0.0.0/8", "::/0", "a:1", "[::1]:1", "udp://", "https://[", "-", "1-", "xn--", "\ud800", "é.", "tag", 1e308]
)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_stands_anywhere_is_taken_or_said_in_lines_that_name_the_file(data: st.DataObject) -> None:
    document: Any = design()
    *way, last = data.draw(st.sampled_from(PLACES))
    holder = document
    for part in way:
        holder = holder[part]
    holder[last] = data.draw(JSON | LIKELY)
    for line in complaints(document):
        assert line
        assert line.isprintable()
        assert "\n" not in line


@pytest.mark.parametrize("value", ["hunter2", ["hunter2"], {"hunter2": "hunter2"}])
@pytest.mark.parametrize("key", ["password", "pasword", "secret"])
def test_what_stands_for_the_password_is_not_repeated(key: str, value: Any) -> None:
    lines = complaints(changed(f"outbounds.1.{key}", value))
    assert lines
    assert not any("hunter2" in line for line in lines)


def test_a_good_password_is_in_nothing_that_is_printed() -> None:
    read = parse(changed("outbounds.0.password", "hunter2"))
    for text in (repr(read), str(read), read.model_dump_json(), repr(read.model_dump())):
        assert "hunter2" not in text
