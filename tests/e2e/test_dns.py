"""Names: the service on dns.listen, and queries to anybody's resolver, over UDP and TCP."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import time

import pytest
from dnslib import DNSRecord

from e2e.traffic import ask_udp, read_all, start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

FAKE4 = ipaddress.ip_network("198.18.0.0/15")
FAKE6 = ipaddress.ip_network("2001:2::/48")

RESOLVERS = pytest.mark.parametrize(
    "resolver",
    [plan.GATEWAY_LAN4, plan.GATEWAY_LAN6, plan.RESOLVER_ELSEWHERE4, plan.RESOLVER_ELSEWHERE6, plan.UPSTREAM4],
    ids=["listen-v4", "listen-v6", "hijacked-v4", "hijacked-v6", "hijacked-near"],
)
TRANSPORTS = pytest.mark.parametrize("transport", ["+notcp", "+tcp"])


@RESOLVERS
@TRANSPORTS
def test_proxied_name_gets_a_fake_ip_whoever_is_asked(lab: Lab, ztun: Ztun, resolver: str, transport: str) -> None:
    assert ipaddress.ip_address(lab.dig(f"@{resolver}", transport, "site.test", "A")) in FAKE4
    assert ipaddress.ip_address(lab.dig(f"@{resolver}", transport, "site.test", "AAAA")) in FAKE6


@RESOLVERS
@TRANSPORTS
def test_direct_name_gets_its_real_address(lab: Lab, ztun: Ztun, resolver: str, transport: str) -> None:
    assert lab.dig(f"@{resolver}", transport, "direct.test", "A") == plan.DIRECT4
    assert lab.dig(f"@{resolver}", transport, "direct.test", "AAAA") == plan.DIRECT6


def test_resolvers_address_that_nobody_has_works_all_the_same(lab: Lab, ztun: Ztun) -> None:
    assert ipaddress.ip_address(lab.dig("@192.0.2.53", "site.test")) in FAKE4


def test_names_compare_without_case_and_the_answer_keeps_the_clients(lab: Lab, any_ztun: Ztun) -> None:
    lower = lab.dig("site.test")
    assert lab.dig("SITE.Test.") == lower
    answer = lab.client.run("dig", "+noall", "+question", "+answer", "SiTe.TeSt").stdout
    assert "SiTe.TeSt." in answer
    assert lab.curl("http://SITE.TEST/").returncode == 0


def test_same_name_keeps_its_address_and_others_get_others(lab: Lab, any_ztun: Ztun) -> None:
    names = [f"host-{number}.bulk.test" for number in range(20)]
    first = {name: lab.dig(name) for name in names}
    assert len(set(first.values())) == len(names)
    assert {name: lab.dig(name) for name in reversed(names)} == first


@pytest.mark.parametrize("type", ["A", "AAAA"])
def test_pointer_of_a_fake_ip_is_its_name(lab: Lab, any_ztun: Ztun, type: str) -> None:
    assert lab.dig("-x", lab.dig("secure.test", type)) == "secure.test."


def test_pointer_of_a_real_address_comes_from_upstream(lab: Lab, any_ztun: Ztun) -> None:
    assert lab.dig("-x", plan.DIRECT4) == "direct.test."


def test_https_record_of_a_proxied_name_is_empty_and_of_a_direct_name_real(lab: Lab, ztun: Ztun) -> None:
    # With an ipv4hint in it a browser would go around the Fake-IP.
    answer = lab.client.run("dig", "site.test", "HTTPS").stdout
    assert "status: NOERROR" in answer
    assert "ANSWER: 0" in answer
    assert lab.dig("direct.test", "HTTPS") == '1 . alpn="h2"'


@pytest.mark.parametrize("name", ["blocked.test", "telemetry.test", "x.telemetry.bulk.test"])
@TRANSPORTS
def test_blocked_name_does_not_exist(lab: Lab, ztun: Ztun, name: str, transport: str) -> None:
    for type in ("A", "AAAA", "HTTPS"):
        assert "status: NXDOMAIN" in lab.client.run("dig", transport, name, type).stdout


def test_other_records_of_a_direct_name_come_from_upstream(lab: Lab, any_ztun: Ztun) -> None:
    assert lab.dig("direct.test", "TXT") == '"lab"'
    assert "status: NXDOMAIN" in lab.client.run("dig", "nowhere.direct.test").stdout


def test_alias_of_a_direct_name(lab: Lab) -> None:
    start(lab, {})
    assert lab.dig("alias.test").split() == ["direct.test.", plan.DIRECT4]


def test_answer_too_long_for_udp_is_truncated_and_whole_over_tcp(lab: Lab) -> None:
    start(lab, {})
    cut = lab.client.run("dig", "+ignore", "+bufsize=1232", "big.test", "TXT").stdout
    assert " tc" in next(line for line in cut.splitlines() if "flags:" in line)
    assert len(lab.dig("big.test", "TXT")) > 4000  # dig asks again over TCP


def test_many_queries_in_one_tcp_connection(lab: Lab, any_ztun: Ztun) -> None:
    queries = [DNSRecord.question(f"pipelined-{number}.bulk.test") for number in range(20)]
    with lab.client.connect(plan.RESOLVER_ELSEWHERE4, 53) as sock:
        for query in queries:
            packed = query.pack()
            sock.sendall(len(packed).to_bytes(2, "big") + packed)
        sock.shutdown(socket.SHUT_WR)
        stream = read_all(sock)

    answers = []
    while stream:
        size = int.from_bytes(stream[:2], "big")
        answers.append(DNSRecord.parse(stream[2 : 2 + size]))
        stream = stream[2 + size :]
    assert {answer.header.id for answer in answers} == {query.header.id for query in queries}
    assert len({str(answer.a.rdata) for answer in answers}) == 20


@pytest.mark.parametrize("resolver", [plan.GATEWAY_LAN4, plan.RESOLVER_ELSEWHERE4])
@pytest.mark.parametrize(
    "message",
    [b"", b"\x00", b"\x12\x34\x01\x00\x00\x01", b"\xff" * 40, DNSRecord.question("site.test").pack()[:-3]],
    ids=["empty", "one byte", "half a header", "noise", "cut question"],
)
def test_malformed_message_is_dropped_or_refused_and_harms_nobody(
    lab: Lab, any_ztun: Ztun, resolver: str, message: bytes
) -> None:
    before = _malformed(any_ztun)
    try:
        answer = ask_udp(lab.client, resolver, 53, message, timeout=0.3, tries=1)
        assert answer[3] & 0x0F == 1  # FORMERR
    except TimeoutError:
        pass

    assert _malformed(any_ztun) > before, any_ztun.status()["dns"]
    assert lab.dig("site.test")


@pytest.mark.usefixtures("backend")
def test_hijack_can_be_switched_off(lab: Lab) -> None:
    rules = [{"domain_suffix": ["test"], "outbound": "socks"}]
    start(lab, {"dns": {"hijack": False}, "route": {"rules": rules}})
    assert lab.dig(f"@{plan.RESOLVER_ELSEWHERE4}", "site.test") == plan.SITE4
    assert ipaddress.ip_address(lab.dig("site.test")) in FAKE4


@pytest.mark.usefixtures("backend")
@TRANSPORTS
def test_a_rule_with_the_target_dns_answers_on_any_port(lab: Lab, transport: str) -> None:
    rules = [
        {"ip_cidr": [plan.SHARED4, plan.SHARED6], "port": 5300, "outbound": "dns"},
        {"domain": ["site.test"], "outbound": "socks"},
    ]
    start(lab, {"dns": {"hijack": False}, "route": {"rules": rules}})
    for server in (plan.SHARED4, plan.SHARED6):
        assert ipaddress.ip_address(lab.dig(f"@{server}", "-p", "5300", transport, "site.test")) in FAKE4
        assert lab.dig(f"@{server}", "-p", "5300", transport, "direct.test", "AAAA") == plan.DIRECT6


def test_names_keep_their_addresses_over_a_restart(lab: Lab) -> None:
    store = str(lab.directory / "kept.db")
    config = {
        "dns": {"fake_ip": {"store": store}},
        "route": {"rules": [{"domain_suffix": ["test"], "outbound": "socks"}]},
    }
    start(lab, config)
    before = [lab.dig(f"kept-{number}.bulk.test") for number in range(5)]
    start(lab, config)
    # Clients that cached the address go on without asking again.
    page = lab.page("http://kept-3.bulk.test/", "--resolve", f"kept-3.bulk.test:80:{before[3]}")
    assert page["host"] == "kept-3.bulk.test"
    assert page["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert [lab.dig(f"kept-{number}.bulk.test") for number in range(5)] == before


def test_names_keep_their_addresses_when_it_is_killed(lab: Lab) -> None:
    """SIGKILL as soon as the answers are there, again and again: every address that a client has keeps its name."""
    config = {
        "dns": {"fake_ip": {"store": str(lab.directory / "killed.db")}},
        "route": {"rules": [{"domain_suffix": ["test"], "outbound": "socks"}]},
    }
    given: dict[str, str] = {}
    for turn in range(3):
        instance = start(lab, config)
        given |= {name: lab.dig(name) for name in (f"killed-{turn}-{number}.bulk.test" for number in range(5))}
        os.kill(instance.pid, signal.SIGKILL)
        assert wait_until(lambda killed=instance: killed.returncode is not None)  # type: ignore[misc]
    start(lab, config)
    assert {name: lab.dig(name) for name in given} == given


@pytest.mark.parametrize("type", ["A", "AAAA"])
def test_a_pool_of_few_names_gives_none_away_that_is_in_use(lab: Lab, type: str) -> None:
    """Two names, a second each: with a flow on the first, all others have to share the second."""
    rules = [{"domain_suffix": ["test"], "outbound": "socks"}]
    fake = {"size": 2, "ttl": 1, "store": None}
    start(lab, {"dns": {"fake_ip": fake}, "route": {"rules": rules}})
    used = lab.dig("used.bulk.test", type)
    assert lab.client.run("dig", "+noall", "+answer", "used.bulk.test", type).stdout.split()[1:3] == ["1", "IN"]
    with lab.client.connect(used, plan.ECHO_PORT) as sock:
        others = [lab.dig("first.bulk.test", type)]
        assert lab.dig("second.bulk.test", type) == ""  # the other one rests
        for name in ("second.bulk.test", "third.bulk.test", "fourth.bulk.test"):
            time.sleep(1.2)
            others.append(lab.dig(name, type))
        assert len(set(others)) == 1
        assert used not in others
        assert lab.dig("-x", used) == "used.bulk.test."
        sock.sendall(b"still the same")
        assert sock.recv(100) == b"still the same"
    time.sleep(1.2)
    assert lab.dig("fifth.bulk.test", type) in (used, others[0])


def _malformed(instance: Ztun) -> int:
    status = instance.status()
    counters = {**status["dns"], **status["drops"]}
    words = ("malformed", "short", "bad", "form")
    return sum(n for key, n in counters.items() if isinstance(n, int) and any(word in key for word in words))
