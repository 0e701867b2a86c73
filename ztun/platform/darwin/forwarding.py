"""sysctls that let macOS forward: for the packets of a LAN to reach the utun, and the answers to come back.

They outlive a process that is killed, so what they were before is kept in a file until it is put back. The file goes
with a reboot, as the settings do.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import structlog

from ztun.errors import ZtunError
from ztun.platform.darwin.calls import Calls, require
from ztun.platform.darwin.instances import is_alive

log = structlog.get_logger("ztun.classifier")

NAMES = ("net.inet.ip.forwarding", "net.inet6.ip6.forwarding")
DIRECTORY = Path("/var/run")


class Forwarding:
    """The settings of one instance, whose utun is `device`."""

    def __init__(self, device: str, calls: Calls, directory: Path | None = None) -> None:
        self._path = (directory or DIRECTORY) / f"ztun-{device}.sysctls"
        self._calls = calls

    def allow(self) -> None:
        """Switch forwarding on where it is off. Raises ZtunError; nothing is changed then."""
        before = {name: require(self._calls, "sysctl", "-n", name).strip() for name in NAMES}
        changed = {name: value for name, value in before.items() if value == "0"}
        remembered = changed | dict.fromkeys(self._changed_by_others(), "0")
        if not remembered:
            return
        try:
            self._path.write_text(json.dumps({"pid": os.getpid(), "before": remembered}))
        except OSError as error:
            raise ZtunError(f"cannot write {self._path}: {(error.strerror or str(error)).lower()}") from error
        try:
            for name in changed:
                require(self._calls, "sysctl", "-w", f"{name}=1")
        except ZtunError:
            self.restore()
            raise

    def restore(self) -> list[str]:
        """Put back what `allow` changed, in this process or in one that was killed. Returns a line for each."""
        try:
            before: dict[str, str] = json.loads(self._path.read_text())["before"]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, LookupError, TypeError) as error:
            log.warning("cannot read what sysctls were before", path=str(self._path), error=str(error))
            before = {}
        lines = []
        still_needed = self._changed_by_others()
        for name, value in before.items():
            if name in NAMES and value == "0" and name not in still_needed:
                try:
                    require(self._calls, "sysctl", "-w", f"{name}=0")
                    lines.append(f"sysctl {name}=1")
                except ZtunError as error:
                    log.warning("sysctl not put back", name=name, error=str(error))
        with suppress(OSError):
            self._path.unlink()
        return lines

    def _changed_by_others(self) -> set[str]:
        """What other living instances switched on: the last of them puts it back."""
        others = [path for path in _files(self._path.parent) if path != self._path and is_alive(_pid_in(path))]
        return {name for path in others for name in _before_in(path)}


def sweep(calls: Calls, directory: Path | None = None) -> list[str]:
    """Put back what instances changed that were killed; returns a line for each."""
    lines = []
    for path in left_over(directory):
        device = path.name.removeprefix("ztun-").removesuffix(".sysctls")
        lines += Forwarding(device, calls, directory).restore()
    return lines


def left_over(directory: Path | None = None) -> list[Path]:
    """The files of processes that are no more."""
    return [path for path in _files(directory or DIRECTORY) if not is_alive(_pid_in(path))]


def _files(directory: Path) -> list[Path]:
    return sorted(directory.glob("ztun-*.sysctls"))


def _before_in(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["before"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def _pid_in(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["pid"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
