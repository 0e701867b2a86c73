"""What upstream servers say: asked safely, read without belief, told on with TTLs that count down.

An answer is kept as the bytes that came. Records of types that ztun has never heard of pass unchanged, and so does the
compression inside them, because every reply starts with the same 12 bytes and a question of the same length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ztun.names.message import (
    CLASS_IN,
    MAX_MESSAGE,
    UDP_SIZE,
    Query,
    Rcode,
    Type,
    opt_bytes,
)
from ztun.names.scan import (
    AD,
    CD,
    DO,
    HEADER_LENGTH,
    OPCODE,
    QR,
    RA,
    RD,
    TC,
    MalformedError,
    Record,
    read_header,
    read_name,
    read_question,
    read_records,
)
from ztun.ports import Buffer

_PADDING = 12  # EDNS option, RFC 7830
_PADDED_BLOCK = 128  # RFC 8467 section 4.1

_MAX_TTL = 86400
# RFC 2308 section 5: one to three hours.
_MAX_NEGATIVE_TTL = 10800


class Unusable(NamedTuple):
    """An upstream message that is no answer to the question; `reason` is for a counter."""

    reason: str


class Address(NamedTuple):
    """A packed address that a client may connect to because of an answer, and for how many seconds."""

    address: bytes
    ttl: int


class Answer(NamedTuple):
    """An upstream answer. body: header, question, answer and authority section; records: those of these sections.

    lifetime: seconds for which it may be told on, 0 if not at all later than now. truncated: there is more by TCP.
    """

    rcode: int
    authentic: bool
    truncated: bool
    body: bytes
    records: tuple[Record, ...]
    lifetime: int

    def ttl_of(self, record: Record, elapsed: float) -> int:
        """The TTL of one of its records after `elapsed` seconds."""
        ttl = min(record.ttl, _MAX_TTL)
        if self.is_negative:
            ttl = min(ttl, self.lifetime)  # RFC 2308 section 5
        return max(0, ttl - int(elapsed))

    @property
    def is_negative(self) -> bool:
        """The name, or data of the type, does not exist (RFC 2308 section 2)."""
        return self.rcode == Rcode.NXDOMAIN or not any(record.section == 1 for record in self.records)

    def reply(self, query: Query, elapsed: float = 0.0) -> bytes:
        """The answer as a reply to `query`, whose question is the one that was asked upstream."""
        flags = QR | query.flags & (RD | CD) | RA | self.rcode
        if self.authentic and (query.dnssec_ok or query.flags & AD):  # RFC 6840 section 5.8
            flags |= AD
        message = bytearray(self.body)
        message[0:4] = query.id.to_bytes(2) + flags.to_bytes(2)
        message[HEADER_LENGTH : HEADER_LENGTH + len(query.question)] = query.question
        for record in self.records:
            message[record.ttl_offset : record.ttl_offset + 4] = self.ttl_of(record, elapsed).to_bytes(4)
        opt = opt_bytes(query)
        message[10:12] = b"\x00\x01" if opt else b"\x00\x00"
        return bytes(message + opt)

    def addresses(self, elapsed: float = 0.0) -> Iterator[Address]:
        """The addresses that a client may take from it: of A, AAAA, and hints of SVCB and HTTPS (RFC 9460, 7.3)."""
        for record in self.records:
            if record.section == 1 and record.klass == CLASS_IN:
                ttl = self.ttl_of(record, elapsed)
                for address in _addresses_in(self.body, record):
                    yield Address(address, ttl)


def make_upstream_query(
    query: Query, identifier: int, question: bytes | None = None, *, edns: bool = True, padded: bool = False
) -> bytes:
    """The query that asks upstream what `query` asks. question: another spelling of the same question (0x20).

    padded: for encrypted transports, so that the length says little about the name (RFC 8467).
    """
    flags = RD | query.flags & (CD | AD)
    counts = b"\x00\x01\x00\x00\x00\x00\x00\x01" if edns else b"\x00\x01\x00\x00\x00\x00\x00\x00"
    message = identifier.to_bytes(2) + flags.to_bytes(2) + counts + (question or query.question)
    if not edns:
        return message
    head = b"\x00" + int(Type.OPT).to_bytes(2) + UDP_SIZE.to_bytes(2)
    head += (DO if query.dnssec_ok else 0).to_bytes(4)
    if not padded:
        return message + head + b"\x00\x00"
    padding = -(len(message) + len(head) + 6) % _PADDED_BLOCK
    option = _PADDING.to_bytes(2) + padding.to_bytes(2) + bytes(padding)
    return message + head + len(option).to_bytes(2) + option


def read_answer(received: Buffer, question: bytes, *, exact_case: bool = False) -> Answer | Unusable:
    """Read what an upstream server sent. question: the wire form of the question that it was asked.

    exact_case: the spelling must come back as it was sent (draft-vixie-dnsext-dns0x20).
    """
    try:
        return _read_answer(bytes(received), question, exact_case)
    except MalformedError as error:
        return Unusable(error.reason)


def _read_answer(message: bytes, question: bytes, exact_case: bool) -> Answer | Unusable:
    header = read_header(message)
    if len(message) > MAX_MESSAGE:
        raise MalformedError("too_long")
    if not header.flags & QR or header.flags & OPCODE:
        return Unusable("not_a_response")
    if header.questions != 1:
        return Unusable("wrong_question")
    asked = read_question(message)
    if not _same_question(asked.wire, question):
        return Unusable("wrong_question")
    if exact_case and asked.wire != question:
        return Unusable("wrong_case")
    rcode, truncated = header.flags & 0xF, bool(header.flags & TC)
    if truncated:
        return Answer(rcode, False, True, b"", (), 0)
    records = read_records(message, header, asked.end)
    if any(record.type == Type.OPT and record.ttl >> 24 for record in records):
        return Unusable("extended_rcode")
    return _trim(message, rcode, bool(header.flags & AD), records, asked.end)


def _same_question(first: bytes, second: bytes) -> bool:
    # Lower-casing the whole wire form would also fold the type; lengths (< 64) and case bits cannot be confused.
    return first[-4:] == second[-4:] and first[:-4].lower() == second[:-4].lower()


def _trim(message: bytes, rcode: int, authentic: bool, records: list[Record], end: int) -> Answer:
    """Leave the additional section out: upstream's OPT is a matter of that hop, and the rest is optional."""
    kept = tuple(record for record in records if record.section != 3)
    body = message[: kept[-1].end if kept else end]
    # RFC 2181 section 8: a TTL with the highest bit set is zero.
    kept = tuple(record._replace(ttl=0) if record.ttl >> 31 else record for record in kept)
    return Answer(rcode, authentic, False, body, kept, _lifetime(body, rcode, kept))


def _lifetime(body: bytes, rcode: int, records: tuple[Record, ...]) -> int:
    if rcode not in (Rcode.NOERROR, Rcode.NXDOMAIN):
        return 0
    answers = [record for record in records if record.section == 1]
    if rcode == Rcode.NXDOMAIN or not answers:
        negative = _negative_ttl(body, records)
        return min([negative, *(record.ttl for record in answers)])
    return min(_MAX_TTL, *(record.ttl for record in answers))


def _negative_ttl(body: bytes, records: tuple[Record, ...]) -> int:
    """RFC 2308 section 5: the lesser of the SOA's own TTL and its minimum field; without a SOA, do not keep it."""
    for record in records:
        if record.section == 2 and record.type == Type.SOA and record.data_length >= 22:
            minimum = int.from_bytes(body[record.end - 4 : record.end])
            return min(record.ttl, minimum, _MAX_NEGATIVE_TTL)
    return 0


def _addresses_in(body: bytes, record: Record) -> Iterator[bytes]:
    data = body[record.data_offset : record.end]
    if (record.type, len(data)) in ((Type.A, 4), (Type.AAAA, 16)):
        yield data
    elif record.type in (Type.SVCB, Type.HTTPS):
        yield from _hints(data)


def _hints(data: bytes) -> Iterator[bytes]:
    """ipv4hint (key 4) and ipv6hint (key 6) of SVCB record data (RFC 9460 section 2.2); nothing if malformed."""
    try:
        _target, offset = read_name(data, 2, compressed=False)
    except MalformedError:
        return
    while offset + 4 <= len(data):
        key, length = int.from_bytes(data[offset : offset + 2]), int.from_bytes(data[offset + 2 : offset + 4])
        value = data[offset + 4 : offset + 4 + length]
        size = {4: 4, 6: 16}.get(key, 0)
        if size and len(value) == length and length % size == 0:
            yield from (value[start : start + size] for start in range(0, length, size))
        offset += 4 + length
