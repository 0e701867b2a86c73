"""One `ztun up` in the gateway's namespace: started, awaited, asked and stopped."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ztun.lab import plan
from ztun.lab.namespace import Namespace, wait_until

_MAIN = "import sys; from ztun.cli import main; sys.exit(main())"
START_DEADLINE = 15.0  # seconds; bcc compiles on the way

_CREDENTIALS = {"username": plan.PROXY_USER, "password": plan.PROXY_PASSWORD}
_PROXY = f"{plan.UPSTREAM4}:"
PROXIES: list[dict[str, str]] = [
    {"tag": "socks", "type": "socks5", "server": f"{_PROXY}{plan.SOCKS_PORT}"},
    {"tag": "socks-auth", "type": "socks5", "server": f"{_PROXY}{plan.SOCKS_AUTH_PORT}", **_CREDENTIALS},
    {"tag": "socks-udp", "type": "socks5", "server": f"{_PROXY}{plan.SOCKS_UDP_PORT}"},
    {"tag": "http", "type": "http", "server": f"{_PROXY}{plan.HTTP_PROXY_PORT}"},
    {"tag": "http-auth", "type": "http", "server": f"{_PROXY}{plan.HTTP_PROXY_AUTH_PORT}", **_CREDENTIALS},
]
"""The outbounds of every run in the lab; "socks-udp" can do UDP ASSOCIATE and is the fast one."""


def complete(
    config: dict[str, Any], directory: Path, backend: str = "auto", offload: bool | None = None
) -> dict[str, Any]:
    """`config` laid over what every run in the lab needs: interfaces, resolver, proxies, and files that are its own."""
    base: dict[str, Any] = {
        "capture": {"lan": ["lan0"], "backend": backend} | ({} if offload is None else {"offload": offload}),
        "dns": {
            "listen": [f"{plan.GATEWAY_LAN4}:53", f"[{plan.GATEWAY_LAN6}]:53"],
            "servers": [f"udp://{plan.UPSTREAM4}:53"],
            "fake_ip": {"store": str(directory / "fake-ip.db")},
        },
        "outbounds": PROXIES,
        "route": {"default": "direct"},
        "timeouts": {"drain": 0.2},
        "control": {"socket": str(directory / "control.sock")},
    }
    return _laid_over(base, config)


class Ztun:
    """A running (or not yet, or no longer running) instance. `output` holds all it printed."""

    def __init__(self, gateway: Namespace, directory: Path) -> None:
        self._gateway = gateway
        self.directory = directory
        self.config: dict[str, Any] = {}
        self.config_path = directory / "config.json"
        self.socket_path = directory / "control.sock"
        self._output = directory / "output"
        self.wrapper: tuple[str, ...] = ()  # a program that runs the one in its arguments, and what comes before those
        self._process: subprocess.Popen[Any] | None = None
        directory.mkdir(mode=0o755)

    def start(
        self, config: dict[str, Any], *, env: dict[str, str] | None = None, arguments: tuple[str, ...] = ()
    ) -> None:
        """Start `ztun up --config FILE` and wait until its control socket answers "running".

        Raises RuntimeError with what it printed when it ends or is silent for START_DEADLINE seconds.
        """
        self.write(config)
        self.launch("up", "--config", str(self.config_path), *arguments, env=env)
        self.wait_ready()

    def write(self, config: dict[str, Any]) -> None:
        self.config = config
        self.socket_path = Path(config["control"]["socket"])
        self.config_path.touch(mode=0o600)  # passwords are in it
        self.config_path.write_text(json.dumps(config, indent=2))

    def launch(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        """Start `ztun ARGUMENTS` and do not wait."""
        with self._output.open("ab") as output:
            self._process = self._gateway.spawn(
                *self.wrapper,
                *command(*arguments),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=env,
            )

    def wait_ready(self, deadline: float = START_DEADLINE) -> None:
        end = time.monotonic() + deadline
        while not self._answers():
            if self.returncode is not None:
                raise RuntimeError(f"ztun up ended with {self.returncode}:\n{self.output}")
            if time.monotonic() > end:
                raise RuntimeError(f"ztun up is not ready after {deadline:g} s:\n{self.output}")
            time.sleep(0.02)
        wait_until(lambda: self.output, 1)  # it says what it did right after

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return None if self._process is None else self._process.poll()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def stop(self, number: int = signal.SIGTERM, timeout: float = 10) -> int:
        """Signal it and wait; its exit code. Raises RuntimeError when it does not end in time (and kills it)."""
        assert self._process is not None, "not started"
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"ztun did not end within {timeout:g} s of signal {number}:\n{self.output}") from None

    def kill(self) -> None:
        """End it without asking. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def request(self, method: str, path: str) -> Any:
        """One request on the control socket; the decoded JSON answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(5)
            sock.connect(str(self.socket_path))
            connection = http.client.HTTPConnection("ztun")
            connection.sock = sock
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {response.status} {body.decode(errors='replace')}")
            return json.loads(body)

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.request("GET", "/status")
        return answer

    def routes(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.request("GET", "/routes")
        return answer

    def command(self, *arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Another `ztun` command in the gateway, run to its end."""
        return self._gateway.run(*command(*arguments), check=check, **options)

    def bpf_ids(self) -> dict[str, set[int]]:
        """{"prog": ids, "link": ids, "map": ids} that the process holds open (proc(5), fdinfo)."""
        ids: dict[str, set[int]] = {"prog": set(), "link": set(), "map": set()}
        for path in Path("/proc", str(self.pid), "fdinfo").iterdir():
            for kind, number in re.findall(r"^(prog|link|map)_id:\s*(\d+)", path.read_text(), re.MULTILINE):
                ids[kind].add(int(number))
        return ids

    def _answers(self) -> bool:
        try:
            return bool(self.status()["state"] == "running")
        except (OSError, http.client.HTTPException, RuntimeError, ValueError):
            return False


def command(*arguments: str) -> list[str]:
    """The command line of `ztun ARGUMENTS` with the interpreter that runs us."""
    return [sys.executable, "-c", _MAIN, *arguments]


def _laid_over(base: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in config.items():
        below = merged.get(key)
        merged[key] = _laid_over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
