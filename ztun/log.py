"""The log: structlog to stderr or a file, as text for a person or as one JSON object a line."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from ztun.errors import ConfigError

LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


def configure(level: str, format: str, file: str | None) -> None:
    """Set up the log of the process. level: a key of LEVELS; format: "console" or "json"; file: None for stderr.

    Raises ConfigError naming the key.
    """
    if level not in LEVELS:
        raise ConfigError(f"log.level: {level!r} is no level; use one of {', '.join(LEVELS)}")
    output = _open(file)
    structlog.configure(
        processors=_processors(level, format, output),
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *names: _Logger(output, *names),
        cache_logger_on_first_use=True,
    )
    _adopt_standard_logging(LEVELS[level])


def _open(file: str | None) -> TextIO:
    if file is None:
        return sys.stderr
    try:
        return open(file, "a", buffering=1, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"log.file: cannot write {file}: {error.strerror}") from None


def _processors(level: str, format: str, output: TextIO) -> list[Processor]:
    tail: list[Processor]
    if format == "json":
        tail = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        tail = [structlog.dev.ConsoleRenderer(colors=output.isatty(), pad_event_to=0, pad_level=False)]
    return [
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=format == "json"),
        *([] if level == "debug" else [_drop_traceback]),
        *tail,
    ]


def _drop_traceback(logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
    """Tracebacks are for --log-level debug; otherwise the exception takes its place in the line."""
    error = event.pop("exc_info", None)
    if error:
        cause = (
            error[1] if isinstance(error, tuple) else error if isinstance(error, BaseException) else sys.exc_info()[1]
        )
        if cause is not None:
            event.setdefault("error", repr(cause))
    return event


class _Logger:
    """Writes lines and knows its name (structlog's own do not), which `add_logger_name` puts into them."""

    def __init__(self, output: TextIO, name: str = "ztun") -> None:
        self.name = name
        self._output = output

    def msg(self, message: str) -> None:
        try:
            self._output.write(message + "\n")
            self._output.flush()
        except (OSError, ValueError):
            pass  # a full disk or a closed terminal must not stop the traffic

    log = debug = info = warning = warn = error = critical = exception = fatal = failure = msg


class _Forward(logging.Handler):
    """Hands records of the standard logging module (asyncio, aiohttp, pyroute2) to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        logger: FilteringBoundLogger = structlog.get_logger(record.name)
        logger.log(record.levelno, record.getMessage(), exc_info=record.exc_info or None)


def _adopt_standard_logging(level: int) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_Forward()]
    # Their "info" is our "debug": libraries tell more than a gateway's log should hold.
    root.setLevel(logging.DEBUG if level <= logging.DEBUG else max(level, logging.WARNING))
    logging.getLogger("asyncio").setLevel(logging.WARNING)
