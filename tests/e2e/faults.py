"""What the tests of faults have in common: load, and what a gateway looks like at rest."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

RECOVERY = 10.0  # seconds within which a gateway works again after a fault; a tenth of that on a quiet machine
# CPU seconds within one second without traffic. The heartbeat and the rest take 0.002.
IDLE_CPU = 0.1


class Rest(NamedTuple):
    """Descriptors that are no sockets, and flows, of a gateway without traffic."""

    descriptors: int
    flows: int


def cpu(instance: Ztun) -> float:
    """CPU seconds so far."""
    fields = Path(f"/proc/{instance.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def at_rest(instance: Ztun) -> Rest:
    """Sockets are not counted: connections are kept ready for later, and each flow has one."""
    with contextlib.suppress(FileNotFoundError):  # a helper had something open for a moment
        found = [os.readlink(path) for path in Path(f"/proc/{instance.pid}/fd").iterdir()]
        status = instance.status()
        flows = status["tcp"]["active"] + status["udp"]["active"]
        return Rest(sum(not name.startswith("socket:") for name in found), flows)
    return at_rest(instance)


def comes_to_rest(instance: Ztun, before: Rest) -> None:
    """It holds what it held before, and does nothing while it has nothing to do."""
    assert wait_until(lambda: at_rest(instance) == before, RECOVERY), (at_rest(instance), before)
    assert wait_until(lambda: idles(instance), RECOVERY), "a busy loop"
    assert "Traceback" not in instance.output, instance.output


def idles(instance: Ztun) -> bool:
    used = cpu(instance)
    time.sleep(1)
    return cpu(instance) - used < IDLE_CPU


def seen_as(lab: Lab, address: str = plan.SITE4) -> str | None:
    """Who the server says we are; None when it is not reached within two seconds."""
    done = lab.curl(f"http://{address}/", check=False, timeout=2)
    return None if done.returncode else str(json.loads(done.stdout)["client"])


def soon(condition: Callable[[], object]) -> None:
    assert wait_until(condition, RECOVERY)


def works(lab: Lab) -> None:
    """Proxied by address, by name, over IPv6, and direct."""
    soon(lambda: seen_as(lab) == plan.UPSTREAM4)
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert seen_as(lab, f"[{plan.SITE6}]") == plan.UPSTREAM6
    assert seen_as(lab, plan.DIRECT4) == plan.CLIENT4


@contextlib.contextmanager
def load(lab: Lab, clients: int = 4, address: str = plan.SITE4) -> Iterator[Counter[str]]:
    """Clients that connect, exchange a few bytes and end, again and again: "served", or the name of what they got."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                with lab.client.connect(address, plan.BANNER_PORT, timeout=5) as sock:
                    sock.recv(100)
                    sock.sendall(b"x")
                    outcomes["served" if sock.recv(100) == b"x" else "cut"] += 1
            except OSError as error:
                outcomes[type(error).__name__] += 1
                time.sleep(0.01)

    threads = [threading.Thread(target=serve) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def drops(instance: Ztun, reason: str) -> int:
    found: dict[str, Any] = instance.status()["drops"]
    return int(found.get(reason, 0))
