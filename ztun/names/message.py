"""Queries in, replies out. No query, however malformed, raises: what cannot be served comes back as a `Drop`."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import dnslib
from dnslib import AAAA, EDNS0, PTR, QTYPE, RR, A, DNSHeader, DNSLabel, DNSQuestion, DNSRecord, EDNSOption

from ztun.names.scan import (
    CD,
    DO,
    OPCODE,
    QR,
    RA,
    RD,
    TC,
    Labels,
    MalformedError,
    Question,
    Record,
    read_header,
    read_question,
    read_records,
    text_of,
)
from ztun.ports import Buffer

# What ztun sends at most in a datagram, and tells upstream that it takes: it never needs fragments (RFC 9715).
UDP_SIZE = 1232
# Without EDNS (RFC 1035 section 4.2.1), and the least that EDNS can ask for (RFC 6891 section 6.2.3).
PLAIN_UDP_SIZE = 512
MAX_MESSAGE = 65535
# A query is a header, a question and an OPT; even a padded one (RFC 8467) stays far below.
_MAX_QUERY = 4096

CLASS_IN = 1


class Type(IntEnum):
    """The record types that ztun treats in a way of their own."""

    A = QTYPE.A
    NS = QTYPE.NS
    SOA = QTYPE.SOA
    PTR = QTYPE.PTR
    HINFO = QTYPE.HINFO
    AAAA = QTYPE.AAAA
    OPT = QTYPE.OPT
    SVCB = 64
    HTTPS = QTYPE.HTTPS
    ANY = QTYPE.ANY


# RFC 6895 section 3.1: TKEY to MAILA and beyond ask for transactions and transfers, not for data of a name.
_META_TYPES = range(249, 255)


class Rcode(IntEnum):
    """RFC 6895 section 2.3."""

    NOERROR = 0
    FORMERR = 1
    SERVFAIL = 2
    NXDOMAIN = 3
    NOTIMP = 4
    REFUSED = 5
    BADVERS = 16


class ExtendedError(IntEnum):
    """Why, for clients that show it (RFC 8914 section 4)."""

    OTHER = 0
    BLOCKED = 15
    NO_REACHABLE_AUTHORITY = 22


class Query(NamedTuple):
    """A query that can be served.

    name: as `text_of` gives it; labels and question: as the client spelled it (RFC 4343, and the 0x20 practice);
    flags: the header's. udp_size: None without EDNS; dnssec_ok: EDNS's DO bit (RFC 3225).
    """

    id: int
    flags: int
    name: str
    labels: Labels
    type: int
    question: bytes
    udp_size: int | None = None
    dnssec_ok: bool = False

    @property
    def checking_disabled(self) -> bool:
        return bool(self.flags & CD)


class Drop(NamedTuple):
    """A message that is not served. reason: for a counter, "malformed_…" or "unsupported_…"; reply: to its sender."""

    reason: str
    reply: bytes | None = None


def make_query(name: str, kind: int) -> Query:
    """A query of our own for a host's name. Raises ValueError when the name cannot be asked for."""
    labels = tuple(name.removesuffix(".").encode("ascii").split(b"."))
    if not all(0 < len(label) < 64 for label in labels) or sum(len(label) + 1 for label in labels) > 254:
        raise ValueError(f"{name!r} is no name")
    wire = b"".join(bytes((len(label),)) + label for label in labels) + b"\x00"
    return Query(0, RD, text_of(labels), labels, kind, wire + kind.to_bytes(2) + CLASS_IN.to_bytes(2))


def read_query(received: Buffer) -> Query | Drop:
    """Read what a client sent."""
    message = bytes(received)
    try:
        header = read_header(message)
    except MalformedError as error:
        return Drop(f"malformed_{error.reason}")
    if header.flags & QR:
        return Drop("malformed_not_a_query")  # never answered: two servers could answer each other for ever
    try:
        return _read_query(message)
    except MalformedError as error:
        return Drop(f"malformed_{error.reason}", bare_reply(header.id, header.flags, Rcode.FORMERR))


def _read_query(message: bytes) -> Query | Drop:
    header = read_header(message)
    if header.flags & OPCODE:
        return Drop("unsupported_opcode", bare_reply(header.id, header.flags, Rcode.NOTIMP))
    if len(message) > _MAX_QUERY:
        raise MalformedError("too_long")
    if header.questions != 1:
        raise MalformedError("not_one_question")  # RFC 9619
    if header.answers or header.authorities:
        raise MalformedError("records_in_query")
    question = read_question(message)
    opt = _find_opt(read_records(message, header, question.end))
    query = _make_query(header.id, header.flags, question, opt)
    if opt is not None and (opt.ttl >> 16) & 0xFF:
        return Drop("unsupported_edns_version", make_reply(query, rcode=Rcode.BADVERS))
    if question.klass != CLASS_IN:
        return Drop("unsupported_class", make_reply(query, rcode=Rcode.REFUSED))
    if question.type in _META_TYPES or question.type in (0, Type.OPT):
        return Drop("unsupported_type", make_reply(query, rcode=Rcode.NOTIMP))
    return query


def _find_opt(records: Iterable[Record]) -> Record | None:
    found = [record for record in records if record.type == Type.OPT]
    if len(found) > 1:
        raise MalformedError("more_than_one_opt")  # RFC 6891 section 6.1.1
    return found[0] if found else None


def _make_query(identifier: int, flags: int, question: Question, opt: Record | None) -> Query:
    name = text_of(question.labels)
    if opt is None:
        return Query(identifier, flags, name, question.labels, question.type, question.wire)
    size = max(PLAIN_UDP_SIZE, opt.klass)
    do = bool(opt.ttl & DO)
    return Query(identifier, flags, name, question.labels, question.type, question.wire, size, do)


def bare_reply(identifier: int, flags: int, rcode: Rcode) -> bytes:
    """A header alone, for a query whose question could not be read."""
    return b"".join(
        value.to_bytes(2) for value in (identifier, QR | flags & (OPCODE | RD) | RA | rcode & 0xF, 0, 0, 0, 0)
    )


def make_reply(
    query: Query,
    answers: Iterable[RR] = (),
    rcode: Rcode = Rcode.NOERROR,
    error: ExtendedError | None = None,
) -> bytes:
    """A reply of ztun's own, with the question as the client spelled it, and an OPT if the query had one."""
    header = DNSHeader(id=query.id, bitmap=QR | query.flags & (RD | CD) | RA | rcode & 0xF)
    question = DNSQuestion(DNSLabel(query.labels), query.type, int.from_bytes(query.question[-2:]))
    record = DNSRecord(header, [question], list(answers))
    if query.udp_size is not None:
        record.add_ar(_make_opt(query, rcode, error))
    return bytes(record.pack())


def _make_opt(query: Query, rcode: int = 0, error: ExtendedError | None = None) -> EDNS0:
    options = [] if error is None else [EDNSOption(15, int(error).to_bytes(2))]
    flags = "do" if query.dnssec_ok else ""
    return EDNS0(flags=flags, ext_rcode=rcode >> 4, udp_len=UDP_SIZE, opts=options)


def opt_bytes(query: Query) -> bytes:
    """The OPT record for a reply to `query` that dnslib does not build; empty when the query had none."""
    if query.udp_size is None:
        return b""
    ttl = DO if query.dnssec_ok else 0
    return b"\x00" + int(Type.OPT).to_bytes(2) + UDP_SIZE.to_bytes(2) + ttl.to_bytes(4) + b"\x00\x00"


def address_record(query: Query, address: bytes, ttl: int) -> RR:
    """An A or AAAA record of the queried name; address: 4 or 16 bytes."""
    data = A(tuple(address)) if len(address) == 4 else AAAA(tuple(address))
    return RR(DNSLabel(query.labels), Type.A if len(address) == 4 else Type.AAAA, CLASS_IN, ttl, data)


def pointer_record(query: Query, name: str, ttl: int) -> RR:
    """A PTR record of the queried name."""
    return RR(DNSLabel(query.labels), Type.PTR, CLASS_IN, ttl, PTR(DNSLabel(name.encode("ascii"))))


def refuse_any_record(query: Query) -> RR:
    """The answer to a query for ANY that serves nobody as an amplifier (RFC 8482 section 4.2)."""
    return RR(DNSLabel(query.labels), Type.HINFO, CLASS_IN, 3600, dnslib.RD(b"\x07RFC8482\x00"))


def fit(query: Query, reply: bytes) -> bytes:
    """The reply as it fits a datagram: whole, or the question alone with TC set, so that the client asks by TCP."""
    limit = PLAIN_UDP_SIZE if query.udp_size is None else min(query.udp_size, UDP_SIZE)
    if len(reply) <= limit:
        return reply
    opt = opt_bytes(query)
    flags = int.from_bytes(reply[2:4]) | TC
    counts = b"\x00\x01\x00\x00\x00\x00" + (b"\x00\x01" if opt else b"\x00\x00")
    return reply[:2] + flags.to_bytes(2) + counts + query.question + opt


def frame(message: bytes) -> bytes:
    """The message as it goes into a stream, its length before it (RFC 1035 section 4.2.2)."""
    return len(message).to_bytes(2) + message
