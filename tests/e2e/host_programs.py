"""Programs of the gateway itself: curl, dig, ping and sockets that run where ztun does."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

from e2e.conftest import OUTBOUNDS, RULES
from e2e.traffic import start
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

FAMILIES = [(plan.SITE4, plan.GATEWAY_WAN4), (plan.SITE6, plan.GATEWAY_WAN6)]
SILENT_CURL = 2  # seconds that are enough to know that nobody answers


def start_on_host(lab: Lab, backend: str, **sections: Any) -> Ztun:
    """A gateway on the usual rules that captures what its own host sends, too."""
    capture = {"host": True, "backend": backend, **sections.pop("capture", {})}
    instance = start(lab, {"capture": capture, "route": {"rules": RULES}, "outbounds": OUTBOUNDS, **sections})
    assert instance.routes()["backend"] == backend
    return instance


def page(lab: Lab, url: str, *arguments: str) -> dict[str, str]:
    """What a site of the lab shows to a program of the gateway; see Lab.page."""
    found: dict[str, str] = json.loads(lab.gateway.run("curl", "-sS", "--max-time", "20", *arguments, url).stdout)
    return found


def fetches(lab: Lab, url: str, *arguments: str) -> bool:
    """Whether it gets an answer soon."""
    argv = ["curl", "-sS", "-o", "/dev/null", "--max-time", str(SILENT_CURL), *arguments, url]
    return lab.gateway.run(*argv, check=False).returncode == 0


def lookup(lab: Lab, *arguments: str) -> list[str]:
    done = lab.gateway.run("dig", "+short", "+tries=3", "+time=2", *arguments)
    return done.stdout.split()


def url_of(address: str, port: int = plan.HTTP_PORT) -> str:
    return f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"


def counted(instance: Ztun, *names: str) -> int:
    """Packets that the programs in the kernel counted under these names."""
    counters = instance.routes()["counters"]
    return sum(int(counters[name]["packets"]) for name in names)


def exits(instance: Ztun) -> dict[str, list[int]]:
    """Interfaces that this host's own packets are captured on -> the IP versions."""
    return {
        each["name"]: each["versions"]
        for each in instance.status()["network"]["host"]
        if each["state"] == "captured" and each["versions"]
    }


def await_exits(instance: Ztun, expected: dict[str, list[int]]) -> None:
    assert wait_until(lambda: exits(instance) == expected, timeout=15), exits(instance)


@contextlib.contextmanager
def echoing(lab: Lab, family: int, kind: int, port: int = 0) -> Iterator[int]:
    """A server of the gateway that sends back the first thing it gets from each peer. Yields its port."""
    with lab.gateway.socket(family, kind) as server:
        server.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        thread = threading.Thread(target=_serve, args=(server, kind), daemon=True)
        thread.start()
        yield server.getsockname()[1]
        with contextlib.suppress(OSError):  # ENOTCONN, and yet it wakes who waits there
            server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _serve(server: socket.socket, kind: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            if kind == socket.SOCK_DGRAM:
                data, peer = server.recvfrom(65535)
                if peer is None:
                    return  # shut down
                server.sendto(data, peer)
                continue
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(accepted.recv(65535))
