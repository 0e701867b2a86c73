"""Beginning and ending: what asks the process to stop, and how everything that was done is undone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import Any, TypeVar

import structlog

log = structlog.get_logger("ztun.app")

T = TypeVar("T")

# Seconds that one step of the undoing may take before the next has its turn.
STEP_LIMIT = 5.0
HURRIED_LIMIT = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Set once someone wants the process to end: gracefully at first, at once when a second signal comes.

    reopen: opens the log file anew and says whether there is one; SIGHUP is then for it (logrotate(8)), and stops the
    process only when its terminal is gone.
    """

    def __init__(self, reopen: Callable[[], bool] = lambda: False) -> None:
        self._reopen = reopen
        self._had_terminal = has_terminal()
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def ask(self) -> None:
        """End gracefully. Asking again changes nothing."""
        self.asked.set()

    def _on_signal(self, number: signal.Signals) -> None:
        if number is signal.SIGHUP and self._had_terminal == has_terminal() and self._reopen():
            return
        if self.asked.is_set():
            log.warning("stopping at once", signal=number.name)
            self.hurried.set()
        else:
            log.info("stopping", signal=number.name)
        self.ask()

    @contextmanager
    def signals(self) -> Iterator[None]:
        """While inside, SIGINT, SIGTERM and SIGHUP (the terminal went away) ask to stop; under nohup(1) not SIGHUP."""
        loop = asyncio.get_running_loop()
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        caught = [number for number in _SIGNALS if number not in ignored]
        for number in caught:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)


def has_terminal() -> bool:
    """Whether this process has a controlling terminal: one that hangs up is taken away first (tty_ioctl(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when `event` is set first: then `work` is cancelled and has ended.

    Raises what `work` raises.
    """
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    return None if task.cancelled() else task.result()


class Undo:
    """What to undo, in reverse order; a step that fails is told and does not keep the others from their turn.

    hurried: once set, steps get HURRIED_LIMIT seconds only.
    """

    def __init__(self, stack: AsyncExitStack, hurried: asyncio.Event) -> None:
        self._stack = stack
        self._hurried = hurried
        self.failed: list[str] = []

    def push(self, what: str, action: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
        """Undo by `action`. It must be idempotent and cope with what it undoes being half done: push, then do."""
        self._stack.push_async_callback(self._run, what, action)

    async def _run(self, what: str, action: Callable[[], Coroutine[Any, Any, None] | None]) -> None:
        try:
            pending = action()
            if pending is not None:
                await self._wait(asyncio.ensure_future(pending))
        except Exception as error:
            self.failed.append(what)
            log.exception("could not undo", what=what, error=repr(error))

    async def _wait(self, step: asyncio.Future[None]) -> None:
        waiting = asyncio.ensure_future(self._hurried.wait())
        try:
            both: set[asyncio.Future[Any]] = {step, waiting}
            await asyncio.wait(both, timeout=STEP_LIMIT, return_when=asyncio.FIRST_COMPLETED)
            if self._hurried.is_set():
                await asyncio.wait({step}, timeout=HURRIED_LIMIT)
        finally:
            waiting.cancel()
        if not step.done():
            step.cancel()
            raise TimeoutError("took too long")
        step.result()
