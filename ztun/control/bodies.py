"""Large answers: cut to what is asked for, and encoded piece by piece.

A table may have a million entries. What reads and encodes one runs beside the event loop, and never holds the
interpreter for long: a loop that stands still for a second counts as dead (see the heartbeat in bpf/classify.c).
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from typing import Any

_PIECE = 500  # entries that are encoded at a time


def cut_maps(answer: Mapping[str, Any], most: int | None, name: str | None = None) -> dict[str, Any]:
    """The body of GET /routes with at most `most` entries of each map; each map gets "count", how many it has.

    most: None for all. name: of this map alone, and all of its entries. Those with the most hits stay, in their order.
    """
    if "maps" not in answer:
        return dict(answer)
    maps = [{**entry, "count": len(entry["entries"])} for entry in answer["maps"]]
    if name is not None:
        maps = [entry for entry in maps if entry["name"] == name]
    elif most is not None:
        maps = [{**entry, "entries": _busiest(entry["entries"], most)} for entry in maps]
    return {**answer, "maps": maps}


def _busiest(entries: list[Any], most: int) -> list[Any]:
    if len(entries) <= most:
        return entries
    hits = [entry.get("hits", entry.get("packets", 0)) for entry in entries]
    chosen = heapq.nlargest(most, range(len(entries)), key=lambda n: (hits[n], -n))
    return [entries[n] for n in sorted(chosen)]


def encode(answer: Mapping[str, Any]) -> bytes:
    """The answer as JSON."""
    return b"".join(_pieces(answer))


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        yield b"{"
        for number, (key, item) in enumerate(value.items()):
            yield b"%s%s:" % (b"," if number else b"", json.dumps(str(key)).encode())
            yield from _pieces(item)
        yield b"}"
    elif isinstance(value, list) and len(value) > _PIECE:
        yield b"["
        for start in range(0, len(value), _PIECE):
            yield (b"," if start else b"") + json.dumps(value[start : start + _PIECE])[1:-1].encode()
        yield b"]"
    elif isinstance(value, list) and value and isinstance(value[0], Mapping) and "entries" in value[0]:
        yield b"["
        for number, item in enumerate(value):
            yield b"," if number else b""
            yield from _pieces(item)
        yield b"]"
    else:
        yield json.dumps(value).encode()
