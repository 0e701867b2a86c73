"""DNS messages, from clients and from upstream, and TCP options."""

from __future__ import annotations

from fuzz.source import Source
from ztun.names.answer import Answer, Unusable, make_upstream_query, read_answer
from ztun.names.message import UDP_SIZE, Drop, Query, fit, make_query, make_reply, read_query
from ztun.names.scan import MalformedError, read_header, read_question
from ztun.wire import tcp

_ASKED = make_query("www.example.com", 1)


def run_query(data: bytes) -> None:
    """What a client sent: served, or dropped for a named reason, perhaps with a reply."""
    found = read_query(data)
    if isinstance(found, Drop):
        assert found.reason.startswith(("malformed_", "unsupported_"))
        if found.reply is not None:
            assert found.reply[:2] == data[:2]
            assert found.reply[2] & 0x80
        return
    assert isinstance(found, Query)
    assert found.question in data
    reply = make_reply(found)
    assert reply[:2] == data[:2]
    assert len(fit(found, reply)) <= max(UDP_SIZE, 512)
    again = read_query(make_upstream_query(found, 7))
    assert isinstance(again, Query)
    assert (again.name, again.type) == (found.name, found.type)


def run_answer(data: bytes) -> None:
    """What an upstream server sent: an answer that can be told on, or not usable for a named reason."""
    source = Source(data)
    message = data
    if source.below(2):  # the right header and question, so that the records are reached
        counts = bytes((0, 1, 0, source.below(5), 0, source.below(3), 0, source.below(3)))
        message = source.bytes(2).ljust(2, b"\0") + b"\x81\x80" + counts + _ASKED.question + source.rest()
    found = read_answer(message, _ASKED.question)
    if isinstance(found, Unusable):
        assert found.reason
        return
    assert isinstance(found, Answer)
    for address, ttl in found.addresses(1.0):
        assert len(address) in (4, 16)
        assert ttl >= 0
    if found.truncated:
        return
    told = found.reply(_ASKED, 2.0)
    assert len(told) <= len(message) + 11
    # It may not be readable: a pointer of the server's may lead into a TTL, and that has changed.
    read_answer(told, _ASKED.question)
    assert told[12 : 12 + len(_ASKED.question)] == _ASKED.question


def run_name(data: bytes) -> None:
    """The walk through names and questions comes to an end."""
    try:
        read_header(data)
        question = read_question(data)
    except MalformedError as error:
        assert error.reason  # noqa: PT017
        return
    assert question.end <= len(data)
    assert sum(len(label) + 1 for label in question.labels) <= 255


def run_options(data: bytes) -> None:
    """TCP options: whatever they are, what was understood survives being written and read again."""
    found = tcp.parse_options(memoryview(data[:40]))
    assert found.window_scale is None or 0 <= found.window_scale <= tcp.MAX_WINDOW_SCALE
    packed = tcp.pack_options(found)
    assert len(packed) % 4 == 0
    assert tcp.parse_options(memoryview(packed)) == found
