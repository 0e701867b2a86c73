"""What `ztun status` says of DNS servers and of datagrams, in words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ztun.cli.status import show_status


def udp(verdict: str, reason: str | None = None) -> dict[str, Any]:
    return {"type": "socks5", "udp": {"verdict": verdict, "opened": 1, "lost": 0, "refused": 2, "reason": reason}}


def shown(capsys: pytest.CaptureFixture[str], status: dict[str, Any]) -> list[str]:
    """The lines, with one space where there are several."""
    show_status({"state": "running", **status})
    return [re.sub(r"\s+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]


def test_dns_servers_have_a_row_each_with_their_latency_in_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    busy = {"count": 2, "sum_s": 0.05, "mean_s": 0.025, "max_s": 0.0401}
    idle = {"count": 0, "sum_s": 0.0, "mean_s": None, "max_s": None}
    servers = {
        "udp://9.9.9.9:53": {"queries": 3, "answers": 2, "timeouts": 1, "failures": 0, "latency": busy},
        "tls://[2620:fe::fe]:853": {"queries": 0, "answers": 0, "timeouts": 0, "failures": 0, "latency": idle},
    }

    lines = shown(capsys, {"dns": {"queries": 7, "servers": servers}})

    assert "dns queries 7" in lines
    assert "server queries answers timeouts failures mean ms max ms" in [line.lower() for line in lines]
    assert "udp://9.9.9.9:53 3 2 1 0 25.0 40.1" in lines
    assert "tls://[2620:fe::fe]:853 0 0 0 0 - -" in lines


def test_a_proxy_that_refuses_datagrams_is_shown_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "outbound office: proxy [::1]:1080: it does not support the command (UDP ASSOCIATE)"
    outbounds = {"office": udp("proxy", reason), "web": udp("reject", "by design"), "home": udp("proxy")}

    lines = shown(capsys, {"outbounds": outbounds})

    assert "office socks5 refused" in lines
    assert "web socks5 reject" in lines
    assert "home socks5 proxy" in lines
    assert [line for line in lines if line.startswith("no datagrams")] == [f"no datagrams: {reason}"]
