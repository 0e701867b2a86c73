"""The other end of the control socket, for the commands. Standard library only: it starts fast."""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from ztun.control.lock import peer_pid
from ztun.defaults import control_of
from ztun.errors import ConfigError, ZtunError

ANSWER_TIMEOUT = 10.0  # seconds; while it starts, an instance compiles its BPF programs before it answers
_POLL = 0.05


class NotRunning(ZtunError):  # noqa: N818 (it reads as what it says)
    """Nothing listens on the control socket."""


class NotAllowed(ZtunError):  # noqa: N818
    """The control socket is there, and not for us."""


class ControlClient:
    """Asks the instance behind one control socket. Every method raises NotRunning or ZtunError in one line."""

    def __init__(self, path: str | Path, timeout: float = ANSWER_TIMEOUT) -> None:
        self.path = Path(path)
        self.timeout = timeout

    def status(self) -> dict[str, Any]:
        """The body of GET /status, as `ztun status --json` prints it."""
        return self._request("GET", "/status")[0]

    def flows(self) -> dict[str, Any]:
        """The body of GET /flows, as `ztun status --flows --json` prints it."""
        return self._request("GET", "/flows")[0]

    def routes(self, *, most: int | None = None, name: str | None = None) -> dict[str, Any]:
        """The body of GET /routes, as `ztun routes --json` prints it.

        most: entries of each map, None for all; name: of this map alone, all of its entries.
        """
        wanted = {"most": most, "map": name}
        query = urlencode({key: value for key, value in wanted.items() if value is not None})
        return self._request("GET", f"/routes?{query}" if query else "/routes")[0]

    def log_levels(self) -> dict[str, Any]:
        """The body of GET /log-level: {"level": …, "components": component -> level, "own": those with their own}."""
        return self._request("GET", "/log-level")[0]

    def set_log_level(self, level: str, component: str | None) -> dict[str, Any]:
        """Change the level of one component, or the general one. Returns what `log_levels` does."""
        return self._request("POST", "/log-level", {"level": level, "component": component})[0]

    def stop(self, wait: float) -> int:
        """Ask for a graceful end and wait up to `wait` seconds until the process is gone. Returns its pid."""
        deadline = time.monotonic() + wait
        answer, peer = self._request("POST", "/stop")
        pid = int(answer.get("pid", 0))
        # The two differ when the instance lives in another pid namespace: then its pid means nothing here.
        gone = _wait_for_process(pid, deadline) if peer == pid else self._wait_for_socket(deadline)
        if not gone:
            raise ZtunError(
                f"pid {pid} is still stopping after {wait:.0f} s; look at `ztun status`, or end it with `kill -9 {pid}`"
            )
        return pid

    def _wait_for_socket(self, deadline: float) -> bool:
        while time.monotonic() < deadline:
            try:
                self._connect().close()
            except ZtunError:
                return True
            time.sleep(_POLL)
        return False

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout)
        try:
            connection.connect(os.fspath(self.path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            connection.close()
            raise NotRunning(
                f"not running (no control socket at {self.path}); start it with `ztun up`{_others()}"
            ) from None
        except PermissionError:
            connection.close()
            raise NotAllowed(f"may not use the control socket {self.path}; run this as root, e.g. with sudo") from None
        except OSError as error:
            connection.close()
            raise ZtunError(f"cannot use the control socket {self.path}: {error.strerror or error}") from None
        return connection

    def _request(self, method: str, path: str, content: dict[str, Any] | None = None) -> tuple[dict[str, Any], int]:
        """The answer and the pid of who gave it."""
        connection = http.client.HTTPConnection("ztun", timeout=self.timeout)
        connection.sock = self._connect()
        try:
            peer = peer_pid(connection.sock)
            headers = {"Connection": "close", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(content) if content is not None else None, headers)
            response = connection.getresponse()
            body = json.loads(response.read())
        except TimeoutError:
            raise ZtunError(
                f"no answer on {self.path} within {self.timeout:.0f} s; try again, or look at its log"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ZtunError(f"no usable answer on {self.path}: {error!r}; it may be stopping right now") from None
        finally:
            connection.close()
        if isinstance(body, dict) and response.status == 400:
            raise ConfigError(str(body.get("error")))
        if not isinstance(body, dict) or response.status >= 400:
            raise ZtunError(
                f"the running instance failed: {body.get('error', body) if isinstance(body, dict) else body}"
            )
        return body, peer


def _others() -> str:
    """The instances that run here by other sockets, in words."""
    from ztun.control.claims import sockets_in_use  # looks at every process

    found = [f"--socket {path} (pid {pid})" for path, pid in sockets_in_use()]
    return f", or ask one that runs here: {', '.join(found)}" if found else ""


def _wait_for_process(pid: int, deadline: float) -> bool:
    """Wait until `pid` ended, even when nobody has reaped it yet (pidfd_open(2))."""
    if not hasattr(os, "pidfd_open"):
        return _poll_process(pid, deadline)
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return _poll_process(pid, deadline)
    try:
        return bool(select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0])
    finally:
        os.close(fd)


def _poll_process(pid: int, deadline: float) -> bool:
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        time.sleep(_POLL)
    return False


def find_socket(config: Path | None, socket_path: Path | None, default: str) -> Path:
    """Where the instance listens: --socket, else $ZTUN_CONTROL__SOCKET, else control.socket of --config, else what
    follows from tun.name, else default.

    Reads no more of the file than it needs, so that `ztun down` works while the file is being edited.
    Raises ConfigError when the file cannot be read.
    """
    if socket_path is not None:
        return socket_path
    named = os.environ.get("ZTUN_CONTROL__SOCKET") or None
    device = os.environ.get("ZTUN_TUN__NAME") or None
    if named is None and config is not None:
        named, in_file = _read_names(config)
        device = device or in_file
    return Path(named or (control_of(device) if device is not None else default))


def _read_names(config: Path) -> tuple[str | None, str | None]:
    """control.socket and tun.name of a file."""
    try:
        content = json.loads(config.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"cannot read {config}: {error.strerror}; give the file that `ztun up` was started with"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{config} is not JSON: {error}; correct it, or use --socket PATH") from None
    names: list[str | None] = []
    for section, key in (("control", "socket"), ("tun", "name")):
        names.append(None)
        with suppress(AttributeError):
            value = content.get(section, {}).get(key)
            names[-1] = value if isinstance(value, str) else None
    return names[0], names[1]
