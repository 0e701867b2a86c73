"""`ztun down`: stop the running instance, or remove what a killed one left behind."""

from __future__ import annotations

from pathlib import Path

from ztun.cli.streams import to_json
from ztun.control import DEFAULT_SOCKET
from ztun.control.client import ControlClient, NotRunning, find_socket
from ztun.control.lock import InstanceLock, lock_path
from ztun.errors import ZtunError

# Seconds: longer than an instance takes to drain its flows and undo what it did.
STOP_WAIT = 30.0


def run_down(config: Path | None, socket: Path | None, *, json: bool) -> int:
    """Returns the exit code. Raises NotRunning when there is no instance and nothing to remove, or ZtunError."""
    path = Path(find_socket(config, socket, DEFAULT_SOCKET))
    try:
        pid = ControlClient(path).stop(wait=STOP_WAIT)
    except NotRunning:
        removed = [*_sweep(), *_remove_lock(path)]
        if not removed:
            raise
        _say_removed(removed, json=json)
    else:
        print(to_json({"state": "stopped", "pid": pid}) if json else f"stopped (pid {pid})")
    return 0


def _sweep() -> list[str]:
    from ztun import machine, platform

    try:
        machine.require_privilege()
    except ZtunError:
        return []
    try:
        return platform.sweep()
    except OSError as error:
        raise ZtunError(f"cannot remove what was left behind: {error.strerror or error}") from error


def _remove_lock(path: Path) -> list[str]:
    """The lock of a control socket: it is there a moment before anything is written down, and a moment after."""
    if not lock_path(path).exists():
        return []
    lock = InstanceLock(path)
    try:
        lock.acquire()
    except ZtunError:  # one that is just starting has it
        return []
    lock.release()
    return [f"file {lock_path(path)}"]


def _say_removed(removed: list[str], *, json: bool) -> None:
    if json:
        print(to_json({"state": "not running", "removed": removed}))
        return
    print("not running; removed what a killed instance left behind:")
    for line in removed:
        print(f"  {line}")
