"""What upstream says: read, kept, and told on to clients. dnslib plays the server."""

from __future__ import annotations

import pytest
from dnslib import AAAA, CLASS, CNAME, EDNS0, MX, QTYPE, RCODE, RD, RR, SOA, TXT, A, DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from ztun.names.answer import Answer, Unusable, make_upstream_query, read_answer
from ztun.names.cache import AnswerCache, CacheKey
from ztun.names.message import Query, read_query

NAME = "www.example"
START_OF_AUTHORITY = SOA("ns.example", "hostmaster.example", (1, 2, 3, 4, 90))


def ask(name: str = NAME, kind: str = "A", edns: EDNS0 | None = None) -> Query:
    record = DNSRecord.question(name, kind)
    if edns is not None:
        record.add_ar(edns)
    found = read_query(record.pack())
    assert isinstance(found, Query)
    return found


def reply(query: Query, *answers: RR, auth: list[RR] | None = None, rcode: int = 0, **header: int) -> bytes:
    record = DNSRecord.parse(make_upstream_query(query, 99)).reply()
    record.header.rcode = rcode
    for field, value in header.items():
        setattr(record.header, field, value)
    for answer in answers:
        record.add_answer(answer)
    for authority in auth or []:
        record.add_auth(authority)
    record.add_ar(EDNS0(udp_len=4096))
    return bytes(record.pack())


def read(message: bytes, query: Query, **options: bool) -> Answer:
    found = read_answer(message, query.question, **options)
    assert isinstance(found, Answer), found
    return found


def address(ttl: int, text: str = "192.0.2.1", name: str = NAME) -> RR:
    return RR(name, QTYPE.A, ttl=ttl, rdata=A(text))


def no_such_thing(soa_ttl: int) -> list[RR]:
    return [RR("example", QTYPE.SOA, ttl=soa_ttl, rdata=START_OF_AUTHORITY)]


def test_question_goes_upstream_with_our_own_id_and_edns() -> None:
    client = ask("WWW.example", edns=EDNS0(udp_len=4096, flags="do"))
    sent = DNSRecord.parse(make_upstream_query(client, 4711))
    assert (sent.header.id, sent.header.rd, str(sent.q.qname), sent.q.qtype) == (4711, 1, "WWW.example.", QTYPE.A)
    (opt,) = sent.ar
    assert (opt.edns_len, opt.edns_do, opt.rdata) == (1232, 1, [])
    assert DNSRecord.parse(make_upstream_query(client, 4711, edns=False)).ar == []


@pytest.mark.parametrize("name", ["a.example", "www.example", "x" * 60 + ".example", "y" * 63 + ".z" * 20 + ".example"])
def test_encrypted_query_tells_little_by_its_length(name: str) -> None:
    sent = make_upstream_query(ask(name), 0, padded=True)
    assert len(sent) % 128 == 0
    assert DNSRecord.parse(sent).ar[0].rdata[0].code == 12


def test_answer_is_told_on_under_the_clients_id_and_spelling_with_ttls_counted_down() -> None:
    first = ask("www.EXAMPLE")
    chain = [RR(NAME, QTYPE.CNAME, ttl=600, rdata=CNAME("real.example")), address(60, name="real.example")]
    answer = read(reply(first, *chain, ra=1), first)
    assert answer.lifetime == 60

    second = ask("wWw.example", edns=EDNS0(udp_len=1232))
    told = DNSRecord.parse(answer.reply(second, 20.9))
    assert (told.header.id, str(told.q.qname)) == (second.id, "wWw.example.")
    assert [(record.rtype, record.ttl, str(record.rdata)) for record in told.rr] == [
        (QTYPE.CNAME, 580, "real.example."),
        (QTYPE.A, 40, "192.0.2.1"),
    ]
    assert [record.rtype for record in told.ar] == [QTYPE.OPT]
    assert DNSRecord.parse(answer.reply(ask(), 0)).ar == []


def test_ttls_never_go_below_zero_nor_above_a_day() -> None:
    query = ask()
    answer = read(reply(query, address(1000000), address(0, "192.0.2.2"), address(1 << 31, "192.0.2.3")), query)
    assert answer.lifetime == 0
    assert [record.ttl for record in DNSRecord.parse(answer.reply(query, 7)).rr] == [86393, 0, 0]


@pytest.mark.parametrize(("soa_ttl", "lifetime"), [(3600, 90), (30, 30)])
@pytest.mark.parametrize("rcode", [RCODE.NOERROR, RCODE.NXDOMAIN])
def test_what_is_not_there_is_kept_by_the_soa(soa_ttl: int, lifetime: int, rcode: int) -> None:
    query = ask()
    answer = read(reply(query, auth=no_such_thing(soa_ttl), rcode=rcode), query)
    assert answer.is_negative
    assert answer.lifetime == lifetime
    told = DNSRecord.parse(answer.reply(query, 10))
    assert (told.header.rcode, told.auth[0].ttl) == (rcode, lifetime - 10)


def test_what_is_not_there_and_has_no_soa_is_not_kept() -> None:
    query = ask()
    assert read(reply(query, rcode=RCODE.NXDOMAIN), query).lifetime == 0


def test_alias_of_something_that_does_not_exist_is_kept_no_longer_than_the_alias() -> None:
    query = ask()
    alias = RR(NAME, QTYPE.CNAME, ttl=5, rdata=CNAME("gone.example"))
    assert read(reply(query, alias, auth=no_such_thing(3600), rcode=RCODE.NXDOMAIN), query).lifetime == 5


@pytest.mark.parametrize("rcode", [RCODE.SERVFAIL, RCODE.REFUSED, RCODE.NOTIMP, RCODE.FORMERR])
def test_failures_are_not_kept(rcode: int) -> None:
    query = ask()
    answer = read(reply(query, auth=no_such_thing(3600), rcode=rcode), query)
    assert (answer.rcode, answer.lifetime) == (rcode, 0)


def test_records_that_nobody_knows_pass_unchanged() -> None:
    query = ask(kind="TYPE65280")
    answer = read(reply(query, RR(NAME, 65280, ttl=9, rdata=RD(b"\x00\xff\xc0\x0c"))), query)
    (record,) = DNSRecord.parse(answer.reply(query, 1)).rr
    assert (record.rtype, record.ttl, bytes(record.rdata.data)) == (65280, 8, b"\x00\xff\xc0\x0c")


def test_compression_that_leads_into_the_question_survives_another_spelling() -> None:
    query = ask("mail.EXAMPLE", "MX")
    message = reply(query, RR("mail.EXAMPLE", QTYPE.MX, ttl=60, rdata=MX("mx.mail.EXAMPLE", 10)))
    told = DNSRecord.parse(read(message, query).reply(ask("MAIL.example", "MX")))
    assert str(told.rr[0].rdata) == "10 mx.MAIL.example."


def test_authenticated_data_is_told_to_those_who_ask() -> None:
    query = ask()
    answer = read(reply(query, address(60), ad=1), query)
    assert DNSRecord.parse(answer.reply(ask(edns=EDNS0(flags="do")))).header.ad == 1
    assert DNSRecord.parse(answer.reply(ask())).header.ad == 0


def test_addresses_are_those_a_client_may_connect_to() -> None:
    query = ask(kind="HTTPS")
    hints = bytes.fromhex(
        "0001 00 0001 0003 026832 0004 0008 c0000201c0000202 0006 0010" + "20010db8" + "00" * 11 + "01"
    )
    message = reply(
        query,
        RR(NAME, QTYPE.HTTPS, ttl=100, rdata=RD(hints)),
        address(50, "192.0.2.9"),
        RR(NAME, QTYPE.AAAA, ttl=70, rdata=AAAA("2001:db8::9")),
        RR(NAME, QTYPE.TXT, ttl=1, rdata=TXT("192.0.2.99")),
        auth=[address(50, "192.0.2.77")],
    )
    found = [(each.address.hex(), each.ttl) for each in read(message, query).addresses(10)]
    assert found == [
        ("c0000201", 90),
        ("c0000202", 90),
        ("20010db8" + "00" * 11 + "01", 90),
        ("c0000209", 40),
        ("20010db8" + "00" * 11 + "09", 60),
    ]


@given(st.binary(max_size=60))
def test_malformed_hints_are_no_addresses_and_no_error(data: bytes) -> None:
    query = ask(kind="HTTPS")
    if data:
        for each in read(reply(query, RR(NAME, QTYPE.HTTPS, ttl=100, rdata=RD(data))), query).addresses():
            assert each.address in data


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "short"),
        (make_upstream_query(ask(), 1), "not_a_response"),
        (reply(ask(), opcode=5), "not_a_response"),
        (reply(ask("other.example")), "wrong_question"),
        (reply(ask(kind="AAAA")), "wrong_question"),
        (reply(ask(), address(60))[:-20], "record_cut_short"),
        (reply(ask(), address(60))[:30], "name_cut_short"),
    ],
)
def test_what_is_no_answer_to_the_question_is_named(message: bytes, reason: str) -> None:
    assert read_answer(message, ask().question) == Unusable(reason)


def test_answer_with_two_questions_or_none_is_not_ours() -> None:
    message = bytearray(reply(ask(), address(60)))
    for count in (0, 2):
        message[4:6] = count.to_bytes(2)
        assert read_answer(message, ask().question) == Unusable("wrong_question")


def test_spelling_counts_where_it_was_varied_on_purpose() -> None:
    sent, came = ask("wWw.eXample"), reply(ask("www.example"), address(60))
    assert isinstance(read_answer(came, sent.question), Answer)
    assert read_answer(came, sent.question, exact_case=True) == Unusable("wrong_case")
    assert isinstance(read_answer(reply(sent, address(60)), sent.question, exact_case=True), Answer)


def test_truncated_answer_is_known_without_its_records() -> None:
    query = ask()
    assert read(reply(query, tc=1)[:40], query).truncated


def test_bad_version_is_no_answer() -> None:
    query = ask()
    record = DNSRecord.parse(make_upstream_query(query, 1)).reply()
    record.add_ar(EDNS0(ext_rcode=1))
    assert read_answer(record.pack(), query.question) == Unusable("extended_rcode")


@given(st.data())
def test_damaged_answer_never_raises_and_what_is_read_can_be_told_on(data: st.DataObject) -> None:
    query = ask()
    message = bytearray(
        reply(query, RR(NAME, QTYPE.CNAME, ttl=6, rdata=CNAME("a.example")), address(60), auth=no_such_thing(9))
    )
    for _ in range(data.draw(st.integers(0, 5))):
        message[data.draw(st.integers(2, len(message) - 1))] = data.draw(st.integers(0, 255))
    found = read_answer(message[: data.draw(st.integers(0, len(message)))], query.question)
    if isinstance(found, Answer) and not found.truncated:
        told = found.reply(query, 3)
        assert told[:2] == query.id.to_bytes(2)
        assert isinstance(read_answer(told, query.question), Answer)
        list(found.addresses(3))


@given(st.binary(max_size=300))
def test_noise_from_upstream_never_raises(noise: bytes) -> None:
    query = ask()
    read_answer(noise, query.question)
    read_answer(reply(query, address(60))[:30] + noise, query.question)


# The cache.


def keep(cache: AnswerCache, name: str, ttl: int, now: float) -> CacheKey:
    query = ask(name)
    cache.put(CacheKey.of(query), read(reply(query, address(ttl, name=name)), query), now)
    return CacheKey.of(query)


def test_answer_is_kept_until_its_lifetime_is_over() -> None:
    cache = AnswerCache(10)
    key = keep(cache, "a.example", 60, now=100)
    assert CacheKey.of(ask("A.Example")) == key
    found = cache.get(key, 159.5)
    assert found is not None
    assert found[1] == 59.5
    assert cache.get(key, 160) is None
    assert len(cache) == 0


def test_answer_without_lifetime_is_not_kept() -> None:
    cache = AnswerCache(10)
    assert cache.get(keep(cache, "a.example", 0, now=0), 0) is None


def test_least_recently_used_answer_goes_first() -> None:
    cache = AnswerCache(2)
    a, b = keep(cache, "a.example", 60, 0), keep(cache, "b.example", 60, 0)
    cache.get(a, 1)
    c = keep(cache, "c.example", 60, 2)
    assert [cache.get(key, 3) is not None for key in (a, b, c)] == [True, False, True]


def test_cache_of_size_zero_keeps_nothing() -> None:
    cache = AnswerCache(0)
    assert cache.get(keep(cache, "a.example", 60, 0), 0) is None


@pytest.mark.parametrize("other", [ask(kind="AAAA"), ask(edns=EDNS0(flags="do")), ask("other.example")])
def test_other_questions_do_not_get_the_answer(other: Query) -> None:
    cache = AnswerCache(10)
    keep(cache, NAME, 60, 0)
    assert cache.get(CacheKey.of(other), 1) is None


def test_huge_answer_is_not_kept() -> None:
    cache, query = AnswerCache(10), ask(kind="TXT")
    texts = [RR(NAME, QTYPE.TXT, CLASS.IN, 60, TXT("x" * 250)) for _ in range(20)]
    cache.put(CacheKey.of(query), read(reply(query, *texts), query), 0)
    assert len(cache) == 0
