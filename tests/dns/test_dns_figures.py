"""What is counted of DNS transactions: queries, answers, what the cache gave, and how each server fares."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from dns_support import Bench, Dnsmasq, ScriptedServer, free_port, good_answer, rcode, told
from dnslib import DNSRecord

from ztun.gateway.dns import upstream
from ztun.gateway.dns.figures import ServerFigures

MakeBench = Callable[..., Bench]


def servers_of(bench: Bench) -> list[tuple[str, Any]]:
    return list(bench.service.statistics()["servers"].items())


async def test_a_conversation_in_figures(bench: Bench, dnsmasq: Dnsmasq) -> None:
    assert rcode(await bench.ask("site.office.example")) == "NOERROR"  # with a Fake-IP: nobody is asked
    for _ in range(3):
        assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
    assert rcode(await bench.ask("no.direct.example")) == "NXDOMAIN"

    figures = bench.service.statistics()
    assert (figures["queries"], figures["answers"]) == (5, 5)
    assert (figures["cache_hits"], figures["cache_misses"]) == (2, 2)
    ((server, it),) = servers_of(bench)
    assert server == dnsmasq.url
    assert (it["queries"], it["answers"], it["timeouts"], it["failures"]) == (2, 2, 0, 0)
    assert it["latency"]["count"] == 2
    assert 0 < it["latency"]["mean_s"] <= it["latency"]["max_s"] < 1
    assert it["latency"]["sum_s"] == pytest.approx(2 * it["latency"]["mean_s"], abs=1e-5)


async def test_latency_is_the_servers_own(make_bench: MakeBench) -> None:
    async with ScriptedServer(lambda query, _: [good_answer(query)], delay=0.1) as slow:
        bench = make_bench([slow.url])
        await bench.ask("a.direct.example")
        slow.delay = 0.0
        await bench.ask("b.direct.example")
        ((_, it),) = servers_of(bench)
    assert it["latency"]["max_s"] >= 0.1
    assert 0.05 <= it["latency"]["mean_s"] < it["latency"]["max_s"]


async def test_a_silent_server_and_the_one_that_stepped_in(
    make_bench: MakeBench, dnsmasq: Dnsmasq, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(upstream._ATTEMPT_S, "udp", 0.1)
    async with ScriptedServer(lambda query, _: []) as silent:
        bench = make_bench([silent.url, dnsmasq.url])
        await bench.ask("direct.example")
        (first, mute), (second, good) = servers_of(bench)
    assert (first, second) == (silent.url, dnsmasq.url)
    assert (mute["queries"], mute["answers"], mute["timeouts"], mute["failures"]) == (1, 0, 1, 0)
    assert mute["latency"] == {"count": 0, "sum_s": 0.0, "mean_s": None, "max_s": None}
    assert (good["queries"], good["answers"], good["timeouts"], good["failures"]) == (1, 1, 0, 0)


async def test_a_server_that_is_not_there_fails_and_the_client_is_answered_still(make_bench: MakeBench) -> None:
    bench = make_bench([f"udp://127.0.0.1:{free_port()}"])
    assert rcode(await bench.ask("direct.example")) == "SERVFAIL"
    ((_, it),) = servers_of(bench)
    assert it["queries"] == it["failures"] == 3
    assert it["answers"] == it["timeouts"] == 0
    assert bench.counters["answers"] == bench.counters["queries"] == 1


async def test_a_message_that_is_no_query_is_counted_and_not_answered(bench: Bench) -> None:
    assert await bench.service.answer(b"?", over_tcp=False) is None
    assert bench.counters["queries"] == 1
    assert bench.counters["answers"] == 0


async def test_one_question_of_many_clients_is_one_query(make_bench: MakeBench) -> None:
    async with ScriptedServer(lambda query, _: [good_answer(query)], delay=0.05) as server:
        bench = make_bench([server.url])
        replies: list[DNSRecord] = await asyncio.gather(*(bench.ask("direct.example") for _ in range(20)))
        ((_, it),) = servers_of(bench)
    assert {told(reply)[0] for reply in replies} == {"192.0.2.1"}
    assert it["queries"] == it["answers"] == 1
    assert bench.counters["answers"] == 20
    assert bench.counters["cache_misses"] == 20


def test_the_figures_of_a_server() -> None:
    it = ServerFigures()
    it.queries = 4
    for seconds in (0.010, 0.030, 0.020):
        it.answered(seconds)
    it.timeouts += 1
    assert it.describe() == {
        "queries": 4, "answers": 3, "timeouts": 1, "failures": 0,
        "latency": {"count": 3, "sum_s": 0.06, "mean_s": 0.02, "max_s": 0.03},
    }  # fmt: skip
