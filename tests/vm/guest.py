"""One virtual machine, reached by ssh, and the seam behind which it may be plain qemu's or Vagrant's."""

from __future__ import annotations

import json
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

ROOT = Path(__file__).resolve().parents[2]
MACHINES: dict[str, Any] = json.loads((ROOT / "vagrant" / "machines.json").read_text())
# Seconds. Without hardware virtualisation a guest is some fifteen times slower than this machine.
PATIENCE = 300.0
BOOT = 900.0
_UNREACHABLE = 255  # ssh(1): its own failure, not the command's


class Reach(NamedTuple):
    """How ssh gets there."""

    host: str
    port: int
    user: str
    key: Path


class Machines(Protocol):
    """Three virtual machines that were brought up, provisioned, and will be destroyed by `close`."""

    def up(self, gateway: str) -> Mapping[str, Guest]:
        """Bring up "client", "gateway", "upstream"; the gateway from the image `gateway`, in the place of any other."""

    def running(self) -> Iterable[Guest]:
        """Those that were started, whether they answer or not."""

    def consoles(self) -> Iterable[Path]:
        """Files with what the machines wrote to their serial lines."""

    def close(self) -> None:
        """Destroy them. Idempotent."""


class Guest:
    """A running virtual machine. Commands run there as root."""

    def __init__(self, name: str, reach: Reach, directory: Path) -> None:
        self.name = name
        self._target = f"{reach.user}@{reach.host}"
        options = {
            "IdentityFile": reach.key,
            "Port": reach.port,
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": "20",
            "ServerAliveInterval": "15",
            # One connection for all commands: a key exchange takes seconds there.
            "ControlMaster": "auto",
            "ControlPath": directory / f"{name}.ssh",
            "ControlPersist": "yes",
        }
        self._ssh = ["ssh", "-F", "none", *(f"-o{key}={value}" for key, value in options.items())]

    def run(
        self, command: str, *, check: bool = True, timeout: float = PATIENCE, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        """A shell command, to its end. Raises RuntimeError with its output when it fails and `check` is set."""
        line = f"sudo -n sh -c {shlex.quote(command)}"
        done = subprocess.run([*self._ssh, self._target, line], input=stdin, capture_output=True, timeout=timeout)
        out, error = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode:
            raise RuntimeError(f"{self.name}: `{command}` gave {done.returncode}: {out}{error}")
        return subprocess.CompletedProcess(command, done.returncode, out, error)

    def read(self, command: str, **options: Any) -> str:
        """What a command prints, without blanks around it."""
        return self.run(command, **options).stdout.strip()

    def json(self, command: str, **options: Any) -> Any:
        return json.loads(self.read(command, **options) or "null")

    def python(self, program: str, *arguments: str, timeout: float = PATIENCE) -> str:
        """What a Python program prints, which is sent there."""
        words = " ".join(shlex.quote(each) for each in arguments)
        return self.run(f"python3 - {words}", stdin=program.encode(), timeout=timeout).stdout.strip()

    def answers(self) -> bool:
        """Whether a command can be run now."""
        try:
            return self.run("true", check=False, timeout=30).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def wait(self, timeout: float = BOOT) -> None:
        """Until it answers. Raises RuntimeError."""
        if not wait_for(self.answers, timeout, 0.5):
            raise RuntimeError(f"{self.name} does not answer within {timeout:g} s")

    def reboot(self) -> None:
        """In order, and until it answers again."""
        before = self.boot_id()
        self.run("systemctl reboot", check=False)
        if not wait_for(lambda: self.answers() and self.boot_id() != before, BOOT, 1):
            raise RuntimeError(f"{self.name} is not back within {BOOT:g} s of a reboot")

    def boot_id(self) -> str:
        """proc(5): another one after each boot."""
        return self.read("cat /proc/sys/kernel/random/boot_id", check=False)

    def forget(self) -> None:
        """Close the connection that commands share, if there is one."""
        subprocess.run([*self._ssh, "-O", "exit", self._target], capture_output=True, check=False)


def wait_for(condition: Callable[[], object], timeout: float = PATIENCE, interval: float = 0.3) -> bool:
    """Poll until `condition()` holds; False when it did not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval)
    return True


def at_once(*actions: Callable[[], object]) -> None:
    """Do all, and raise the first error as soon as there is one. Nobody waits for the others then, nor after Ctrl-C."""
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def do(action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            ended.put(error)
        else:
            ended.put(None)

    for action in actions:
        threading.Thread(target=do, args=(action,), daemon=True).start()
    for _ in actions:
        if (error := ended.get()) is not None:
            raise error


def sources() -> bytes:
    """A tar of the working tree as git knows it, uncommitted changes included: what a user's checkout holds."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *_NEEDED]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True).stdout.split(b"\0")
    there = [name for name in names if name and (ROOT / name.decode()).is_file()]
    packing = ["tar", "-c", "--null", "--files-from=-"]
    return subprocess.run(packing, cwd=ROOT, check=True, capture_output=True, input=b"\0".join(there)).stdout


_NEEDED: Sequence[str] = ("ztun", "bpf", "packaging", "vagrant", "pyproject.toml", "README.md", "LICENSE", "examples")
