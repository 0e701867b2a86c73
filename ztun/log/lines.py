"""From an event to a line: processors for structlog, in the order in which `processors` lists them."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from ztun.log.clean import Cleaner

_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode
_format_traceback = structlog.processors.ExceptionRenderer()


def processors(cleaner: Cleaner, format: str, *, colours: bool = False, with_time: bool = True) -> list[Processor]:
    """What makes the lines. format: "json" (RFC 8259, times in UTC by RFC 3339) or "console".

    colours, with_time: of the console format.
    """
    if format == "json":
        return [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            explain_exception,
            cleaner,
            structlog.processors.JSONRenderer(serializer=_to_json),
        ]
    stamp: list[Processor] = [LocalTime()] if with_time else []
    return [*stamp, explain_exception, cleaner, Console(colours=colours)]


class LocalTime:
    """The time in whole seconds, made into text once in each of them: lines come in crowds."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        second = int(time.time())
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        event["timestamp"] = self._text
        return event


def explain_exception(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """A traceback is for debugging; otherwise the exception takes its place in the line."""
    found = event.get("exc_info")
    if not found:
        event.pop("exc_info", None)
    elif logger.threshold.value <= logging.DEBUG:
        return _format_traceback(logger, method, event)
    else:
        del event["exc_info"]
        error = found[1] if isinstance(found, tuple) else found
        error = error if isinstance(error, BaseException) else sys.exc_info()[1]
        if error is not None:
            event.setdefault("error", repr(error))
    return event


def _to_json(event: EventDict, **_options: Any) -> str:
    return _encode(event)


class Console:
    """Renders for people: time, level, component, event, then key=value pairs, quoted where they are not one word.

    structlog's own renderer quotes nothing, so that a name could pass for several pairs, and with rich its tracebacks
    show local variables, passwords among them.
    """

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> str:
        stamp, level, name = event.pop("timestamp", None), event.pop("level"), event.pop("logger").removeprefix("ztun.")
        text, traceback = event.pop("event"), event.pop("exception", None)
        stamp = f"{stamp} " if stamp else ""
        if self._colours:
            pairs = "".join(f" {_DIM}{key}={_RESET}{write_value(value)}" for key, value in event.items())
            mark = f"{_COLOURS[level]}{level:<7}{_RESET}"
            line = f"{_DIM}{stamp}{_RESET}{mark} {_DIM}{name}:{_RESET} {_BOLD}{text}{_RESET}{pairs}"
        else:
            pairs = "".join([f" {key}={write_value(value)}" for key, value in event.items()])
            line = f"{stamp}{level:<7} {name}: {text}{pairs}"
        return line if traceback is None else f"{line}\n{traceback}"


def write_value(value: Any) -> str:
    """A word as it is; anything that could be taken for more than one value in quotes, as in JSON."""
    if isinstance(value, str):
        is_word = value and " " not in value and "=" not in value and '"' not in value
        return value if is_word else json.dumps(value, ensure_ascii=False)
    if value is None:
        return "-"
    return str(value) if type(value) is int or type(value) is float else _encode(value)
