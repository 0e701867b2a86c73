"""Queries read without belief and replies built for them. dnslib is the second opinion."""

from __future__ import annotations

import struct

import pytest
from dnslib import AAAA, EDNS0, QTYPE, RR, A, DNSLabel, DNSQuestion, DNSRecord, EDNSOption
from hypothesis import example, given
from hypothesis import strategies as st

from ztun.names.message import (
    Drop,
    ExtendedError,
    Query,
    Rcode,
    address_record,
    fit,
    make_query,
    make_reply,
    pointer_record,
    read_query,
    refuse_any_record,
)
from ztun.names.scan import text_of

ADDRESS4, ADDRESS6 = bytes([198, 18, 0, 2]), bytes.fromhex("20010002" + "00" * 11 + "02")
HEADER = struct.pack("!HHHHHH", 0x1234, 0x0100, 1, 0, 0, 0)
QUESTION = b"\x03www\x07example\x00\x00\x01\x00\x01"
OPT = b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00"

labels = st.lists(st.binary(min_size=1, max_size=63), max_size=5).filter(
    lambda each: sum(len(x) + 1 for x in each) < 255
)


def header(**fields: int) -> bytes:
    values = {"id": 0x1234, "flags": 0x0100, "questions": 1, "answers": 0, "authorities": 0, "additionals": 0}
    return struct.pack("!HHHHHH", *{**values, **fields}.values())


def read(message: bytes) -> Query:
    found = read_query(message)
    assert isinstance(found, Query), found
    return found


def question(name: str = "www.example", kind: str = "A", edns: int | None = None) -> Query:
    record = DNSRecord.question(name, kind)
    if edns is not None:
        record.add_ar(EDNS0(udp_len=edns))
    return read(record.pack())


def test_query_is_read_as_the_client_spelled_it() -> None:
    record = DNSRecord.question("wWw.Example", "AAAA")
    record.header.id = 7
    found = read(record.pack())
    assert (found.id, found.name, found.labels, found.type) == (7, "www.example", (b"wWw", b"Example"), QTYPE.AAAA)
    assert found.question == b"\x03wWw\x07Example\x00\x00\x1c\x00\x01"
    assert found.udp_size is None
    assert not found.dnssec_ok


@pytest.mark.parametrize(("said", "taken"), [(0, 512), (511, 512), (512, 512), (1232, 1232), (65535, 65535)])
def test_edns_size_below_512_means_512(said: int, taken: int) -> None:
    assert question(edns=said).udp_size == taken


def test_flags_of_edns_and_header_are_seen() -> None:
    record = DNSRecord.question("www.example")
    record.add_ar(EDNS0(udp_len=1232, flags="do"))
    record.header.bitmap |= 0x0010
    found = read(record.pack())
    assert found.dnssec_ok
    assert found.checking_disabled


@given(labels, st.integers(1, 65535), st.integers(0, 65535))
def test_reading_agrees_with_dnslib_whatever_the_name(name: list[bytes], kind: int, identifier: int) -> None:
    record = DNSRecord(questions=[DNSQuestion(DNSLabel(name), kind)])
    record.header.id = identifier
    found = read_query(record.pack())
    if kind == QTYPE.OPT or 249 <= kind <= 254:
        assert isinstance(found, Drop)
        return
    assert isinstance(found, Query)
    assert (found.id, found.labels, found.type) == (identifier, tuple(name), kind)


@given(labels, labels)
def test_names_have_the_same_text_only_when_they_are_the_same(first: list[bytes], second: list[bytes]) -> None:
    def folded(name: list[bytes]) -> list[bytes]:
        return [label.lower() for label in name]

    assert (text_of(tuple(first)) == text_of(tuple(second))) == (folded(first) == folded(second))
    assert text_of(tuple(first)).isascii()


def test_dot_inside_a_label_is_not_taken_for_one_between_labels() -> None:
    assert text_of((b"www.good", b"example")) == "www\\046good.example"


@pytest.mark.parametrize(
    ("message", "reason", "rcode"),
    [
        (b"", "malformed_short", None),
        (b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00", "malformed_short", None),
        (header(flags=0x8180) + QUESTION, "malformed_not_a_query", None),
        (b"\xff" * 40, "malformed_not_a_query", None),
        (header(questions=0), "malformed_not_one_question", Rcode.FORMERR),
        (header(questions=2) + QUESTION * 2, "malformed_not_one_question", Rcode.FORMERR),
        (header(answers=1) + QUESTION, "malformed_records_in_query", Rcode.FORMERR),
        (header(authorities=1) + QUESTION, "malformed_records_in_query", Rcode.FORMERR),
        (HEADER, "malformed_name_cut_short", Rcode.FORMERR),
        (HEADER + b"\x03ww", "malformed_name_cut_short", Rcode.FORMERR),
        (HEADER + b"\x03www", "malformed_name_cut_short", Rcode.FORMERR),
        (HEADER + b"\x03www\x00\x00\x01\x00", "malformed_question_cut_short", Rcode.FORMERR),
        (HEADER + (b"\x3f" + b"a" * 63) * 4 + b"\x00\x00\x01\x00\x01", "malformed_name_too_long", Rcode.FORMERR),
        (HEADER + b"\xc0\x0c\x00\x01\x00\x01", "malformed_bad_label", Rcode.FORMERR),
        (HEADER + b"\x41aa\x00\x00\x01\x00\x01", "malformed_bad_label", Rcode.FORMERR),
        (HEADER + b"\x81aa\x00\x00\x01\x00\x01", "malformed_bad_label", Rcode.FORMERR),
        (header(additionals=1) + QUESTION, "malformed_name_cut_short", Rcode.FORMERR),
        (header(additionals=1) + QUESTION + OPT[:-1], "malformed_record_cut_short", Rcode.FORMERR),
        (header(additionals=1) + QUESTION + OPT[:-1] + b"\x05", "malformed_record_cut_short", Rcode.FORMERR),
        (header(additionals=1) + QUESTION + b"\xc0\x1d" + OPT[1:], "malformed_compression_loop", Rcode.FORMERR),
        (header(additionals=1) + QUESTION + b"\xc0\x00" + OPT[1:], "malformed_compression_loop", Rcode.FORMERR),
        (header(additionals=2) + QUESTION + OPT * 2, "malformed_more_than_one_opt", Rcode.FORMERR),
        (header(additionals=9999) + QUESTION + OPT, "malformed_too_many_records", Rcode.FORMERR),
        (header(additionals=1) + QUESTION + OPT + bytes(4096), "malformed_too_long", Rcode.FORMERR),
        (header(flags=0x2900) + QUESTION, "unsupported_opcode", Rcode.NOTIMP),  # UPDATE
        (header(flags=0x2100) + b"?", "unsupported_opcode", Rcode.NOTIMP),  # NOTIFY, whatever is in it
        (HEADER + QUESTION[:-1] + b"\x03", "unsupported_class", Rcode.REFUSED),  # CHAOS
        (HEADER + QUESTION[:-1] + b"\xff", "unsupported_class", Rcode.REFUSED),
        (HEADER + b"\x00\x00\xfc\x00\x01", "unsupported_type", Rcode.NOTIMP),  # AXFR
        (HEADER + b"\x00\x00\x29\x00\x01", "unsupported_type", Rcode.NOTIMP),  # OPT as a question
        (header(additionals=1) + QUESTION + OPT[:6] + b"\x01" + OPT[7:], "unsupported_edns_version", Rcode.BADVERS),
    ],
)  # fmt: skip
def test_what_is_not_served_has_a_reason(message: bytes, reason: str, rcode: Rcode | None) -> None:
    found = read_query(message)
    assert isinstance(found, Drop)
    assert found.reason == reason
    if rcode is None:
        assert found.reply is None
        return
    assert found.reply is not None
    reply = DNSRecord.parse(found.reply)
    extended = reply.ar[0].edns_rcode << 4 if reply.ar else 0
    assert (reply.header.id, reply.header.qr, reply.header.rcode | extended) == (0x1234, 1, rcode)


def test_pointers_in_the_additional_section_are_followed_when_they_lead_backwards() -> None:
    key = b"\xc0\x0c\x00\xfa\x00\xff\x00\x00\x00\x00\x00\x00"  # a TSIG without content, which nobody asked for
    assert read(header(additionals=1) + QUESTION + key).name == "www.example"


@pytest.mark.parametrize(("pointers", "is_served"), [(32, True), (33, False), (1000, False)])
def test_long_chain_of_pointers_is_given_up_early(pointers: int, is_served: bool) -> None:
    # A record of an unknown type carries the chain as its data: each pointer leads to the one before it.
    fixed = b"\xff\x00\x00\x01\x00\x00\x00\x00"
    start = len(HEADER + QUESTION) + 1 + len(fixed) + 2
    targets = [12] + [start + 2 * place for place in range(pointers - 1)]
    chain = b"".join((0xC000 | target).to_bytes(2) for target in targets[:-1])
    carrier = b"\x00" + fixed + len(chain).to_bytes(2) + chain
    named_by_it = (0xC000 | targets[-1]).to_bytes(2) + fixed + b"\x00\x00"
    found = read_query(header(additionals=2) + QUESTION + carrier + named_by_it)
    assert isinstance(found, Query) == is_served
    if isinstance(found, Drop):
        assert found.reason == "malformed_compression_loop"


@given(st.binary(max_size=600))
@example(b"\xc0" * 64)
def test_noise_never_raises(message: bytes) -> None:
    assert isinstance(read_query(message), Query | Drop)


@given(st.data())
def test_damaged_query_never_raises_and_what_is_read_can_be_answered(data: st.DataObject) -> None:
    record = DNSRecord.question(data.draw(st.sampled_from(["www.example", "a.b.c.d.example", "x" * 63 + ".example"])))
    record.add_ar(EDNS0(udp_len=1232, flags="do", opts=[EDNSOption(10, b"12345678")]))
    message = bytearray(record.pack())
    for _ in range(data.draw(st.integers(0, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    found = read_query(memoryview(message)[: data.draw(st.integers(0, len(message)))])
    if isinstance(found, Drop):
        assert found.reason.startswith(("malformed_", "unsupported_"))
        return
    reply = make_reply(found, [address_record(found, ADDRESS4, 300)])
    assert reply[:2] == found.id.to_bytes(2)
    assert reply[12 : 12 + len(found.question)] == found.question


def test_address_answer_keeps_the_spelling_of_the_question() -> None:
    query = question("wWw.eXample", "A")
    reply = DNSRecord.parse(make_reply(query, [address_record(query, ADDRESS4, 300)]))
    assert str(reply.q.qname) == "wWw.eXample."
    assert reply.rr == [RR("wWw.eXample", QTYPE.A, ttl=300, rdata=A("198.18.0.2"))]
    assert (reply.header.qr, reply.header.ra, reply.header.rd, reply.header.aa, reply.header.tc) == (1, 1, 1, 0, 0)
    assert reply.ar == []  # no EDNS without EDNS


def test_ipv6_address_answer() -> None:
    query = question("www.example", "AAAA")
    reply = DNSRecord.parse(make_reply(query, [address_record(query, ADDRESS6, 60)]))
    assert reply.rr == [RR("www.example", QTYPE.AAAA, ttl=60, rdata=AAAA("2001:2::2"))]


def test_edns_is_answered_with_edns_and_the_error_said_more_exactly() -> None:
    reply = DNSRecord.parse(make_reply(question(edns=4096), rcode=Rcode.NXDOMAIN, error=ExtendedError.BLOCKED))
    (opt,) = reply.ar
    assert (opt.rtype, opt.edns_len, opt.edns_ver) == (QTYPE.OPT, 1232, 0)
    assert [(each.code, each.data) for each in opt.rdata] == [(15, b"\x00\x0f")]
    assert (reply.header.rcode, reply.rr, reply.auth) == (Rcode.NXDOMAIN, [], [])


def test_pointer_and_any() -> None:
    query = question("2.0.18.198.in-addr.arpa", "PTR")
    assert (
        str(DNSRecord.parse(make_reply(query, [pointer_record(query, "www.example", 5)])).rr[0].rdata) == "www.example."
    )
    query = question("www.example", "ANY")
    reply = DNSRecord.parse(make_reply(query, [refuse_any_record(query)]))
    assert (reply.rr[0].rtype, bytes(reply.rr[0].rdata.data)) == (QTYPE.HINFO, b"\x07RFC8482\x00")


def test_name_of_bytes_that_are_no_text_comes_back_as_it_went() -> None:
    query = read(HEADER + b"\x02\xff\x00\x00\x00\x01\x00\x01")
    assert query.name == "\\255\\000"
    reply = make_reply(query, [address_record(query, ADDRESS4, 300)])
    assert reply[12:].startswith(b"\x02\xff\x00\x00\x00\x01\x00\x01\xc0\x0c\x00\x01\x00\x01")


@pytest.mark.parametrize(
    ("edns", "length", "cut"),
    [
        (None, 512, False),
        (None, 513, True),
        (600, 600, False),
        (600, 601, True),
        (4096, 1232, False),
        (4096, 1233, True),
    ],
)
def test_reply_by_datagram_is_whole_or_says_that_it_is_not(edns: int | None, length: int, cut: bool) -> None:
    query = question(edns=edns)
    reply = make_reply(query, [address_record(query, ADDRESS4, 300)])
    reply += bytes(length - len(reply))
    sent = fit(query, reply)
    assert (sent != reply) == cut
    if cut:
        parsed = DNSRecord.parse(sent)
        assert (parsed.header.tc, parsed.header.id, parsed.header.rcode, parsed.rr) == (1, query.id, 0, [])
        assert str(parsed.q.qname) == "www.example."
        assert len(parsed.ar) == (edns is not None)


@pytest.mark.parametrize("name", ["", ".", "a..b", "x" * 64, ".".join(["y" * 62] * 5), "grün.example"])
def test_own_query_for_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        make_query(name, QTYPE.A)
