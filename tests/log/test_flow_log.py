"""The line of a finished flow: plain values in, text only for what is written."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from log.conftest import Log
from ztun.compiled import is_compiled
from ztun.gateway import flowlog
from ztun.gateway.flowlog import FlowLog
from ztun.log.repeats import Limit

CLIENT4 = socket.inet_pton(socket.AF_INET, "10.10.0.2")
CLIENT6 = socket.inet_pton(socket.AF_INET6, "fd10:10::2")


def finish(flows: FlowLog, client: bytes = CLIENT4, host: str = "www.site.test", **more: Any) -> None:
    flows.finished("tcp", client, 40000, host, 443, 3, "office", 1234, 98765, 12.34567, "finished", **more)


def refuse(flows: FlowLog) -> None:
    said = "outbound office: proxy 10.1.1.1:1080: no"
    flows.refused("tcp", CLIENT6, 40000, "2001:db8::10", 443, -1, "office", 0.5, "refused", said)


def test_a_finished_flow(log: Log) -> None:
    finish(FlowLog(log.get("ztun.flow")))

    event = log.events[0]
    del event["timestamp"]
    assert event == {
        "level": "info",
        "logger": "ztun.flow",
        "event": "flow ended",
        "protocol": "tcp",
        "client": "10.10.0.2:40000",
        "name": "www.site.test",
        "destination": "www.site.test:443",
        "rule": 3,
        "outbound": "office",
        "up": 1234,
        "down": 98765,
        "seconds": 12.346,
        "how": "finished",
    }


def test_a_refused_flow(log: Log) -> None:
    refuse(FlowLog(log.get("ztun.flow")))

    event = log.events[0]
    del event["timestamp"]
    assert event == {
        "level": "info",
        "logger": "ztun.flow",
        "event": "flow refused",
        "protocol": "tcp",
        "client": "[fd10:10::2]:40000",
        "name": None,
        "destination": "[2001:db8::10]:443",
        "rule": -1,
        "outbound": "office",
        "seconds": 0.5,
        "how": "refused",
        "detail": "outbound office: proxy 10.1.1.1:1080: no",
    }


@pytest.mark.parametrize(
    ("host", "name", "expected"),
    [
        ("198.51.100.10", None, None),
        ("2001:db8::10", None, None),
        ("198.51.100.10", "direct.test", "direct.test"),
        ("4.example", None, "4.example"),
    ],
)
def test_the_name_is_what_the_client_asked_for(log: Log, host: str, name: str | None, expected: str | None) -> None:
    finish(FlowLog(log.get("ztun.flow")), host=host, name=name)

    assert log.events[0]["name"] == expected


def test_a_udp_session_tells_how_many_destinations_it_had(log: Log) -> None:
    flows = FlowLog(log.get("ztun.flow"))
    flows.finished("udp", CLIENT4, 5353, "203.0.113.10", 7000, 0, "socks", 5, 6, 300.0, "idle", destinations=2)

    assert (log.events[0]["protocol"], log.events[0]["destinations"]) == ("udp", 2)


def test_a_name_from_the_wire_is_escaped(log: Log) -> None:
    finish(FlowLog(log.get("ztun.flow")), host="evil\x1b[2J\u202e.example")

    assert log.events[0]["name"] == "evil\\x1b[2J\\u202e.example"
    assert log.events[0]["destination"] == "evil\\x1b[2J\\u202e.example:443"


@pytest.mark.parametrize("why", ["level", "limit", "nowhere"])
def test_nothing_is_formatted_for_a_line_that_is_not_written(
    log: Log, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows = FlowLog(log.get("ztun.flow"))
    if why == "level":
        log.system.levels.set("warning", "flow")
    elif why == "limit":
        log.configure(flows=Limit(1, 0.001))
        finish(flows)
        refuse(flows)
    else:
        log.system.close()
    written = log.system.statistics()["written"]

    def formatted(*_: Any) -> dict[str, Any]:
        raise AssertionError("formatted")

    monkeypatch.setattr(flowlog, "_describe", formatted)
    for _ in range(3):
        finish(flows)
        refuse(flows)
    assert log.system.statistics()["written"] == written
    assert log.system.statistics()["suppressed"] == (6 if why == "limit" else 0)


def test_a_flow_that_is_limited_does_not_hide_those_of_other_kinds(log: Log) -> None:
    log.configure(flows=Limit(1, 0.001))
    flows = FlowLog(log.get("ztun.flow"))
    for _ in range(3):
        finish(flows)
    refuse(flows)

    assert log.said() == ["flow ended", "flow refused"]


def test_below_the_level_it_is_one_look(log: Log) -> None:
    """Counted in calls, since times are worth nothing on a busy machine."""
    import sys

    flows = FlowLog(log.get("ztun.flow"))
    log.system.levels.set("warning", "flow")
    calls: list[str] = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        finish(flows)
    finally:
        sys.setprofile(None)
    seen = [] if is_compiled() else ["finished"]  # the profiler sees no calls of compiled code
    assert [name for name in calls if name not in ("finish", "<lambda>")] == seen
