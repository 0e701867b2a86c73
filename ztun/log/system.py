"""The log of the process: levels, limits, and where lines go. There is one, `log_system`.

Every line takes the same way. The level of its component decides (one look), then the limit on repeats; only then is it
made clean, rendered and written. Nothing on that way raises, and nothing waits.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import Processor

from ztun.errors import ConfigError
from ztun.log.admission import Admission
from ztun.log.clean import Cleaner
from ztun.log.components import PREFIX, Levels, Threshold, component_name
from ztun.log.lines import processors
from ztun.log.outputs import FileOutput, Output, StreamOutput, is_journal
from ztun.log.repeats import WINDOW, Limit

# Their "info" is our "debug": libraries tell more than a gateway's log should hold.
_QUIET = logging.WARNING
REPEATS = Limit(50, 5.0)
FLOWS = Limit(200, 20.0)
_UNLIMITED = Limit(1 << 30, 1e9)
_METHODS = {0: "debug", 10: "debug", 20: "info", 30: "warning", 40: "error", 50: "critical"}


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Section "log" of the configuration, in plain values. rotate: bytes, files kept.

    repeats, flows: limits on each kind of line, and on each kind about flows; None for no limit.

    credentials: (user, password) pairs, of which no line may show a password.
    """

    level: str = "info"
    levels: Mapping[str, str] = field(default_factory=dict)
    format: str = "console"
    file: str | Path | None = None
    rotate: tuple[int, int] | None = (10_000_000, 5)
    repeats: Limit | None = REPEATS
    flows: Limit | None = FLOWS
    credentials: Iterable[tuple[str, str]] = field(default=(), repr=False)


class LogSystem:
    """written, dropped: lines that the output took and did not take."""

    def __init__(self) -> None:
        self.levels = Levels()
        self.written = 0
        self.dropped = 0
        self._lost = 0  # dropped since the last line that was written
        self._fault: str | None = None
        self._output: Output | None = None
        # One list for good, changed in place: loggers that were made before keep it.
        self._processors: list[Processor] = processors(Cleaner(), "console")
        self._lock = threading.RLock()
        self.admission = Admission(self._lock, _UNLIMITED, self._began_to_hold_back)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, options: LogOptions) -> None:
        """Set the log of the process up, or up anew. Raises ConfigError naming the key."""
        try:
            self.levels.configure(options.level, options.levels)
        except ValueError as error:
            raise ConfigError(f"log: {error}") from None
        output = _make_output(options)
        self.close()
        self._output = output
        self.admission.is_open = output is not None
        self._processors[:] = _make_processors(options)
        self.admission.begin(options.repeats or _UNLIMITED, {"flow": options.flows or _UNLIMITED})
        structlog.configure(
            processors=self._processors,
            wrapper_class=BoundLogger,
            logger_factory=self._make_logger,
            cache_logger_on_first_use=True,
        )
        self.levels.changed = self._adopt_standard_logging
        self._adopt_standard_logging()

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Let counts of held-back lines be written on time, by this loop."""
        with self._lock:
            self._loop = loop
            if self.admission.repeats.next_end is not None:
                self._arm()

    def detach(self) -> None:
        """The loop is about to end: write what counts there are."""
        with self._lock:
            self._loop = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._write_counts(float("inf"))

    def close(self) -> None:
        """Let go of the output. Lines that come later are dropped."""
        with self._lock:
            output, self._output = self._output, None
            self.admission.is_open = False
        if output is not None:
            output.close()

    def reopen(self) -> bool:
        """Open the log file anew, after somebody renamed it. False where there is no file."""
        with self._lock:
            output = self._output
            if not isinstance(output, FileOutput):
                return False
            if output.reopen():
                self.bound("ztun.app").info("log file opened again")
            else:  # the old one stays in use: it is where this can be said
                self.bound("ztun.app").error("log file not opened again", reason=output.fault)
            return True

    def statistics(self) -> dict[str, Any]:
        """For `status --json`. fault: why the last line could not be written, None when it was."""
        return {
            "written": self.written,
            "suppressed": self.admission.repeats.suppressed,
            "dropped": self.dropped,
            "fault": self._fault,
        }

    # The way of a line.

    def write(self, level: int, line: str) -> None:
        """Hand a line to the output. level: a number of `logging`."""
        with self._lock:
            if self._output is None or not self._output.write(level, line):
                self.lose(self._output.fault if self._output is not None else None)
                return
            self._fault = None
            self.written += 1
            if self._lost:
                lost, self._lost = self._lost, 0
                self.bound("ztun.app").admitted(logging.WARNING, "log lines were lost", {"count": lost})

    def lose(self, fault: str | None) -> None:
        """Count a line that is not to be had."""
        with self._lock:
            self.dropped += 1
            self._lost += 1
            self._fault = fault

    # Counts of what was held back.

    def _began_to_hold_back(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._arm)

    def _arm(self) -> None:
        with self._lock:
            end, loop = self.admission.repeats.next_end, self._loop
            if end is not None and loop is not None and self._timer is None:
                self._timer = loop.call_later(max(end - time.monotonic(), 0.0), self._window_ended)

    def _window_ended(self) -> None:
        with self._lock:
            self._timer = None
            self._write_counts(time.monotonic())
            self._arm()

    def _write_counts(self, now: float) -> None:
        for (component, event, level), count in self.admission.repeats.ended(now):
            values = {"of": event, "count": count, "seconds": WINDOW}
            self.bound(PREFIX + component).admitted(level, "lines suppressed", values)

    # Those who log.

    def _make_logger(self, *names: str) -> Logger:
        return Logger(self, names[0] if names else "ztun.app")

    def bound(self, name: str) -> BoundLogger:
        """What `structlog.get_logger(name)` comes to, for who wants it without the detour."""
        return BoundLogger(self._make_logger(name), processors=self._processors, context={})

    def _adopt_standard_logging(self) -> None:
        threshold = self.levels.threshold("libraries").value
        root = logging.getLogger()
        if not any(isinstance(handler, _Forward) for handler in root.handlers):
            root.handlers[:] = [_Forward(self.bound)]
        root.setLevel(logging.DEBUG if threshold <= logging.DEBUG else max(threshold, _QUIET))
        logging.getLogger("asyncio").setLevel(_QUIET)


class Logger:
    """What structlog wraps: one name of `get_logger`, the threshold of its component, and the way out."""

    __slots__ = ("_component", "_system", "admission", "name", "threshold")

    def __init__(self, system: LogSystem, name: str) -> None:
        self.name = name
        self._component = component_name(name)
        self.threshold = system.levels.threshold(self._component)
        self.admission = system.admission
        self._system = system

    def admit(self, event: str, level: int) -> bool:
        """Whether a line of this kind may be written now. Looks at the level first, and at nothing else below it."""
        return level >= self.threshold.value and self.admission.admit(self._component, event, level)

    def give_up(self, error: Exception) -> None:
        """A line could not be made."""
        self._system.lose(repr(error))

    def debug(self, line: str) -> None:
        self._system.write(logging.DEBUG, line)

    def info(self, line: str) -> None:
        self._system.write(logging.INFO, line)

    def warning(self, line: str) -> None:
        self._system.write(logging.WARNING, line)

    def error(self, line: str) -> None:
        self._system.write(logging.ERROR, line)

    def critical(self, line: str) -> None:
        self._system.write(logging.CRITICAL, line)


class BoundLogger(structlog.BoundLoggerBase):
    """debug, info, warning, error, critical: an event, which is a fixed text, and values by name.

    The filtering loggers of structlog are made for one level and keep it; here it is looked up each time.
    """

    _logger: Logger

    def debug(self, event: str, /, *args: Any, **values: Any) -> None:
        if self._logger.threshold.value <= logging.DEBUG:
            self.log(logging.DEBUG, event, *args, **values)

    def info(self, event: str, /, *args: Any, **values: Any) -> None:
        self.log(logging.INFO, event, *args, **values)

    def warning(self, event: str, /, *args: Any, **values: Any) -> None:
        self.log(logging.WARNING, event, *args, **values)

    def error(self, event: str, /, *args: Any, **values: Any) -> None:
        self.log(logging.ERROR, event, *args, **values)

    def critical(self, event: str, /, *args: Any, **values: Any) -> None:
        self.log(logging.CRITICAL, event, *args, **values)

    def exception(self, event: str, /, *args: Any, **values: Any) -> None:
        """An error, with the exception that is being handled."""
        values.setdefault("exc_info", True)
        self.log(logging.ERROR, event, *args, **values)

    def log(self, level: int, event: str, /, *args: Any, **values: Any) -> None:
        if self._logger.admit(event, level):
            self.admitted(level, event % args if args else event, values)

    @property
    def threshold(self) -> Threshold:
        """That of the component: who is called often looks at its value first."""
        return self._logger.threshold

    def is_enabled_for(self, level: int) -> bool:
        """Whether a line of this level would be written, the limit on repeats aside."""
        return level >= self._logger.threshold.value

    def admit(self, level: int, event: str) -> bool:
        """Whether such a line may be written now; one that may then goes to `admitted`."""
        return self._logger.admit(event, level)

    @property
    def admission(self) -> Admission:
        """What `admit` asks when the level allows a line, for who asks all the time."""
        return self._logger.admission

    def admitted(self, level: int, event: str, values: dict[str, Any]) -> None:
        """Write a line that may be written."""
        method = _METHODS[min(level // 10 * 10, logging.CRITICAL)]
        try:
            line, _ = self._process_event(method, event, values)
        except Exception as error:
            self._logger.give_up(error)  # a line must not end what it tells of
        else:
            getattr(self._logger, method)(*line)


class _Forward(logging.Handler):
    """Hands records of the standard logging module (asyncio, aiohttp, pyroute2) on. Their kind is the text unfilled."""

    def __init__(self, bound: Callable[[str], BoundLogger]) -> None:
        super().__init__()
        self._bound = bound

    def emit(self, record: logging.LogRecord) -> None:
        logger = self._bound(record.name)
        if logger.admit(record.levelno, str(record.msg)):
            logger.admitted(record.levelno, record.getMessage(), {"exc_info": record.exc_info or None})


def _make_output(options: LogOptions) -> Output | None:
    if options.file is not None:
        limit, keep = options.rotate or (None, 1)
        return FileOutput(options.file, limit=limit, keep=keep)
    if sys.stderr is None:
        return None
    return StreamOutput(_stderr(), with_priority=_is_journal(options))


def _make_processors(options: LogOptions) -> list[Processor]:
    cleaner = Cleaner(options.credentials)
    with_time = not _is_journal(options)  # it keeps the time itself
    return processors(cleaner, options.format, colours=_is_colourful(options), with_time=with_time)


def _is_journal(options: LogOptions) -> bool:
    return options.file is None and is_journal(_stderr(), os.environ.get("JOURNAL_STREAM"))


def _is_colourful(options: LogOptions) -> bool:
    """On a terminal, unless it says that it has none or somebody does not want any (no-color.org)."""
    if options.file is not None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return os.isatty(_stderr())


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2


log_system = LogSystem()
