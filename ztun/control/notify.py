"""Tells a service manager about the state of the process: sd_notify(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping

# Seconds between lines for `systemctl status` where no watchdog asks for more.
_TELL_INTERVAL = 10.0


def notify(state: str) -> bool:
    """Send `state` ("READY=1", "STOPPING=1", lines joined by newlines) to $NOTIFY_SOCKET.

    Returns False when there is no service manager to tell, or it does not listen: neither is an error.
    """
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@"):
        return False
    address = "\0" + path[1:] if path[0] == "@" else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def is_managed() -> bool:
    """Whether a service manager waits for what we tell: it sends signals for its own reasons."""
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def reload(action: Callable[[], bool]) -> bool:
    """Call `action` between RELOADING=1 and READY=1. Returns what it returned, or True for a service manager's sake:
    what it asked for was done, and is no reason to stop.
    """
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        return action() or is_managed()
    finally:
        notify("READY=1")


def watchdog_interval(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds within which the service manager wants to hear WATCHDOG=1; None when it does not wait for that."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 1e6 if microseconds > 0 else None


class Pulse:
    """Tells again and again that the event loop turns, from within it: a loop that hangs says nothing.

    say: makes the line for `systemctl status`. Without a service manager nothing is done.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, say: Callable[[], str]) -> None:
        self._loop = loop
        self._say = say
        self._timer: asyncio.TimerHandle | None = None
        limit = watchdog_interval()
        # A third: one that gets lost, or comes late, is not the end.
        self._interval = _TELL_INTERVAL if limit is None else min(limit / 3, _TELL_INTERVAL)
        self._state = "STATUS={}" if limit is None else "WATCHDOG=1\nSTATUS={}"

    def start(self) -> None:
        if is_managed():
            self._beat()

    def stop(self) -> None:
        """Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._beat)
        try:
            line = self._say()
        except Exception:
            line = ""  # the loop turns all the same
        notify(self._state.format(line))
