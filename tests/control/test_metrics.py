"""GET /metrics: the status as OpenMetrics, read back by the library's own parser, and compared with its document."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from ztun.control import metrics
from ztun.control.server import ControlServer

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
STATUS: dict[str, Any] = {
    "state": "running",
    "uptime_s": 12.5,
    "pid": 4711,
    "version": "0.1.0",
    "backend": "tcx",
    "fallback_reason": None,
    "tcp": {
        "active": 3,
        "half_open": 1,
        "offloaded": 1,
        "offloaded_total": 3,
        "total": 10,
        "families": {"ipv4": 70, "ipv6": 30},
        "ended": {"finished": 6, "reset by client": 1},
        "failed": {},
    },
    "udp": {"rebuilt": 1},
    "dns": {
        "queries": 5,
        "cache_hits": 2,
        "servers": {
            "udp://9.9.9.9:53": {
                "queries": 3,
                "answers": 2,
                "timeouts": 1,
                "failures": 0,
                "latency": {"count": 2, "sum_s": 0.5, "mean_s": 0.25, "max_s": 0.4},
            },
            "tls://9.9.9.9:853": {
                "queries": 0,
                "answers": 0,
                "timeouts": 0,
                "failures": 0,
                "latency": {"count": 0, "sum_s": 0.0, "mean_s": None, "max_s": None},
            },
        },
    },
    "outbounds": {
        "office": {
            "type": "socks5",
            "dials": 9,
            "failures": {"timed out": 2},
            "drops": {},
            "udp": {"verdict": "proxy", "opened": 4, "lost": 1, "refused": 3, "reason": "it said no"},
        },
        "di\\rect\n": {
            "type": "direct",
            "dials": 1,
            "failures": {},
            "drops": {'say "no"': 4},
            "udp": {"verdict": "direct", "opened": 0, "lost": 0, "refused": 0, "reason": None},
        },
    },
    "network": {
        "state": "up",
        "egress": [{"to": "ipv4", "state": "up"}, {"to": "office", "state": "down"}],
        "lan": [{"name": "eth1", "state": "absent"}],
        "events": {"link": 7},
    },
    "drops": {"tcp-window": 5, "internal-error": 0},
    "log": {"written": 7, "suppressed": 0, "dropped": 1, "fault": "No space left on device"},
}


def samples(status: Mapping[str, Any]) -> dict[tuple[str, ...], float]:
    """(name, label value, …) -> value, as a collector sees them."""
    text = metrics.render(status).decode()
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_figure_of_the_status_is_there_with_its_labels() -> None:
    found = samples(STATUS)

    assert found["ztun_uptime_seconds",] == 12.5
    assert found["ztun_tcp_flows_active",] == 3
    assert found["ztun_tcp_flows_total",] == 10
    assert found["ztun_tcp_packets_total", "ipv6"] == 30
    assert found["ztun_tcp_flows_ended_total", "reset by client"] == 1
    assert found["ztun_outbound_failures_total", "office", "timed out"] == 2
    assert found["ztun_drops_total", "tcp-window"] == 5
    assert found["ztun_drops_total", "internal-error"] == 0
    assert found["ztun_log_lines_dropped_total",] == 1


def test_dns_servers_and_datagrams_have_figures_of_their_own() -> None:
    found = samples(STATUS)

    assert found["ztun_dns_events_total", "cache_hits"] == 2
    assert not [key for key in found if key[:2] == ("ztun_dns_events_total", "servers")]
    assert found["ztun_dns_server_queries_total", "udp://9.9.9.9:53"] == 3
    assert found["ztun_dns_server_timeouts_total", "udp://9.9.9.9:53"] == 1
    assert found["ztun_dns_server_latency_seconds_total", "udp://9.9.9.9:53"] == 0.5
    assert found["ztun_dns_server_latency_max_seconds", "udp://9.9.9.9:53"] == 0.4
    assert ("ztun_dns_server_latency_max_seconds", "tls://9.9.9.9:853") not in found  # it has not answered yet
    assert found["ztun_udp_links_rebuilt_total",] == 1
    assert found["ztun_outbound_udp_refused_total", "office"] == 3
    assert found["ztun_outbound_udp_refusing", "office"] == 1
    assert found["ztun_outbound_udp_refusing", "di\\rect\n"] == 0


def test_labels_are_escaped() -> None:
    assert samples(STATUS)["ztun_outbound_drops_total", "di\\rect\n", 'say "no"'] == 4


def test_texts_are_labels_flags_and_a_state() -> None:
    found = samples(STATUS)

    assert found["ztun_info", "tcx", "4711", "0.1.0"] == 1
    assert [state for state in metrics.STATES if found["ztun_state", state]] == ["running"]
    assert found["ztun_network_up",] == 1
    assert (found["ztun_network_egress_up", "ipv4"], found["ztun_network_egress_up", "office"]) == (1, 0)
    assert found["ztun_network_lan_up", "eth1"] == 0
    assert found["ztun_capture_fallback",] == 0
    assert found["ztun_log_faulty",] == 1


@pytest.mark.parametrize("status", [{}, {"state": "starting"}, {"tcp": {}}, {"tcp": None, "drops": [], "dns": 5}])
def test_what_the_status_does_not_have_is_left_out(status: dict[str, Any]) -> None:
    assert {name for name, *_ in samples(status)} <= {"ztun_info", "ztun_state"}


def test_names_follow_the_rules() -> None:
    names = [row.name for row in metrics.ROWS]

    assert len(set(names)) == len(names)
    for row in metrics.ROWS:
        assert re.fullmatch(r"ztun(_[a-z0-9]+)+", row.name)
        assert not row.name.endswith("_total")
        assert row.type in ("counter", "gauge", "flag", "up")
        assert row.help[0].isupper() or row.help[0] in "01"
        assert not row.help.endswith(".")


def documented() -> Iterator[tuple[str, str, list[str], str]]:
    for line in DOCUMENT.read_text().splitlines():
        row = re.fullmatch(r"\| `(\w+)` \| (\w+) \| (.*?) ?\| (.*) \|", line)
        if row:
            yield row[1], row[2], re.findall(r"`(\w+)`", row[3]), row[4]


def test_the_document_and_the_code_say_the_same() -> None:
    coded = [
        (
            row.name,
            {"flag": "gauge", "up": "gauge"}.get(row.type, row.type),
            re.findall(r"\{(\w+)\}", row.path),
            row.help,
        )
        for row in metrics.ROWS
    ]

    assert list(documented())[2:] == coded
    assert [row[:2] for row in documented()][:2] == [("ztun", "info"), ("ztun_state", "stateset")]


async def test_curl_gets_it_with_its_content_type(tmp_path: Path) -> None:
    import asyncio

    path = tmp_path / "c.sock"
    async with AsyncExitStack() as stack:
        server = ControlServer(path, status=lambda: STATUS, routes=dict, stop=lambda: None)
        await server.start()
        stack.push_async_callback(server.close)
        done = await asyncio.to_thread(
            subprocess.run,
            ["curl", "-sS", "-D", "-", "--unix-socket", str(path), "http://x/metrics"],
            capture_output=True,
            text=True,
            check=True,
        )

    head, body = done.stdout.replace("\r\n", "\n").split("\n\n", 1)
    assert head.startswith("HTTP/1.1 200")
    assert "content-type: application/openmetrics-text; version=1.0.0; charset=utf-8" in head.lower()
    assert body == metrics.render(STATUS).decode()
    assert body.endswith("# EOF\n")
