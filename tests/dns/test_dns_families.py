"""Upstream servers of both families, by every transport, alone and behind servers that do not answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

import pytest
from certificates import Certificate
from dns_support import Bench, Dnsmasq, ScriptedServer, free_port, good_answer, rcode, told
from dnslib import DNSRecord
from test_dns_encrypted import HttpsServer, TlsServer
from test_dns_upstream import wrong_id, wrong_name

from ztun.config.values import join_endpoint

MakeBench = Callable[..., Bench]

BOTH = pytest.mark.parametrize("host", ["127.0.0.1", "::1"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Certificate]:
    return Certificate(tmp_path_factory.mktemp("certificate"), "127.0.0.1", "::1")


@pytest.fixture
async def urls(dnsmasq: Dnsmasq, certificate: Certificate, host: str) -> AsyncIterator[dict[str, str]]:
    """Scheme -> a server of the family that answers."""
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(ScriptedServer(lambda query, _tcp: [good_answer(query)], host=host))
        tls = await stack.enter_async_context(TlsServer(dnsmasq).running(certificate, host))
        https = await stack.enter_async_context(HttpsServer(dnsmasq).running(certificate, host))
        yield {
            "udp": plain.url,
            "tcp": plain.tcp_url,
            "tls": f"tls://{join_endpoint(host, tls.port)}",
            "https": f"https://{join_endpoint(host, https.port)}/dns-query",
        }


@BOTH
@pytest.mark.parametrize("scheme", ["udp", "tcp", "tls", "https"])
async def test_a_server_answers(
    make_bench: MakeBench, urls: dict[str, str], certificate: Certificate, scheme: str
) -> None:
    bench = make_bench([urls[scheme]], tls=certificate.client_context())
    assert len(told(await bench.ask("direct.example"))) == 1
    assert bench.counters["upstream_failures"] == 0


@BOTH
@pytest.mark.parametrize("scheme", ["udp", "tcp", "tls", "https"])
async def test_a_server_steps_in_for_those_of_all_kinds_that_are_gone(
    make_bench: MakeBench, urls: dict[str, str], certificate: Certificate, host: str, scheme: str
) -> None:
    gone = join_endpoint(host, free_port())
    dead = [f"udp://{gone}", f"tcp://{gone}", f"tls://{gone}", f"https://{gone}/dns-query"]
    bench = make_bench([*dead, urls[scheme]], tls=certificate.client_context())
    assert rcode(await bench.ask("direct.example")) == "NOERROR"
    assert bench.counters["upstream_failures"] == len(dead)


@BOTH
@pytest.mark.parametrize(("forge", "counter"), [(wrong_id, "wrong_id"), (wrong_name, "wrong_question")])
async def test_a_forged_answer_is_not_taken(
    make_bench: MakeBench, host: str, forge: Callable[[DNSRecord], bytes], counter: str
) -> None:
    async with ScriptedServer(lambda query, _tcp: [forge(query), good_answer(query)], host=host) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]
        assert bench.counters[f"upstream_{counter}"] == 1


@BOTH
async def test_a_truncated_answer_is_fetched_by_tcp(make_bench: MakeBench, host: str) -> None:
    def script(query: DNSRecord, over_tcp: bool) -> list[bytes]:
        reply = query.reply()
        reply.header.tc = 1
        return [good_answer(query) if over_tcp else reply.pack()]

    async with ScriptedServer(script, host=host) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]
        assert [transport for transport, _peer in server.peers] == ["udp", "tcp"]


async def test_a_server_of_the_other_family_steps_in(make_bench: MakeBench, dnsmasq: Dnsmasq) -> None:
    bench = make_bench([f"udp://[::1]:{free_port()}", dnsmasq.url])
    assert told(await bench.ask("direct.example", "AAAA")) == ["2001:db8::7"]
    assert bench.counters["upstream_failures"] == 1
