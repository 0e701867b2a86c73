"""Writes a small MaxMind DB file (MaxMind DB File Format Specification v2.0), IPv4 below ::/96 as the real ones."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple

_MARKER = b"\xab\xcd\xefMaxMind.com"


class _Unsigned(NamedTuple):
    """An integer of that many bytes; readers insist on the sizes that the specification names."""

    value: int
    size: int


def _encode(value: Any) -> bytes:
    """A value of the data section: a control byte with type and size, then the value."""
    if isinstance(value, str):
        return bytes([2 << 5 | len(value)]) + value.encode()
    if isinstance(value, _Unsigned):
        kind = {2: [5 << 5 | 2], 4: [6 << 5 | 4], 8: [8, 9 - 7]}[value.size]
        return bytes(kind) + value.value.to_bytes(value.size)
    if isinstance(value, list):
        return bytes([len(value), 11 - 7]) + b"".join(map(_encode, value))
    return bytes([7 << 5 | len(value)]) + b"".join(_encode(key) + _encode(part) for key, part in value.items())


def write_database(path: Path, records: Mapping[str, Any]) -> None:
    """records: network -> the record found for its addresses; the networks must not overlap."""
    nodes: list[list[Any]] = [[None, None]]
    for text, record in records.items():
        network = ip_network(text)
        length = network.prefixlen + (96 if network.version == 4 else 0)
        address, node = int(network.network_address), nodes[0]
        for depth in range(length - 1):
            bit = address >> (127 - depth) & 1
            if node[bit] is None:
                nodes.append([None, None])
                node[bit] = nodes[-1]
            node = node[bit]
        node[address >> (128 - length) & 1] = _encode(record)
    numbers = {id(node): number for number, node in enumerate(nodes)}
    tree, data = bytearray(), bytearray()
    places: dict[bytes, int] = {}  # records that are alike are written once, as in the real files
    for node in nodes:
        for record in node:
            value = len(nodes) if record is None else numbers.get(id(record), -1)
            if isinstance(record, bytes):
                if record not in places:
                    places[record] = len(nodes) + 16 + len(data)
                    data += record
                value = places[record]
            tree += value.to_bytes(3)
    metadata = {
        "node_count": _Unsigned(len(nodes), 4),
        "record_size": _Unsigned(24, 2),
        "ip_version": _Unsigned(6, 2),
        "database_type": "Test-Country",
        "languages": ["en"],
        "binary_format_major_version": _Unsigned(2, 2),
        "binary_format_minor_version": _Unsigned(0, 2),
        "build_epoch": _Unsigned(1, 8),
        "description": {"en": "test"},
    }
    path.write_bytes(tree + bytes(16) + data + _MARKER + _encode(metadata))
