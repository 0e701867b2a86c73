"""What is measured: each subject carries the client's traffic to the target while it is active, and is gone after."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from bench import sink
from bench.peer import MTU
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until
from ztun.lab.servers import SOCKS_UDP

TABLE = 100
PROXIES = {SOCKS_UDP: plan.SOCKS_UDP_PORT, "microsocks": plan.SOCKS_PORT, "sink": sink.PORT}
READY_DEADLINE = 15.0  # seconds
_ROOT = Path(__file__).parents[1]

Subject = Callable[[Lab, str], AbstractContextManager[int | None]]
"""(lab, proxy name) -> a context in which it carries traffic; gives the process to account CPU time to, if any."""


def ztun(source: Path | None = None, *, offload: bool = True) -> Subject:
    """source: where its code is, instead of where Python finds it first; offload: capture.offload."""
    env = {**os.environ, "PYTHONPATH": str(source)} if source is not None else None

    def carry(lab: Lab, proxy: str) -> AbstractContextManager[int | None]:
        return _carry(lab, proxy, env, offload)

    return carry


@contextlib.contextmanager
def _carry(lab: Lab, proxy: str, env: dict[str, str] | None, offload: bool) -> Iterator[int | None]:
    config = {
        "capture": {"offload": offload},
        "outbounds": [{"tag": "bench", "type": "socks5", "server": f"{plan.UPSTREAM4}:{PROXIES[proxy]}"}],
        "route": {"rules": [{"ip_cidr": [plan.SITE4, plan.SITE6], "outbound": "bench"}]},
    }
    instance = lab.ztun(config, env=env)
    try:
        _await_traffic(lab, instance.directory / "output")
        yield instance.pid
    finally:
        instance.stop(signal.SIGTERM)


@contextlib.contextmanager
def plain(lab: Lab, proxy: str) -> Iterator[int | None]:
    yield None


def peer(program: str) -> Subject:
    @contextlib.contextmanager
    def carry(lab: Lab, proxy: str) -> Iterator[int | None]:
        device = "peer0"
        if program == "tun2socks":  # has no option for the MTU, but takes an existing device
            lab.gateway.ip(f"tuntap add {device} mode tun", f"link set {device} mtu {MTU}")
        url = f"socks5://{plan.UPSTREAM4}:{PROXIES[proxy]}"
        argv = [sys.executable, "-m", "bench.peer", program, device, url]
        process = lab.spawn(lab.gateway, f"peer-{program}", *argv, cwd=_ROOT)
        try:
            _route(lab, device)
            _await_traffic(lab, lab.directory / f"peer-{program}.out")
            yield process.pid
        finally:
            process.terminate()
            process.wait()
            lab.gateway.run("ip", "rule", "del", "iif", "lan0", "lookup", str(TABLE), check=False)
            lab.gateway.run("ip", "-6", "rule", "del", "iif", "lan0", "lookup", str(TABLE), check=False)
            lab.gateway.run("ip", "link", "del", device, check=False)

    return carry


def _route(lab: Lab, device: str) -> None:
    if not wait_until(lambda: lab.gateway.run("ip", "link", "show", device, check=False).returncode == 0):
        raise RuntimeError(f"{device} did not appear")
    lab.gateway.ip(
        f"link set {device} up",
        f"route replace default dev {device} table {TABLE}",
        f"rule add iif lan0 to {plan.SITE4} lookup {TABLE}",
    )
    lab.gateway.run("ip", "-6", "route", "replace", "default", "dev", device, "table", str(TABLE))
    lab.gateway.run("ip", "-6", "rule", "add", "iif", "lan0", "to", plan.SITE6, "lookup", str(TABLE))


def _await_traffic(lab: Lab, output: Path) -> None:
    """Until a byte comes back from the target. Raises RuntimeError with what the subject printed."""
    if not wait_until(lambda: _echoes(lab), READY_DEADLINE):
        printed = output.read_text(errors="replace")[-1000:]
        raise RuntimeError(f"it does not carry traffic: {printed or 'no output'}")


def _echoes(lab: Lab) -> bool:
    try:
        with lab.client.connect(plan.SITE4, plan.ECHO_PORT, timeout=1) as sock:
            sock.sendall(b"?")
            return sock.recv(1) == b"?"
    except OSError:
        return False


PEERS: dict[str, Subject] = {
    "tun2socks": peer("tun2socks"),
    "sing-tun gvisor": peer("gvisor"),
    "sing-tun system": peer("system"),
    "sing-tun mixed": peer("mixed"),
}
OURS: dict[str, Subject] = {
    "ztun": ztun(),
    "ztun alone": ztun(offload=False),
    "ztun interpreted": ztun(_ROOT, offload=False),
}
"""As it is; carrying every byte itself; and that by the code as it is written, not compiled."""
BASE_LINES: dict[str, Subject] = {"plain forwarding": plain}
SUBJECTS: dict[str, Subject] = {**OURS, **PEERS, **BASE_LINES}
