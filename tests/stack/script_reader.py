"""Reads packet scripts (tests/stack/scripts/*.pkt), a small language in the style of packetdrill, and plays them.

A line is a pause, an actor and what it does; // begins a comment:

    +0.0   < S 0:0(0) win 65535 <mss 1460,sackOK,wscale 7>      the client sends
    +0.04  > . 1:1(0) ack 1001 win 1000 <sack 3001:4001>        the stack has sent this by now, and nothing before it
    +0.2   app send 3000                                        the application: accept, refuse, hold, take N, send N,
                                                                shutdown, abort
    +1.0   is silent                                            or how it ended: is finished, is timed out, ...
    set receive_buffer 20000                                    one of StackSettings, before all

Flags are S, F, R, P and . for ACK. Numbers are relative, as `conversation.Client` has them: 0 is the SYN. What a line
does not name (win, an option) is not compared. P is compared where a line has it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from conversation import Client
from packets import ACK, FIN, PSH, RST, SYN

_FLAGS = {"S": SYN, "F": FIN, "R": RST, "P": PSH, ".": ACK}
_LINE = re.compile(r"\+(?P<pause>[\d.]+)\s+(?P<actor><|>|app|is)\s+(?P<rest>.+)")
_SEGMENT = re.compile(
    r"(?P<flags>[SFRP.]+) (?P<seq>-?\d+):(?P<end>-?\d+)\((?P<length>\d+)\)"
    r"(?: ack (?P<ack>-?\d+))?(?: win (?P<win>\d+))?(?: <(?P<options>[^>]*)>)?"
)


class Line(NamedTuple):
    """number: in the file; pause: seconds before it."""

    number: int
    pause: float
    actor: str
    rest: str


class ScriptError(Exception):
    """A script cannot be read, or the stack does not follow it. Says where."""


def read(text: str) -> list[Line]:
    """Raises ScriptError."""
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("//")[0].strip()
        if not line or line.startswith("set "):
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise ScriptError(f"line {number}: cannot be read: {line}")
        lines.append(Line(number, float(found["pause"]), found["actor"], found["rest"].strip()))
    return lines


def settings(path: Path) -> dict[str, float]:
    """What the script wants of StackSettings."""
    words = [line.split() for line in path.read_text().splitlines() if line.startswith("set ")]
    return {name: int(value) if value.isdigit() else float(value) for _, name, value in words}


def play(path: Path, client: Client) -> None:
    """Raises ScriptError."""
    for line in read(path.read_text()):
        try:
            _play(line, client)
        except (AssertionError, ValueError, AttributeError) as wrong:
            raise ScriptError(f"{path.name}, line {line.number}: {wrong}") from wrong
    if client.net.sent:
        raise ScriptError(f"{path.name}: the stack has said more")


def _play(line: Line, client: Client) -> None:
    if line.pause:
        client.waits(line.pause)
    if line.actor == "<":
        flags, expected = _segment(line.rest)
        size = expected.pop("size")
        client.says(flags, bytes(size), window=expected.pop("window", None), **expected)
    elif line.actor == ">":
        flags, expected = _segment(line.rest)
        client.hears(flags, **expected)
    elif line.actor == "app":
        _act(line.rest.split(), client)
    elif line.rest == "silent":
        client.hears_nothing()
    else:
        assert client.app.how is not None, "it has not ended"
        assert client.app.how.value == line.rest, f"it ended: {client.app.how.value}"


def _segment(text: str) -> tuple[int, dict[str, Any]]:
    found = _SEGMENT.fullmatch(text)
    if found is None:
        raise ValueError(f"no segment: {text}")
    fields: dict[str, Any] = {"seq": int(found["seq"]), "size": int(found["length"])}
    if int(found["end"]) - int(found["seq"]) != fields["size"]:
        raise ValueError(f"the length does not fit: {text}")
    if found["ack"] is not None:
        fields["ack"] = int(found["ack"])
    if found["win"] is not None:
        fields["window"] = int(found["win"])
    for option in filter(None, (found["options"] or "").split(",")):
        fields |= _option(option.strip())
    return sum(_FLAGS[letter] for letter in found["flags"]), fields


def _option(text: str) -> dict[str, Any]:
    name, *values = text.split()
    if name == "sackOK":
        return {"sack_ok": True}
    if name in ("mss", "wscale"):
        return {name: int(values[0])}
    if name == "sack":
        blocks = [tuple(map(int, block.split(":"))) for block in values]
        return {"sack": blocks}
    raise ValueError(f"no option: {text}")


def _act(words: list[str], client: Client) -> None:
    count = int(words[1]) if len(words) > 1 else 0
    match words[0]:
        case "accept":
            client.app = client.net.accepts()
        case "refuse":
            client.conn.refuse(client.net.now)
            client.net.collect()
        case "hold":
            client.app.holds = True
        case "take":
            client.app.takes(count)
        case "send":
            client.app.sends(bytes(count))
        case "shutdown":
            client.app.shuts_down()
        case "abort":
            client.app.resets()
        case _:
            raise ValueError(f"no act: {words[0]}")
