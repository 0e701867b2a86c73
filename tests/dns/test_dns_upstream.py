"""How upstream servers are asked: fail-over, loops, forgeries, and every transport."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Sequence

import pytest
from dns_support import (
    Bench,
    Dnsmasq,
    ScriptedServer,
    extended_error,
    free_port,
    good_answer,
    plain_sockets,
    rcode,
    told,
)
from dnslib import DNSRecord

from ztun.errors import ConfigError
from ztun.gateway.dns import upstream
from ztun.gateway.dns.servers import parse_server, parse_servers

MakeBench = Callable[..., Bench]


def good(query: DNSRecord, over_tcp: bool) -> list[bytes]:
    return [good_answer(query)]


def silent(query: DNSRecord, over_tcp: bool) -> list[bytes]:
    return []


# One server.


async def test_same_question_asked_by_many_at_once_goes_upstream_once(make_bench: MakeBench) -> None:
    async with ScriptedServer(good, delay=0.05) as server:
        bench = make_bench([server.url])
        spellings = ["www.direct.example", "WWW.direct.example", "www.DIRECT.example."] * 10
        replies = await asyncio.gather(*(bench.ask(name) for name in spellings))
        assert [told(reply) for reply in replies] == [["192.0.2.1"]] * 30
        assert [str(reply.q.qname) for reply in replies] == [name.rstrip(".") + "." for name in spellings]
        assert len(server.queries) == 1
        assert len(bench.learnt) == 30


async def test_client_that_goes_away_does_not_take_the_answer_from_others(make_bench: MakeBench) -> None:
    async with ScriptedServer(good, delay=0.1) as server:
        bench = make_bench([server.url])
        first = asyncio.ensure_future(bench.ask("www.direct.example"))
        await asyncio.sleep(0.02)
        second = asyncio.ensure_future(bench.ask("www.direct.example"))
        await asyncio.sleep(0.02)
        first.cancel()
        assert told(await second) == ["192.0.2.1"]
        assert len(server.queries) == 1


async def test_ids_and_ports_are_not_to_be_guessed(make_bench: MakeBench) -> None:
    async with ScriptedServer(good) as server:
        ports: list[int] = []

        def sockets(family: int, kind: int) -> socket.socket:
            sock = plain_sockets(family, kind)
            sock.bind(("127.0.0.1", 0))
            ports.append(sock.getsockname()[1])
            return sock

        bench = make_bench([server.url], sockets=sockets)
        for number in range(20):
            await bench.ask(f"n{number}.direct.example")
        assert len({query.header.id for query in server.queries}) >= 19
        assert len(set(ports)) == len(ports) == 20


def wrong_id(query: DNSRecord) -> bytes:
    query.header.id ^= 1
    forged = good_answer(query, "203.0.113.66")
    query.header.id ^= 1
    return forged


def wrong_name(query: DNSRecord) -> bytes:
    forged = DNSRecord.question("www.direct.exemple")
    forged.header.id = query.header.id
    return good_answer(forged, "203.0.113.66")


def no_response(query: DNSRecord) -> bytes:
    return bytes(query.pack())


@pytest.mark.parametrize(
    ("forge", "counter"),
    [
        (wrong_id, "upstream_wrong_id"),
        (wrong_name, "upstream_wrong_question"),
        (no_response, "upstream_not_a_response"),
        (lambda query: query.header.id.to_bytes(2) + b"?", "upstream_short"),
        (lambda query: good_answer(query, "203.0.113.66")[:-2], "upstream_record_cut_short"),
    ],
)
async def test_forged_answer_is_not_taken_for_the_true_one(
    make_bench: MakeBench, forge: Callable[[DNSRecord], bytes], counter: str
) -> None:
    async with ScriptedServer(lambda query, _tcp: [forge(query), good_answer(query)]) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]
        assert bench.counters[counter] == 1


async def test_answer_from_somewhere_else_never_reaches_us(make_bench: MakeBench) -> None:
    ours: list[socket.socket] = []

    def sockets(family: int, kind: int) -> socket.socket:
        ours.append(plain_sockets(family, kind))
        return ours[-1]

    def script(query: DNSRecord, over_tcp: bool) -> list[bytes]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as elsewhere:
            elsewhere.sendto(good_answer(query, "203.0.113.66"), ours[-1].getsockname())
        return [good_answer(query)]

    async with ScriptedServer(script) as server:
        bench = make_bench([server.url], sockets=sockets)
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]


async def test_flood_of_guesses_makes_us_ask_by_tcp(make_bench: MakeBench) -> None:
    async with ScriptedServer(
        lambda query, over_tcp: [good_answer(query)] if over_tcp else [wrong_id(query)] * 50
    ) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]
        assert bench.counters["upstream_tcp_fallback"] == 1


async def test_truncated_answer_is_fetched_by_tcp(make_bench: MakeBench) -> None:
    def script(query: DNSRecord, over_tcp: bool) -> list[bytes]:
        if over_tcp:
            return [good_answer(query)]
        reply = query.reply()
        reply.header.tc = 1
        return [reply.pack()]

    async with ScriptedServer(script) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]


async def test_server_that_does_not_know_edns_is_asked_without(make_bench: MakeBench) -> None:
    def script(query: DNSRecord, over_tcp: bool) -> list[bytes]:
        if not query.ar:
            return [good_answer(query)]
        reply = query.reply()
        reply.header.rcode = 1
        return [reply.pack()]

    async with ScriptedServer(script) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]
        assert [len(query.ar) for query in server.queries] == [1, 0]


async def test_spelling_is_varied_and_must_come_back(make_bench: MakeBench) -> None:
    async with ScriptedServer(good) as server:
        bench = make_bench([server.url], randomize_case=True)
        names = [f"a-rather-long-name-{number}.direct.example" for number in range(5)]
        replies = [await bench.ask(name) for name in names]
        assert [str(reply.q.qname) for reply in replies] == [name + "." for name in names]
        sent = [str(query.q.qname) for query in server.queries]
        assert [name for name in sent if name in (name.lower(), name.upper())] == []
        assert bench.counters["upstream_wrong_case"] == 0


async def test_server_that_does_not_keep_the_spelling_is_asked_by_tcp(make_bench: MakeBench) -> None:
    def script(query: DNSRecord, over_tcp: bool) -> list[bytes]:
        if not over_tcp:
            query.q.qname = str(query.q.qname).lower()
        return [good_answer(query)]

    async with ScriptedServer(script) as server:
        bench = make_bench([server.url], randomize_case=True)
        assert told(await bench.ask("a-rather-long-name.direct.example")) == ["192.0.2.1"]
        assert bench.counters["upstream_wrong_case"] == 1


async def test_real_server_keeps_the_spelling(make_bench: MakeBench, dnsmasq: Dnsmasq) -> None:
    bench = make_bench([dnsmasq.url], randomize_case=True)
    assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
    assert bench.counters["upstream_tcp_fallback"] == 0


# Servers that fail.


async def test_nobody_listens_upstream(make_bench: MakeBench) -> None:
    bench = make_bench([f"udp://127.0.0.1:{free_port()}"])
    started = time.monotonic()
    reply = await bench.ask("www.direct.example", edns=1232)
    assert (rcode(reply), extended_error(reply)) == ("SERVFAIL", 22)
    assert time.monotonic() - started < 1  # said at once, by ICMP
    assert bench.counters["upstream_unanswered"] == 1


async def test_silence_is_a_server_failure_before_the_client_gives_up(make_bench: MakeBench) -> None:
    async with ScriptedServer(silent) as server:
        bench = make_bench([server.url], deadline=0.3)
        started = time.monotonic()
        assert rcode(await bench.ask("www.direct.example")) == "SERVFAIL"
        assert 0.2 < time.monotonic() - started < 1
        assert bench.counters["upstream_timeouts"] == 1


async def test_lost_datagram_is_sent_again(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(upstream._ATTEMPT_S, "udp", 0.1)
    async with ScriptedServer(lambda query, _tcp: [good_answer(query)] if len(server.queries) > 1 else []) as server:
        bench = make_bench([server.url])
        assert told(await bench.ask("www.direct.example")) == ["192.0.2.1"]
        assert len(server.queries) == 2


async def test_next_server_steps_in_and_the_failed_one_is_remembered(make_bench: MakeBench, dnsmasq: Dnsmasq) -> None:
    bench = make_bench([f"udp://127.0.0.1:{free_port()}", dnsmasq.url])
    for kind in ("A", "AAAA", "TXT"):
        assert rcode(await bench.ask("direct.example", kind)) == "NOERROR"
    assert bench.counters["upstream_failures"] == 1


async def test_server_that_recovered_is_used_again(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_FIRST_PENALTY_S", 0.3)
    monkeypatch.setitem(upstream._ATTEMPT_S, "udp", 0.3)
    async with ScriptedServer(silent) as first, ScriptedServer(good) as second:
        bench = make_bench([first.url, second.url])
        assert told(await bench.ask("a.direct.example")) == ["192.0.2.1"]
        first.script = good
        await asyncio.sleep(0.4)
        await bench.ask("b.direct.example")
        await bench.ask("c.direct.example")
        assert (len(first.queries), len(second.queries)) == (3, 1)


async def test_one_outage_counts_once_however_many_queries_it_met(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_FIRST_PENALTY_S", 0.3)
    monkeypatch.setitem(upstream._ATTEMPT_S, "udp", 0.3)
    async with ScriptedServer(silent) as first, ScriptedServer(good) as second:
        bench = make_bench([first.url, second.url])
        await asyncio.gather(*(bench.ask(f"n{number}.direct.example") for number in range(10)))
        first.script = good
        await asyncio.sleep(0.4)
        await bench.ask("later.direct.example")
        assert (len(first.queries), len(second.queries)) == (11, 10)


async def test_one_query_alone_finds_out_whether_a_server_is_back(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_FIRST_PENALTY_S", 0.3)
    monkeypatch.setitem(upstream._ATTEMPT_S, "udp", 0.3)
    async with ScriptedServer(silent) as first, ScriptedServer(good) as second:
        bench = make_bench([first.url, second.url])
        await bench.ask("first.direct.example")
        await asyncio.sleep(0.4)
        await asyncio.gather(*(bench.ask(f"n{number}.direct.example") for number in range(10)))
        assert (len(first.queries), len(second.queries)) == (2, 11)


@pytest.mark.parametrize("code", [2, 4, 5])
async def test_server_that_refuses_hands_over_to_the_next(make_bench: MakeBench, code: int) -> None:
    def refuse(query: DNSRecord, over_tcp: bool) -> list[bytes]:
        reply = query.reply()
        reply.header.rcode = code
        return [reply.pack()]

    async with ScriptedServer(refuse) as first, ScriptedServer(good) as second:
        bench = make_bench([first.url, second.url])
        assert told(await bench.ask("a.direct.example")) == ["192.0.2.1"]
        second.script = refuse
        reply = await bench.ask("b.direct.example")
        assert reply.header.rcode == code  # nobody knows better: the client is told what they say
        assert bench.counters["upstream_unanswered"] == 0


@pytest.mark.parametrize(("name", "kind"), [("loop.direct.example", "A"), ("loop6.direct.example", "AAAA")])
async def test_fake_ip_from_upstream_is_a_loop(make_bench: MakeBench, dnsmasq: Dnsmasq, name: str, kind: str) -> None:
    bench = make_bench([dnsmasq.url])
    assert rcode(await bench.ask(name, kind)) == "SERVFAIL"
    assert bench.counters["upstream_fake_ip"] >= 1
    assert bench.learnt == []


async def test_another_server_may_know_the_true_address(make_bench: MakeBench, dnsmasq: Dnsmasq) -> None:
    async with ScriptedServer(good) as second:
        bench = make_bench([dnsmasq.url, second.url])
        assert told(await bench.ask("loop.direct.example")) == ["192.0.2.1"]
        assert [each.address for each in bench.learnt] == ["192.0.2.1"]


async def test_too_many_questions_at_once_are_refused_not_queued(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_MAX_IN_FLIGHT", 5)
    async with ScriptedServer(good, delay=0.1) as server:
        bench = make_bench([server.url])
        replies = await asyncio.gather(*(bench.ask(f"n{number}.direct.example") for number in range(8)))
        assert [rcode(reply) for reply in replies].count("SERVFAIL") == 3
        assert bench.counters["overload_upstream"] == 3


async def test_closing_gives_up_what_is_under_way(make_bench: MakeBench) -> None:
    async with ScriptedServer(silent) as server:
        bench = make_bench([server.url, server.tcp_url])
        asking = asyncio.ensure_future(bench.ask("www.direct.example"))
        await asyncio.sleep(0.05)
        await bench.service.close()
        await bench.service.close()
        with pytest.raises(asyncio.CancelledError):
            await asking


# TCP.


async def test_queries_share_a_connection_and_do_not_wait_for_each_other(make_bench: MakeBench) -> None:
    delays = {"slow.direct.example.": 0.3}

    class Uneven(ScriptedServer):
        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async def answer(message: bytes) -> None:
                query = DNSRecord.parse(message)
                await asyncio.sleep(delays.get(str(query.q.qname), random.random() / 50))
                reply = good_answer(query)
                writer.write(len(reply).to_bytes(2) + reply)

            async with asyncio.TaskGroup() as group:
                while length := await reader.read(2):
                    group.create_task(answer(await reader.readexactly(int.from_bytes(length))))

    async with Uneven(good) as server:
        bench = make_bench([server.tcp_url])
        slow = asyncio.ensure_future(bench.ask("slow.direct.example"))
        await asyncio.gather(*(bench.ask(f"n{number}.direct.example") for number in range(20)))
        assert not slow.done()
        assert told(await slow) == ["192.0.2.1"]
        assert len(server.peers) == bench.counters["upstream_connections"] == 1


async def test_connection_that_the_server_closed_meanwhile_is_made_again(make_bench: MakeBench) -> None:
    class Forgetful(ScriptedServer):
        """Answers one query and closes when the next one comes."""

        async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            length = int.from_bytes(await reader.readexactly(2))
            for message in await self.reply(await reader.readexactly(length), True):
                writer.write(len(message).to_bytes(2) + message)
            await reader.read(1)
            writer.close()

    async with Forgetful(good) as server:
        bench = make_bench([server.tcp_url])
        for number in range(3):
            assert told(await bench.ask(f"n{number}.direct.example")) == ["192.0.2.1"]
        assert bench.counters["upstream_connections"] == 3
        assert bench.counters["upstream_failures"] == 0


async def test_connection_on_which_nothing_comes_any_more_is_given_up(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(upstream._ATTEMPT_S, "tcp", 0.2)
    async with ScriptedServer(good) as server:
        bench = make_bench([server.tcp_url])
        await bench.ask("a.direct.example")
        server.script = lambda query, _tcp: [] if len(server.peers) == 1 else [good_answer(query)]
        assert told(await bench.ask("b.direct.example")) == ["192.0.2.1"]
        assert len(server.peers) == 2


async def test_idle_connection_is_closed(make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztun.gateway.dns.stream._IDLE_S", 0.05)
    async with ScriptedServer(good) as server:
        bench = make_bench([server.tcp_url])
        await bench.ask("a.direct.example")
        await asyncio.sleep(0.15)
        await bench.ask("b.direct.example")
        assert len(server.peers) == 2


@pytest.mark.parametrize("noise", [b"\x00\x05hello", b"\x00\x00", b"\xff\xff" + b"?" * 100])
async def test_noise_on_a_stream_is_no_answer(make_bench: MakeBench, noise: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(noise)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        bench = make_bench([f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"])
        assert rcode(await bench.ask("www.direct.example")) == "SERVFAIL"


# Sockets and servers' names.


def from_our_address(family: int, kind: int) -> socket.socket:
    """Stands for the mark: what comes from 127.0.0.9 was made by the factory."""
    sock = plain_sockets(family, kind)
    sock.bind(("127.0.0.9", 0))
    return sock


async def test_all_sockets_are_made_by_the_factory(make_bench: MakeBench) -> None:
    def cut(query: DNSRecord, over_tcp: bool) -> Sequence[bytes]:
        reply = query.reply()
        reply.header.tc = 1
        return [good_answer(query) if over_tcp else reply.pack()]

    async with ScriptedServer(cut) as server:
        bench = make_bench([server.url], sockets=from_our_address)
        await bench.ask("www.direct.example")
        assert server.peers == [("udp", "127.0.0.9"), ("tcp", "127.0.0.9")]


@pytest.mark.parametrize(
    ("urls", "key"),
    [
        (["udp://127.0.0.1", "gopher://127.0.0.1"], r"dns.servers\[1\]"),
        (["tls://dns.example.net"], r"dns.servers\[0\]: 'dns.example.net' is a name"),
    ],
)
def test_servers_that_cannot_be_used_are_named(urls: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        parse_servers(urls)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("udp://9.9.9.9", "udp://9.9.9.9:53"),
        ("tls://[2620:fe::fe]", "tls://[2620:fe::fe]:853"),
        ("https://dns.example.net/dns-query", "https://dns.example.net:443/dns-query"),
    ],
)
def test_ports_of_servers_are_filled_in(url: str, shown: str) -> None:
    assert str(parse_server(url, "dns.servers[0]")) == shown
