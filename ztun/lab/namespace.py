"""Network namespaces: made, entered and removed; sockets and processes inside them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket as sockets  # `socket` is a method below
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ztun.platform.linux import journal

_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def run(
    argv: Sequence[str], *, check: bool = True, timeout: float = 60, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, output captured as text. Raises RuntimeError with its output when it fails."""
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=timeout, **options)
    if check and done.returncode:
        raise RuntimeError(f"`{' '.join(argv)}` gave {done.returncode}: {done.stdout}{done.stderr}")
    return done


class Namespace:
    """One named network namespace (ip-netns(8)) with its own resolv.conf in /etc/netns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._fd = -1

    def create(self, *, resolver: str, sysctls: Mapping[str, str]) -> None:
        """Make it, with loopback up. `sysctls`: names with slashes below /proc/sys/net, set before any link appears."""
        configuration = Path("/etc/netns", self.name)
        configuration.mkdir(parents=True)
        (configuration / "resolv.conf").write_text(f"nameserver {resolver}\noptions timeout:2 attempts:2\n")
        run(["ip", "netns", "add", self.name])
        self._fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        with self.entered():
            for name, value in sysctls.items():
                Path("/proc/sys/net", name).write_text(value)
        self.ip("link set lo up")

    def delete(self) -> None:
        """Remove it, and what runs in it still (only we put anything there). Idempotent."""
        if is_there := Path("/run/netns", self.name).exists():
            for pid in run(["ip", "netns", "pids", self.name], check=False).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        if self._fd >= 0:
            _forget_states(self)
            os.close(self._fd)
            self._fd = -1
        if is_there:
            run(["ip", "netns", "del", self.name], check=False)
        configuration = Path("/etc/netns", self.name)
        (configuration / "resolv.conf").unlink(missing_ok=True)
        for directory in (configuration, configuration.parent):
            with contextlib.suppress(OSError):  # absent, or not ours alone
                directory.rmdir()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is inside (setns(2)): sockets made here stay inside, /proc/sys/net is this one's."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self._fd)
            try:
                yield
            finally:
                _setns(before)
        finally:
            os.close(before)

    def socket(self, family: int = sockets.AF_INET, type: int = sockets.SOCK_STREAM, proto: int = 0) -> sockets.socket:
        """A socket that lives in this namespace and can be used from anywhere."""
        with self.entered():
            return sockets.socket(family, type, proto)

    def connect(self, host: str, port: int, *, source: str | None = None, timeout: float = 10) -> sockets.socket:
        """A TCP connection from here to an address literal. Raises OSError as connect(2) does."""
        made = self.socket(sockets.AF_INET6 if ":" in host else sockets.AF_INET)
        try:
            made.settimeout(timeout)
            if source is not None:
                made.bind((source, 0))
            made.connect((host, port))
        except BaseException:
            made.close()
            raise
        return made

    def ip(self, *commands: str) -> None:
        """Run ip(8) commands inside, all in one go; the first that fails raises RuntimeError."""
        run(["ip", "-n", self.name, "-batch", "-"], input="\n".join(commands) + "\n")

    def run(
        self, *argv: str, check: bool = True, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside to its end; see `run`."""
        return run(["ip", "netns", "exec", self.name, *argv], check=check, timeout=timeout, **options)

    def spawn(self, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program inside. It has a process group of its own, so that Ctrl-C reaches only its owner."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *argv], process_group=0, **options)


def _forget_states(namespace: Namespace) -> None:
    """Remove the state files of a ztun that was killed here (ztun.platform.linux.journal)."""
    with namespace.entered():
        number = journal.network_namespace()
    for path in journal.DIRECTORY.glob(f"*-{number}{journal.SUFFIX}*"):
        path.unlink(missing_ok=True)


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def wait_until(condition: Callable[[], object], timeout: float = 5, interval: float = 0.02) -> bool:
    """Poll until `condition()` holds; False when it did not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True
