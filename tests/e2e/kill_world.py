"""A router between a client and an upstream host, on which ztun is killed again and again."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ztun.lab.namespace import Namespace, wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.platform.linux.bpfcall import attributes, bpf

CLIENT4, UPSTREAM4, TUNNELLED4 = "10.9.0.2", "10.8.0.2", "203.0.113.10"
CLIENT6, UPSTREAM6 = "fd00:9::2", "fd00:8::2"
GATEWAY4 = "10.8.0.1"
PORT = 80
LIMIT = 10.0  # seconds, for machines that do other things too; what it took is returned
_GET_FD_BY_ID = {"prog": 13, "map": 14, "link": 30}  # bpf(2): BPF_PROG_GET_FD_BY_ID and so on
_PATIENCE = 120.0  # seconds for a run that was told to end
_LAUNCHER = Path(__file__).with_name("kill_launcher.py")


class Run(NamedTuple):
    """How a run ended. status: as os.waitstatus_to_exitcode; count: calls that were counted; ids: of bpf(2)."""

    status: int
    count: int
    ids: list[tuple[str, int]]


class KillWorld:
    """Three namespaces and a launcher in the gateway's. A context manager."""

    def __init__(self, name: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{name}-"))
        self.client, self.gateway, self.upstream = (Namespace(name + letter) for letter in "cgu")
        self._launcher: subprocess.Popen[str] | None = None
        self._stack = contextlib.ExitStack()
        self._servers: dict[int, socket.socket] = {}

    def __enter__(self) -> KillWorld:
        try:
            self._build()
            self._serve()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._launcher is not None:
            self._launcher.kill()
            self._launcher.communicate()
        self._stack.close()
        for namespace in (self.client, self.gateway, self.upstream):
            namespace.delete()
        for path in self.directory.iterdir():
            path.unlink()
        self.directory.rmdir()

    def _build(self) -> None:
        router = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
        for namespace, sysctls in ((self.client, {}), (self.gateway, router), (self.upstream, {})):
            namespace.create(
                resolver="127.0.0.1",
                sysctls={"ipv6/conf/default/accept_dad": "0", "ipv6/conf/default/accept_ra": "0", **sysctls},
            )
        client, upstream = self.client.name, self.upstream.name
        self.gateway.ip(
            f"link add lan0 type veth peer name eth0 netns {client}",
            f"link add lan1 type veth peer name eth1 netns {client}",
            f"link add wan0 type veth peer name eth0 netns {upstream}",
            "address add 10.9.0.1/24 dev lan0",
            "address add 10.7.0.1/24 dev lan1",
            "address add fd00:9::1/64 dev lan0 nodad",
            "address add 10.8.0.1/24 dev wan0",
            "address add fd00:8::1/64 dev wan0 nodad",
            *(f"link set {name} up" for name in ("lan0", "lan1", "wan0")),
            f"route add default via {UPSTREAM4}",
            f"route add default via {UPSTREAM6}",
        )
        for namespace, net in ((self.client, 9), (self.upstream, 8)):
            namespace.ip(
                f"address add 10.{net}.0.2/24 dev eth0",
                f"address add fd00:{net}::2/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add default via 10.{net}.0.1",
                f"route add default via fd00:{net}::1",
            )
        self.client.ip("link set eth1 up")
        self.upstream.ip(f"address add {TUNNELLED4}/32 dev lo")
        with self.gateway.entered():
            Path("/proc/sys/net/ipv4/conf/lan1/forwarding").write_text("0")  # so that there is something to put back
        # lan1 has a qdisc and a filter of somebody else's.
        self.gateway.run("tc", "qdisc", "add", "dev", "lan1", "clsact")
        self.gateway.run("tc", "filter", "add", "dev", "lan1", "ingress", "prio", "5", "u32", "match", "u32", "0", "0")
        names = ("lan0", "lan1", "wan0")
        settled = lambda: self.gateway.run("ip", "-br", "link").stdout.count(" UP ") == len(names)  # noqa: E731
        assert wait_until(settled)

    def _serve(self) -> None:
        for family in (socket.AF_INET, socket.AF_INET6):
            server = self._stack.enter_context(self.upstream.socket(family))
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            server.bind(("", PORT))
            server.listen(64)
            server.setblocking(False)
            self._servers[family] = server
        limits = ("prlimit", "--nofile=16384")
        proxy = self.upstream.spawn(*limits, "microsocks", "-p", "1080", stderr=subprocess.DEVNULL)
        self._stack.callback(proxy.wait)
        self._stack.callback(proxy.kill)
        with (self.directory / "launcher").open("ab") as errors:
            self._launcher = self.gateway.spawn(
                sys.executable,
                str(_LAUNCHER),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    # -- ztun

    def configure(self, name: str, config: dict[str, Any]) -> Path:
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(config))
        return path

    @contextlib.contextmanager
    def launched(
        self, *argv: str, phase: str = "start", at: int = 0, number: int = signal.SIGKILL, compiled: bool = True
    ) -> Iterator[tuple[int, list[Run]]]:
        """A run of `ztun ARGV`: its pid, and how it ended, which is there after the context. See kill_launcher."""
        assert self._launcher is not None
        assert self._launcher.stdin is not None
        output = str(self.directory / "output")
        request = {"argv": argv, "phase": phase, "at": at, "signal": number, "output": output, "compiled": compiled}
        self._launcher.stdin.write(json.dumps(request) + "\n")
        self._launcher.stdin.flush()
        ended: list[Run] = []
        pid = int(self._answer()["pid"])
        try:
            yield pid, ended
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise
        finally:
            answer = self._answer()
            ended.append(Run(answer["status"], answer["count"], [(kind, number) for kind, number in answer["ids"]]))

    def run(self, *argv: str, at: int = 0) -> Run:
        """The same, to its end."""
        with self.launched(*argv, at=at) as (_, ended):
            pass
        return ended[0]

    def _answer(self) -> dict[str, Any]:
        assert self._launcher is not None
        assert self._launcher.stdout is not None
        ready, _, _ = select.select([self._launcher.stdout], [], [], _PATIENCE)
        assert ready, f"the run does not end:\n{self.output()}"
        line = self._launcher.stdout.readline()
        assert line, (self.directory / "launcher").read_text()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def output(self) -> str:
        """What the runs printed since `forget_output`."""
        path = self.directory / "output"
        return path.read_text() if path.exists() else ""

    def forget_output(self) -> None:
        (self.directory / "output").unlink(missing_ok=True)

    def await_up(self, pid: int) -> None:
        assert wait_until(lambda: "is up, pid" in self.output() or is_dead(pid), 60), self.output()
        assert "is up, pid" in self.output(), self.output()

    # -- what is looked at

    def state(self) -> dict[str, str]:
        """The whole network state of the gateway, and ztun's files."""
        taken = snapshot(self.gateway)
        files = [*self.directory.glob("control*"), *Path("/run/ztun").glob(f"*-{self._number()}.state*")]
        taken["files"] = "\n".join(str(path) for path in sorted(files))
        return taken

    def changes(self, before: dict[str, str]) -> list[str]:
        return differences(before, self.state())

    def _number(self) -> int:
        from ztun.platform.linux.journal import network_namespace

        with self.gateway.entered():
            return network_namespace()

    def reached(self, source: Namespace, address: str) -> str | None:
        """Whom the upstream host saw when `source` connected to it; None when it could not."""
        server = self._servers[socket.AF_INET6 if ":" in address else socket.AF_INET]
        with contextlib.suppress(BlockingIOError):
            while True:  # those of earlier attempts
                server.accept()[0].close()
        try:
            with source.connect(address, PORT, timeout=0.25), server.accept()[0] as peer:
                return str(peer.getpeername()[0])
        except OSError:
            return None

    def accept_all(self) -> list[socket.socket]:
        """What has connected to the upstream host by IPv4 and was not accepted yet."""
        accepted = []
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted.append(self._servers[socket.AF_INET].accept()[0])
        return accepted

    def time_until(self, source: Namespace, address: str, seen: str | None) -> float:
        """Seconds until the upstream host sees `seen` when `source` connects. Raises AssertionError after LIMIT."""
        started = time.monotonic()
        while (found := self.reached(source, address)) != seen:
            if time.monotonic() - started > LIMIT:
                raise AssertionError(f"{source.name} reaches {address} as {found}, not {seen}:\n{self.output()}")
            time.sleep(0.02)
        return time.monotonic() - started


def is_dead(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def bpf_exists(kind: str, number: int) -> bool:
    """Whether the kernel has a BPF program, map or link of this id."""
    try:
        os.close(bpf(_GET_FD_BY_ID[kind], attributes("=II", number, 0)))
    except FileNotFoundError:
        return False
    return True


def configuration(
    directory: Path, backend: str, *, fail: str = "open", tun: str = "ztun0", host: bool = False
) -> dict[str, Any]:
    """Two LAN interfaces; a prefix that is tunnelled, one that is blocked, the rest direct."""
    return {
        "tun": {"name": tun},
        "capture": {"lan": ["lan0", "lan1"], "backend": backend, "fail": fail, "host": host},
        "dns": {"listen": ["10.9.0.1:53"], "servers": ["udp://10.8.0.2:53"], "fake_ip": {"store": None}},
        "outbounds": [{"tag": "proxy", "type": "socks5", "server": "10.8.0.2:1080"}],
        "route": {
            "rules": [
                {"ip_cidr": ["203.0.113.0/24"], "outbound": "proxy"},
                {"ip_cidr": ["198.51.100.0/24", "2001:db8:1::/48"], "outbound": "block"},
                {"ip_cidr": ["2001:db8:2::/48"], "port": [80], "outbound": "proxy"},
            ],
            "default": "direct",
        },
        "pool": {"warmup": 0},
        "timeouts": {"drain": 0},
        "control": {"socket": str(directory / "control.sock")},
    }
