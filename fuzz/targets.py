"""Every target by name: a function of bytes that raises when something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fuzz import names, outbound, stack


class Target(NamedTuple):
    """size: of the longest input in bytes; seeds: inputs to begin with."""

    run: Callable[[bytes], None]
    size: int
    seeds: Sequence[bytes] = ()


_QUERY = bytes.fromhex(
    "1234010000010000000000010377777707657861 6d706c6503636f6d00000100010000290 4d0000080000000".replace(" ", "")
)
_RECORD = bytes.fromhex("c00c000100010000003c0004c0000201")

TARGETS = {
    "stack": Target(stack.run, 4096),
    "options": Target(names.run_options, 40, [b"\x02\x04\x05\xb4\x04\x02\x08\x0a\0\0\x10\0\0\0\0\0\x01\x03\x03\x07"]),
    "dns-query": Target(names.run_query, 4200, [_QUERY]),
    "dns-answer": Target(names.run_answer, 2048, [b"\x01\x12\x34\x01\0\0" + _RECORD]),
    "dns-name": Target(names.run_name, 600, [_QUERY]),
    "dialogue": Target(
        outbound.run_dialogue, 2048, [b"\0\0\x02\x05\0\0\x01\x7f\0\0\x01\0\x50SSH", b"\0\1\6x: y\r\n\r\n"]
    ),
    "negotiation": Target(outbound.run_negotiation, 2048, [b"\0\0\x02\x05\0\0\x01\x7f\0\0\x01\0\x50SSH"]),
    "datagram": Target(outbound.run_datagram, 300, [b"\0\0\0\x01\x7f\0\0\x01\0\x35x", b"\0\0\0\x03\x01a\0\x35x"]),
}
