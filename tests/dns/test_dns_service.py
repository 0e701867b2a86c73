"""The DNS service as its clients see it, with dnsmasq behind it and dig in front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from ipaddress import ip_address

import pytest
from dns_support import Bench, Dnsmasq, Learnt, extended_error, free_port, rcode, told
from dnslib import DNSRecord

from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, Failure, OutboundError
from ztun.rules import Rule

TRANSPORTS = pytest.mark.parametrize("transport", ["+notcp", "+tcp"])


@TRANSPORTS
async def test_proxied_name_gets_its_fake_ips(bench: Bench, transport: str) -> None:
    await bench.listen()
    assert await bench.dig_short(transport, "www.example") == ["198.18.0.2"]
    assert await bench.dig_short(transport, "www.example", "AAAA") == ["2001:2::2"]
    assert await bench.dig_short(transport, "other.example") == ["198.18.0.3"]
    output = await bench.dig(transport, "WwW.eXample")
    assert "WwW.eXample.\t\t300\tIN\tA\t198.18.0.2" in output
    assert "flags: qr rd ra;" in output
    assert bench.pool.name_of(ip_address("198.18.0.2").packed) == "www.example"
    assert bench.counters["fake"] == 4


@TRANSPORTS
async def test_direct_name_gets_its_real_addresses_and_they_are_learnt(bench: Bench, transport: str) -> None:
    await bench.listen()
    assert await bench.dig_short(transport, "direct.example") == ["192.0.2.7"]
    assert bench.learnt == [Learnt("192.0.2.7", 60, 0)]
    assert await bench.dig_short(transport, "direct.example", "AAAA") == ["2001:db8::7"]
    assert await bench.dig_short(transport, "alias.direct.example") == ["direct.example.", "192.0.2.7"]
    assert bench.learnt[1:] == [Learnt("2001:db8::7", 60, 0), Learnt("192.0.2.7", 60, 0)]


async def test_addresses_are_learnt_before_the_answer_leaves(
    make_bench: Callable[..., Bench], dnsmasq: Dnsmasq
) -> None:
    bench = make_bench([dnsmasq.url])
    query = DNSRecord.question("direct.example").pack()
    answering = asyncio.ensure_future(bench.service.answer(query, over_tcp=False))
    answering.add_done_callback(lambda _done: bench.learnt.append(Learnt("the answer leaves", 0, 0)))
    await answering
    await asyncio.sleep(0)
    assert [each.address for each in bench.learnt] == ["192.0.2.7", "the answer leaves"]


async def test_hints_in_https_records_of_direct_names_are_learnt_too(bench: Bench) -> None:
    reply = await bench.ask("direct.example", "HTTPS")
    assert reply.rr
    assert bench.learnt == [Learnt("192.0.2.99", 60, 0)]


async def test_learning_repeats_when_the_answer_comes_from_the_cache(bench: Bench, dnsmasq: Dnsmasq) -> None:
    await bench.ask("direct.example")
    asked = dnsmasq.queries("direct.example").count("A")
    await bench.ask("DIRECT.example")
    assert dnsmasq.queries("direct.example").count("A") == asked
    assert bench.counters["cache_hits"] == 1
    assert [each.address for each in bench.learnt] == ["192.0.2.7"] * 2


async def test_default_rule_is_named_when_no_rule_matched(make_bench: Callable[..., Bench], dnsmasq: Dnsmasq) -> None:
    bench = make_bench([dnsmasq.url], rules=(), default="direct")
    assert told(await bench.ask("direct.example")) == ["192.0.2.7"]
    assert bench.learnt == [Learnt("192.0.2.7", 60, RULE_DEFAULT)]


@TRANSPORTS
@pytest.mark.parametrize("kind", ["A", "AAAA", "HTTPS", "TXT"])
async def test_blocked_name_does_not_exist(bench: Bench, transport: str, kind: str, dnsmasq: Dnsmasq) -> None:
    await bench.listen()
    output = await bench.dig(transport, "ads.blocked.example", kind)
    assert "status: NXDOMAIN" in output
    assert "EDE: 15 (Blocked)" in output
    assert dnsmasq.queries("ads.blocked.example") == []


@pytest.mark.parametrize("kind", ["HTTPS", "TYPE64"])
async def test_service_bindings_of_proxied_names_are_empty(bench: Bench, kind: str, dnsmasq: Dnsmasq) -> None:
    reply = await bench.ask("www.example", kind)
    assert (rcode(reply), reply.rr, reply.auth) == ("NOERROR", [], [])
    assert dnsmasq.queries("www.example") == []


async def test_other_types_of_proxied_names_are_asked_upstream_and_counted(bench: Bench) -> None:
    assert told(await bench.ask("mail.example", "MX")) == ["10 mx.mail.example."]
    assert bench.counters["fake_forwarded"] == 1
    assert bench.learnt == []


async def test_any_is_answered_with_next_to_nothing(bench: Bench, dnsmasq: Dnsmasq) -> None:
    await bench.listen()
    assert 'HINFO\t"RFC8482" ""' in await bench.dig("direct.example", "ANY", "+notcp")


@TRANSPORTS
async def test_reverse_name_of_a_fake_ip_is_the_name(bench: Bench, transport: str) -> None:
    await bench.listen()
    await bench.ask("www.example")
    assert await bench.dig_short(transport, "-x", "198.18.0.2") == ["www.example."]
    assert await bench.dig_short(transport, "-x", "2001:2::2") == ["www.example."]
    assert "status: NXDOMAIN" in await bench.dig(transport, "-x", "198.18.0.3")


async def test_name_that_does_not_exist_upstream(bench: Bench) -> None:
    assert rcode(await bench.ask("nothing.direct.example")) == "NXDOMAIN"


async def test_long_answer_is_cut_by_udp_and_whole_by_tcp(bench: Bench) -> None:
    await bench.listen()
    cut = await bench.dig("+ignore", "+notcp", "big.direct.example", "TXT")
    assert "flags: qr tc rd ra;" in cut
    assert "ANSWER: 0" in cut
    whole = await bench.dig("big.direct.example", "TXT")
    assert "Truncated, retrying in TCP mode" in whole
    assert "h" * 250 in whole
    assert bench.counters["upstream_tcp_fallback"] == 1  # and from the cache after that


@pytest.mark.parametrize("edns", [None, 512, 4096])
async def test_only_datagrams_are_cut(bench: Bench, edns: int | None) -> None:
    reply = await bench.ask("big.direct.example", "TXT", over_tcp=False, edns=edns)
    assert (reply.header.tc, reply.rr, len(reply.ar)) == (1, [], edns is not None)
    reply = await bench.ask("big.direct.example", "TXT", over_tcp=True, edns=edns)
    assert (reply.header.tc, len(reply.rr)) == (0, 8)


async def test_exhausted_pool_is_a_server_failure_and_counted(
    make_bench: Callable[..., Bench], dnsmasq: Dnsmasq
) -> None:
    bench = make_bench([dnsmasq.url], pool_size=1)
    await bench.ask("first.example")
    reply = await bench.ask("second.example", edns=1232)
    assert (rcode(reply), extended_error(reply)) == ("SERVFAIL", 0)
    assert bench.counters["pool_exhausted"] == 1
    assert told(await bench.ask("first.example")) == ["198.18.0.2"]


async def test_pool_without_ipv6_gives_no_ipv6_addresses(make_bench: Callable[..., Bench], dnsmasq: Dnsmasq) -> None:
    bench = make_bench([dnsmasq.url], range6=None)
    reply = await bench.ask("www.example", "AAAA")
    assert (rcode(reply), told(reply)) == ("NOERROR", [])


@pytest.mark.parametrize("name", ["1.2.3.4", "0x7f000001", "a@b.example", "two words.example", "."])
async def test_name_that_no_proxy_must_see_has_no_address(bench: Bench, name: str) -> None:
    reply = await bench.ask(name)
    assert (reply.rr, bench.pool.statistics()["assigned"]) == ([], 0)


async def test_malformed_and_unsupported_messages_are_counted_by_reason(bench: Bench) -> None:
    assert await bench.service.answer(b"", over_tcp=False) is None
    assert await bench.service.answer(b"\xff" * 40, over_tcp=False) is None
    refused = await bench.service.answer(memoryview(DNSRecord.question("www.example").pack())[:-3], over_tcp=True)
    assert refused is not None
    assert rcode(DNSRecord.parse(refused)) == "FORMERR"
    await bench.listen()
    assert "status: REFUSED" in await bench.dig("version.bind", "CH", "TXT")
    assert "status: NOTIMP" in await bench.dig("+opcode=NOTIFY", "www.example", "SOA")
    assert "status: BADVERS" in await bench.dig("+edns=1", "+noednsneg", "www.example")
    counted = {key: count for key, count in bench.counters.items() if key.startswith(("malformed_", "unsupported_"))}
    assert counted == {
        "malformed_short": 1,
        "malformed_not_a_query": 1,
        "malformed_question_cut_short": 1,
        "unsupported_class": 1,
        "unsupported_opcode": 1,
        "unsupported_edns_version": 1,
    }


# Special names.


async def test_localhost_is_this_host_whatever_the_rules_say(bench: Bench) -> None:
    assert told(await bench.ask("localhost")) == ["127.0.0.1"]
    assert told(await bench.ask("app.localhost", "AAAA")) == ["::1"]
    assert told(await bench.ask("localhost", "TXT")) == []


@pytest.mark.parametrize("name", ["use-application-dns.net", "surely.invalid", "mask.icloud.com"])
async def test_names_that_are_answered_with_nxdomain(bench: Bench, name: str) -> None:
    assert rcode(await bench.ask(name)) == "NXDOMAIN"


async def test_discovery_of_other_resolvers_finds_none(bench: Bench) -> None:
    reply = await bench.ask("_dns.resolver.arpa", "TYPE64")
    assert (rcode(reply), reply.rr) == ("NOERROR", [])


async def test_local_names_are_asked_of_a_server_of_the_same_network(bench: Bench) -> None:
    assert told(await bench.ask("printer.lan")) == ["10.0.0.9"]
    assert told(await bench.ask("printer")) == ["10.0.0.9"]
    assert told(await bench.ask("9.0.0.10.in-addr.arpa", "PTR")) == ["printer.lan."]
    assert bench.learnt == [Learnt("10.0.0.9", 60, RULE_BUILTIN)] * 2
    assert bench.counters["special_local"] == 3


@pytest.mark.parametrize(("name", "kind"), [("printer.lan", "A"), ("printer", "A"), ("9.0.0.10.in-addr.arpa", "PTR")])
async def test_local_names_are_never_told_to_a_public_server(
    make_bench: Callable[..., Bench], name: str, kind: str
) -> None:
    bench = make_bench(["udp://9.9.9.9:53"], sockets=None)  # would fail with a TypeError if it asked
    assert rcode(await bench.ask(name, kind)) == "NXDOMAIN"


async def test_rule_that_names_a_local_name_wins(bench: Bench) -> None:
    assert told(await bench.ask("nas")) == ["198.18.0.2"]


async def test_rule_that_names_nothing_does_not_take_local_names(
    make_bench: Callable[..., Bench], dnsmasq: Dnsmasq
) -> None:
    bench = make_bench([dnsmasq.url], rules=(Rule("office", ports=((443, 443),)),), default="direct")
    assert told(await bench.ask("www.example")) == ["198.18.0.2"]  # only a flow to it can decide
    assert told(await bench.ask("printer")) == ["10.0.0.9"]


@pytest.mark.parametrize(
    ("default", "kind", "expected"),
    [("office", "A", "NOERROR"), ("office", "TXT", "NXDOMAIN"), ("direct", "A", "NXDOMAIN")],
)
async def test_onion_goes_to_a_proxy_or_nowhere(
    make_bench: Callable[..., Bench], default: str, kind: str, expected: str, dnsmasq: Dnsmasq
) -> None:
    bench = make_bench([dnsmasq.url], rules=(), default=default)
    assert rcode(await bench.ask("hidden.onion", kind)) == expected
    assert dnsmasq.queries("hidden.onion") == []


# Real addresses, for the direct outbound.


async def test_resolve_gives_real_addresses_ipv4_first(bench: Bench) -> None:
    assert await bench.service.resolve("Direct.example.") == ["192.0.2.7", "2001:db8::7"]
    assert await bench.service.resolve("printer") == ["10.0.0.9"]
    assert await bench.service.resolve("192.0.2.1") == ["192.0.2.1"]
    assert await bench.service.resolve("2001:db8::1") == ["2001:db8::1"]
    assert bench.learnt == []


@pytest.mark.parametrize("name", ["nothing.direct.example", "mail.example", "no..name", "x" * 64])
async def test_resolve_of_what_has_no_address(bench: Bench, name: str) -> None:
    with pytest.raises(OutboundError, match="no address") as caught:
        await bench.service.resolve(name)
    assert caught.value.failure is Failure.NAME_NOT_FOUND


async def test_resolve_never_gives_fake_ips(bench: Bench) -> None:
    for name in ("loop.direct.example", "loop6.direct.example"):
        with pytest.raises(OutboundError):
            await bench.service.resolve(name)


async def test_resolve_without_a_server_that_answers(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench([f"udp://127.0.0.1:{free_port()}"])
    with pytest.raises(OutboundError, match="nothing listens there") as caught:
        await bench.service.resolve("direct.example")
    assert caught.value.failure is Failure.TIMED_OUT
