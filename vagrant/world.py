"""`world.py COMMAND…`: run it in network, mount and process namespaces of its own. Needs root.

Virtual machines can have bridges, DHCP and a libvirtd there without the host's network, files and services being
touched. COMMAND finds the directory ZTUN_VM_RUN, which is its own. What was started, mounted or written there is gone
when COMMAND has ended, or when this process has, however it ended. SIGINT, SIGTERM and SIGHUP are handed to COMMAND.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

STORE = Path(os.environ.get("ZTUN_VM_DIR", "/var/tmp/ztun-vm"))
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_UNSHARE = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child=KILL", "--"]


def main(command: Sequence[str]) -> int:
    if os.geteuid() != 0:
        print("world.py: namespaces need root; run it with sudo", file=sys.stderr)
        return 1
    sweep()
    run = STORE / f"run-{os.getpid()}"
    run.mkdir(parents=True)
    try:
        inside = [sys.executable, __file__, "--inside", *command]
        environment = {**os.environ, "ZTUN_VM_RUN": str(run)}
        started: list[subprocess.Popen[bytes]] = []
        _hand_on(lambda: _only_child(started[0].pid) if started else None)
        # A group of its own: a Ctrl-C is for us alone, so that it reaches COMMAND once.
        started.append(
            subprocess.Popen([*_UNSHARE, *inside], env=environment, process_group=0, preexec_fn=_die_with_parent)
        )
        return started[0].wait()
    finally:
        shutil.rmtree(run, ignore_errors=True)


def inside(command: Sequence[str]) -> int:
    """The first process of the new namespaces: when it ends, the kernel ends all others."""
    subprocess.run(["mount", "-t", "sysfs", "sysfs", "/sys"], check=True)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    started: list[int] = []
    # Before COMMAND starts, or it would inherit what we were told to ignore.
    _hand_on(lambda: started[0] if started else None)
    started.append(subprocess.Popen(command).pid)
    while True:
        pid, status = os.wait()  # also for those whose parents have ended
        if pid == started[0]:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def sweep() -> None:
    """Remove the directories of runs that were killed before they could."""
    for left in STORE.glob("run-*"):
        if not Path("/proc", left.name.removeprefix("run-")).exists():
            shutil.rmtree(left, ignore_errors=True)


def _hand_on(find: Callable[[], int | None]) -> None:
    def hand_on(number: int, _frame: FrameType | None) -> None:
        if (pid := find()) is not None:
            os.kill(pid, number)

    for number in _HANDED_ON:
        signal.signal(number, hand_on)


def _only_child(pid: int) -> int | None:
    """unshare(1) blocks these signals and waits for the process that it forked."""
    children = subprocess.run(["pgrep", "--parent", str(pid)], capture_output=True, text=True, check=False).stdout
    return int(children.split()[0]) if children else None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(sys.argv[2:]))
    sys.exit(main(sys.argv[1:]))
