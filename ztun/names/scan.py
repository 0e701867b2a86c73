"""Walks through a DNS message (RFC 1035 section 4) without believing it: every length is checked before it is used.

dnslib reads compressed names by recursion and without a bound on their length, so a message of 64 KiB can cost it a
RecursionError or seconds. What strangers sent is therefore walked through here; dnslib builds what ztun itself says.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER_LENGTH = 12
_MAX_NAME = 255  # octets on the wire, RFC 1035 section 2.3.4
# Compression saves a pointer per name in honest messages; a chain is a name that ends in one that ends in one.
_MAX_POINTERS = 32
_MAX_RECORDS = 2048

_HEADER = struct.Struct("!HHHHHH")
_QUESTION_TAIL = struct.Struct("!HH")
_RECORD_TAIL = struct.Struct("!HHIH")

# The header's flags (RFC 1035 section 4.1.1, RFC 4035 section 3.1.6), and the one in an OPT's TTL (RFC 3225).
QR, OPCODE, TC, RD, RA, AD, CD = 0x8000, 0x7800, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
DO = 0x8000

Labels = tuple[bytes, ...]


class MalformedError(Exception):
    """The message breaks the format; `reason` is a short constant, fit for a counter's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """RFC 1035 section 4.1.1. flags: the 16 bits with QR, opcode, …, rcode; the rest are the counts of records."""

    id: int
    flags: int
    questions: int
    answers: int
    authorities: int
    additionals: int


class Question(NamedTuple):
    """labels: as sent, upper and lower case kept; wire: the question's bytes; end: offset of what follows it."""

    labels: Labels
    type: int
    klass: int
    wire: bytes
    end: int


class Record(NamedTuple):
    """Where a resource record's parts lie. section: 1 answer, 2 authority, 3 additional; owner: offset of its name."""

    section: int
    owner: int
    type: int
    klass: int
    ttl: int
    ttl_offset: int
    data_offset: int
    data_length: int

    @property
    def end(self) -> int:
        return self.data_offset + self.data_length


def read_header(message: bytes) -> Header:
    """Raises MalformedError("short") when there are fewer than 12 bytes."""
    if len(message) < HEADER_LENGTH:
        raise MalformedError("short")
    return Header(*_HEADER.unpack_from(message))


def read_name(message: bytes, offset: int, *, compressed: bool = True) -> tuple[Labels, int]:
    """The labels of the name at `offset`, and the offset behind it. Raises MalformedError.

    A pointer must point to before the name or the part of it that it ends, so that reading comes to an end.
    """
    labels: list[bytes] = []
    length, pointers, end, limit = 1, 0, -1, offset
    while True:
        if offset >= len(message):
            raise MalformedError("name_cut_short")
        octet = message[offset]
        if octet == 0:
            return tuple(labels), offset + 1 if end < 0 else end
        if octet < 64:
            label = message[offset + 1 : offset + 1 + octet]
            length += 1 + octet
            if len(label) != octet:
                raise MalformedError("name_cut_short")
            if length > _MAX_NAME:
                raise MalformedError("name_too_long")
            labels.append(label)
            offset += 1 + octet
        elif octet >= 192 and compressed:
            if offset + 2 > len(message):
                raise MalformedError("name_cut_short")
            target = (octet & 0x3F) << 8 | message[offset + 1]
            pointers += 1
            if not HEADER_LENGTH <= target < limit or pointers > _MAX_POINTERS:
                raise MalformedError("compression_loop")
            if end < 0:
                end = offset + 2
            offset = limit = target
        else:
            # 01 and 10 are reserved (RFC 6891 section 5), and nothing can be compressed against the header.
            raise MalformedError("bad_label")


def read_question(message: bytes) -> Question:
    """The question that follows the header. Raises MalformedError."""
    labels, offset = read_name(message, HEADER_LENGTH, compressed=False)
    end = offset + _QUESTION_TAIL.size
    if end > len(message):
        raise MalformedError("question_cut_short")
    kind, klass = _QUESTION_TAIL.unpack_from(message, offset)
    return Question(labels, kind, klass, message[HEADER_LENGTH:end], end)


def read_records(message: bytes, header: Header, offset: int) -> list[Record]:
    """The records that start at `offset`. Raises MalformedError; bytes behind the last record are let pass."""
    records: list[Record] = []
    counts = (header.answers, header.authorities, header.additionals)
    if sum(counts) > _MAX_RECORDS:
        raise MalformedError("too_many_records")
    for section, count in enumerate(counts, start=1):
        for _ in range(count):
            record = _read_record(message, offset, section)
            records.append(record)
            offset = record.end
    return records


def _read_record(message: bytes, offset: int, section: int) -> Record:
    owner = offset
    _labels, offset = read_name(message, offset)
    if offset + _RECORD_TAIL.size > len(message):
        raise MalformedError("record_cut_short")
    kind, klass, ttl, length = _RECORD_TAIL.unpack_from(message, offset)
    data = offset + _RECORD_TAIL.size
    if data + length > len(message):
        raise MalformedError("record_cut_short")
    return Record(section, owner, kind, klass, ttl, offset + 4, data, length)


def text_of(labels: Labels) -> str:
    """A name as text, lower case, without trailing dot; "" is the root.

    What could be mistaken for something else (dots inside a label, spaces, anything not printable ASCII) is written as
    \\DDD (RFC 4343 section 2.1), so that two names give the same text only when they are the same.
    """
    return ".".join(_label_text(label.lower()) for label in labels)


def _label_text(label: bytes) -> str:
    if label.isalnum():  # ASCII only, for bytes
        return label.decode("ascii")
    return "".join(chr(octet) if _is_plain(octet) else f"\\{octet:03d}" for octet in label)


def _is_plain(octet: int) -> bool:
    return 0x21 <= octet <= 0x7E and octet not in b".\\"
