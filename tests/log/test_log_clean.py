"""What never stands in a line: secrets, and what would move a cursor or turn text around."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from log.conftest import Log
from ztun.log.clean import Cleaner, escape
from ztun.log.lines import processors
from ztun.outbound.errors import unreachable
from ztun.ports import Destination

PASSWORD = "c'orrect \\ hörse/battery"
CREDENTIALS = [("lab", PASSWORD), ("other", "staple")]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("line\r\nforged level=error", "line\\r\\nforged level=error"),
        ("moc.\u202eelpmaxe", "moc.\\u202eelpmaxe"),
        ("a\u2066b\u2069c", "a\\u2066b\\u2069c"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("para\u2028graph\u2029", "para\\u2028graph\\u2029"),
        ("\x9bc1", "\\x9bc1"),
        ("lone\udcff", "lone\\udcff"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("bücher.example 漢字 🙂", "bücher.example 漢字 🙂"),
    ],
)
def test_what_is_not_printable_is_escaped(log: Log, console: Callable[..., str], text: str, escaped: str) -> None:
    log.get().info("seen", name=text, inside={"deep": [text]}, error=ValueError(text))

    event = log.events[0]
    assert event["name"] == event["error"] == event["inside"]["deep"][0] == escaped
    assert escaped in log.text.replace("\\\\", "\\")
    assert escaped.split()[0] in console("seen", name=text).replace("\\\\", "\\")


@given(st.text())
def test_escaping_leaves_only_printable_text(text: str) -> None:
    assert escape(text).isprintable()
    assert escape(text) == text or not text.isprintable()


def test_an_event_text_is_cleaned_as_well(log: Log) -> None:
    log.get().info("a line of the store:\n\x1b[31mdone")

    assert log.said() == ["a line of the store:\\n\\x1b[31mdone"]


@pytest.mark.parametrize(
    "text",
    [
        PASSWORD,
        f"login as lab with {PASSWORD} failed",
        repr(PASSWORD),
        ascii(PASSWORD),
        repr(PASSWORD.encode()),
        quote(PASSWORD),
        quote(PASSWORD, safe=""),
        base64.b64encode(f"lab:{PASSWORD}".encode()).decode(),
        base64.b64encode(f"lab:{PASSWORD}".encode("latin-1")).decode(),
        "staple",
        "Proxy-Authorization: Basic bm9ib2R5OmtuZXc=",
        "proxy-authorization:bm9ib2R5OmtuZXc=",
        "{'Proxy-Authorization': 'Basic bm9ib2R5OmtuZXc='}",
        "http://somebody:bm9ib2R5OmtuZXc=@proxy.example:3128/",
    ],
)
def test_no_form_of_a_secret_is_written(log: Log, text: str) -> None:
    log.configure(credentials=CREDENTIALS, level="debug")
    logger = log.get()
    logger.info("plain", detail=text, nested={"a": [text]}, octets=text.encode("utf-8", "backslashreplace"))
    logger.info(f"in the event: {text}")
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        logger.exception("failed", reason=error)
    log.configure(credentials=CREDENTIALS, format="console")
    logger.info("plain", detail=text)

    for secret in (text, "staple", "orrect", "battery", "bm9ib2R5OmtuZXc="):
        assert secret not in log.text.replace("Proxy-Authorization: ***", "")
    assert log.text.count("***") >= 6


@pytest.mark.parametrize("key", ["password", "passwd", "proxy_authorization", "Authorization", "secret", "api_key"])
@pytest.mark.parametrize("value", ["anything", b"anything", ["anything"], 12.5])
def test_a_value_with_the_name_of_a_secret_is_hidden(log: Log, key: str, value: Any) -> None:
    log.get().info("seen", **{key: value}, headers={key: value})

    assert log.events[0][key] == "***"
    assert log.events[0]["headers"] == {key: "***"}


def test_a_short_password_is_found_as_a_word_and_nothing_else_is_hidden() -> None:
    cleaner = Cleaner([("u", "p"), ("v", "xy")])

    assert cleaner.text("socks5 said: u:p is wrong, or p") == "socks5 said: u:*** is wrong, or ***"
    assert cleaner.text("proxy happy") == "proxy happy"


def test_a_url_keeps_its_host(log: Log) -> None:
    log.get().info("seen", server="https://dns.example/dns-query", proxy="socks5://u:pw@192.0.2.1:1080")

    assert log.events[0]["server"] == "https://dns.example/dns-query"
    assert log.events[0]["proxy"] == "socks5://***@192.0.2.1:1080"


def test_an_error_of_an_outbound_is_cleaned(log: Log) -> None:
    error = unreachable(Destination("evil\x1b[2J\u202e.example", 443), OSError(113, "No route to host"))
    log.get().info("refused", detail=error)

    assert log.events[0]["detail"] == "evil\\x1b[2J\\u202e.example port 443: No route to host"
    assert "\x1b" not in json.dumps(log.text, ensure_ascii=False)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


class _Named:
    name = "ztun.app"


@given(st.text(), st.dictionaries(st.sampled_from(["name", "detail", "level", "up"]), _VALUES))
def test_whatever_comes_it_is_one_printable_line(event: str, values: dict[str, Any]) -> None:
    cleaner = Cleaner([("u", "pass")])
    for format in ("json", "console"):
        line: Any = {"event": event, **values}
        for processor in processors(cleaner, format, with_time=format == "json"):
            line = processor(_Named(), "info", line)

        assert line.isprintable()
        if format == "json":
            assert json.loads(line).keys() >= {"timestamp", "level", "logger", "event"}
