"""The laboratory: brings the namespaces and servers up, and leaves nothing behind however it ends."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

from ztun.lab import internet, plan
from ztun.lab.namespace import Namespace
from ztun.lab.servers import Server, servers
from ztun.lab.ztun import Ztun, complete

_serial = itertools.count()
_QUERY = re.compile(r"query\[(\w+)\] (\S+) from (\S+)")
_ETH_P_ALL = 3  # linux/if_ether.h
_NO_DAD = {"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0"}  # else addresses wait a second
_HOST = {**_NO_DAD, "ipv6/conf/all/accept_ra": "0", "ipv6/conf/default/accept_ra": "0"}
_ROUTER = {**_HOST, "ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}
_INTERNET = {**_ROUTER, **internet.SYSCTLS}


class DnsQuery(NamedTuple):
    """One question, as dnsmasq logs it. source: the address that asked."""

    type: str
    name: str
    source: str


class Lab:
    """Three namespaces joined by veth pairs, and the servers of `ztun.lab.servers`. A context manager.

    The client asks the gateway for names, as in a LAN with DHCP; without ztun nobody answers there.
    """

    def __init__(self) -> None:
        self._prefix = f"ztun-{os.getpid()}-{next(_serial)}"
        self.client, self.gateway, self.upstream = (
            Namespace(f"{self._prefix}-{role}") for role in ("client", "gateway", "upstream")
        )
        self.directory = Path(tempfile.gettempdir(), self._prefix)
        self._processes: list[tuple[str, subprocess.Popen[Any]]] = []
        self._servers: dict[str, Server] = {}
        self._ztuns: list[Ztun] = []
        self._handlers: dict[int, Any] = {}
        self.backend = "auto"  # capture.backend of runs whose configuration has none
        self.offload: bool | None = None  # the same of capture.offload; None for the default

    def __enter__(self) -> Self:
        _sweep()
        self._catch_signals()
        atexit.register(self.close)
        try:
            self._build()
            self._serve()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End everything that was started here, the last first. Idempotent; a second Ctrl-C does not cut it short."""
        with _undisturbed():
            for instance in reversed(self._ztuns):
                instance.kill()
            for _, process in self._processes:
                process.terminate()
            for _, process in self._processes:
                _reap(process)
            self._ztuns.clear()
            self._processes.clear()
            for namespace in (self.client, self.gateway, self.upstream):
                namespace.delete()
            shutil.rmtree(self.directory, ignore_errors=True)
            atexit.unregister(self.close)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    # -- what tests use

    def ztun(self, config: dict[str, Any] | None = None, **options: Any) -> Ztun:
        """Start `ztun up` in the gateway on `config`, completed with what every run in the lab needs, and wait for it.

        A section given in `config` replaces the default keys of that section one by one. See `Ztun.start`.
        """
        instance = Ztun(self.gateway, self.directory / f"ztun-{len(self._ztuns)}")
        self._ztuns.append(instance)
        instance.start(complete(config or {}, instance.directory, self.backend, self.offload), **options)
        return instance

    def running(self) -> list[Ztun]:
        """The instances that were started here and run still."""
        return [instance for instance in self._ztuns if instance.alive]

    def stop(self) -> None:
        """Stop them. Raises RuntimeError with its output when one does not end well."""
        for instance in self.running():
            if code := instance.stop():
                raise RuntimeError(f"ztun up ended with {code}:\n{instance.output}")

    def prepare(self) -> Ztun:
        """An instance that is not started yet, for tests of the command line."""
        instance = Ztun(self.gateway, self.directory / f"ztun-{len(self._ztuns)}")
        self._ztuns.append(instance)
        return instance

    def spawn(self, namespace: Namespace, name: str, *argv: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a program that ends with the lab; its output goes to NAME.out unless told otherwise."""
        if "stdout" not in options:
            with (self.directory / f"{name}.out").open("ab") as output:
                process = namespace.spawn(*argv, stdout=output, stderr=subprocess.STDOUT, **options)
        else:
            process = namespace.spawn(*argv, **options)
        self._processes.append((name, process))
        return process

    def end_server(self, name: str) -> None:
        """Kill a server of `ztun.lab.servers`, or another that was spawned, with its children."""
        process = next(process for each, process in reversed(self._processes) if each == name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def begin_server(self, name: str) -> None:
        """Start a server of `ztun.lab.servers` anew, and wait until it listens."""
        server = self._servers[name]
        process = self.spawn(self.upstream, name, *server.argv)
        for port in server.ports:
            self._await_port(server, process, port, time.monotonic() + 10)

    def curl(self, *arguments: str, check: bool = True, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """curl in the client's namespace, quiet, with the lab's certificate trusted."""
        argv = ["curl", "-sS", "--max-time", str(timeout), "--cacert", str(self.directory / "lab.crt"), *arguments]
        return self.client.run(*argv, check=check, timeout=timeout + 5)

    def page(self, url: str, *arguments: str) -> dict[str, str]:
        """The page every site of the lab shows: {"client": who the server saw, "host": …, "server": …}."""
        page: dict[str, str] = json.loads(self.curl(*arguments, url).stdout)
        return page

    def dig(self, *arguments: str, check: bool = True) -> str:
        """dig +short in the client's namespace; asks the gateway unless @server is given."""
        return self.client.run("dig", "+short", "+tries=2", "+time=2", *arguments, check=check).stdout.strip()

    def file(self, megabytes: int) -> Path:
        """A file of random bytes that nginx serves as /files/NAME."""
        path = self.directory / "files" / f"{megabytes}M"
        if not path.exists():
            with path.open("wb") as out:
                for _ in range(megabytes):
                    out.write(os.urandom(1 << 20))
        return path

    def journal(self) -> list[dict[str, Any]]:
        """What the servers of `ztun.lab.peers` saw of their connections' ends."""
        path = self.directory / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def dns_queries(self) -> list[DnsQuery]:
        """What was asked of the resolver in upstream, in order."""
        lines = (self.directory / "dnsmasq.log").read_text().splitlines()
        return [DnsQuery(*found.groups()) for line in lines if (found := _QUERY.search(line))]

    @contextlib.contextmanager
    def watching(self, namespace: Namespace, ifname: str) -> Iterator[list[bytes]]:
        """All packets that pass an interface while the context lasts, from the network header on (packet(7))."""
        packets: list[bytes] = []
        # Without a protocol until it is bound, or it would hear every interface in between.
        with namespace.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as sock:
            with namespace.entered():
                sock.bind((ifname, _ETH_P_ALL))
            sock.setblocking(False)
            yield packets
            time.sleep(0.05)  # for what is on its way
            with contextlib.suppress(BlockingIOError):
                while True:
                    packets.append(sock.recv(65535))

    # -- building

    def _build(self) -> None:
        self.directory.mkdir(mode=0o755)
        self.client.create(resolver=plan.GATEWAY_LAN4, sysctls=_HOST)
        self.gateway.create(resolver=plan.UPSTREAM4, sysctls=_ROUTER)
        self.upstream.create(resolver=plan.UPSTREAM4, sysctls=_INTERNET)
        self.gateway.ip(
            f"link add lan0 type veth peer name eth0 netns {self.client.name}",
            f"link add wan0 type veth peer name eth0 netns {self.upstream.name}",
            *_addresses("lan0", plan.GATEWAY_LAN4, plan.GATEWAY_LAN6),
            *_addresses("wan0", plan.GATEWAY_WAN4, plan.GATEWAY_WAN6),
            "link set lan0 up",
            "link set wan0 up",
        )
        self.client.ip(
            *_addresses("eth0", plan.CLIENT4, plan.CLIENT6),
            *_addresses("eth0", plan.CLIENT4_OTHER, plan.CLIENT6_OTHER),
            "link set eth0 up",
            f"route add default via {plan.GATEWAY_LAN4} src {plan.CLIENT4}",
            f"route add default via {plan.GATEWAY_LAN6} src {plan.CLIENT6}",
        )
        self.upstream.ip(
            *_addresses("eth0", plan.UPSTREAM4, plan.UPSTREAM6),
            "link set eth0 up",
            f"route add 10.10.0.0/16 via {plan.GATEWAY_WAN4}",
            f"route add fd10:10::/32 via {plan.GATEWAY_WAN6}",
            *internet.ip_commands(),
        )
        self.gateway.ip(f"route add default via {plan.UPSTREAM4}", f"route add default via {plan.UPSTREAM6}")
        self.upstream.run("nft", internet.SILENCE)

    def _serve(self) -> None:
        waiting: list[tuple[Server, subprocess.Popen[Any]]] = []
        for server in servers(self.directory):
            self._servers[server.name] = server
            waiting.append((server, self.spawn(self.upstream, server.name, *server.argv)))
        deadline = time.monotonic() + 10
        for server, process in waiting:
            for port in server.ports:
                self._await_port(server, process, port, deadline)

    def _await_port(self, server: Server, process: subprocess.Popen[Any], port: int, deadline: float) -> None:
        while True:
            with self.upstream.socket() as probe:
                if probe.connect_ex((plan.UPSTREAM4, port)) == 0:
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                output = (self.directory / f"{server.name}.out").read_text(errors="replace")
                raise RuntimeError(f"{server.name} does not listen on port {port}: {output[-2000:] or 'no output'}")
            time.sleep(0.01)

    def _catch_signals(self) -> None:
        """Make SIGTERM and SIGHUP unwind the stack as Ctrl-C does, where nobody else handles them."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, _exit)


def _addresses(ifname: str, address4: str, address6: str) -> list[str]:
    return [f"address add {address4}/24 dev {ifname}", f"address add {address6}/64 dev {ifname} nodad"]


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reap(process: subprocess.Popen[Any]) -> None:
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _sweep() -> None:
    """Remove the labs of processes that were killed before they could."""
    for path in Path("/run/netns").glob("ztun-*-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not Path("/proc", owner).exists():
            Namespace(path.name).delete()
            shutil.rmtree(Path(tempfile.gettempdir(), path.name.rsplit("-", 1)[0]), ignore_errors=True)
