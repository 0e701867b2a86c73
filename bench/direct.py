"""`python -m bench.direct`: what direct traffic pays for the classifier, against plain forwarding.

Traffic runs on while the program of a running ztun is attached to the client's interface in one way, in the other and
not at all, for a fraction of a second each and in an order that changes. A ratio is taken between neighbours in time:
what else the machine does, and how a flow happens to lie on its cores, is in both. The table has the medians of many.
Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.quiet import wait_for_quiet
from ztun.lab import Lab, Ztun, plan
from ztun.platform.linux import bpfcall
from ztun.platform.linux.hooks import ClsactHook, TcxHook

ROOT = Path(__file__).parents[1]
PLAIN = "plain"
HOOKS: dict[str, Any] = {"tcx": TcxHook, "clsact": partial(ClsactHook, device="ztun0")}
SUBJECTS = (PLAIN, *HOOKS)
_SETTLE = 0.05  # seconds after a change that are not measured
_PORT = 9999  # what arrives there is dropped
_PAYLOAD = 18  # bytes: with IPv4, UDP and Ethernet headers the shortest frame there is, 60 bytes
_BURST = 64  # datagrams of one system call
_ENABLE_STATS = 32  # BPF_ENABLE_STATS, enum bpf_cmd
_GOAL = 0.97

Round = dict[str, float]
"""Subject -> rate."""


class Load(NamedTuple):
    """Traffic between client and server, and where it is counted. factor: of the unit that is shown."""

    name: str
    argv: tuple[str, ...]
    ifname: str
    field: int  # of what is sent, in a line of proc(5)'s net/dev
    factor: float


def loads(seconds: float) -> list[Load]:
    """What is measured; each runs for so long."""
    iperf = ("iperf3", "-c", plan.DIRECT4, "-p", str(plan.IPERF_PORT), "-t", str(math.ceil(seconds)))
    found = []
    for flows in (1, 8):
        for direction, ifname, options in (("up", "wan0", ()), ("down", "lan0", ("--reverse",))):
            name = f"{flows} flow{'s' * (flows > 1)} {direction}, Gbit/s"
            found.append(Load(name, (*iperf, "-P", str(flows), *options), ifname, 8, 8e-9))
    small = (sys.executable, "-m", "bench.direct", "--send", str(seconds))
    return [*found, Load("small packets, 1000/s", small, "wan0", 9, 1e-3)]


def sent(load: Load) -> int:
    """Octets or packets that left by its interface, in the namespace of this thread."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == load.ifname:
            return int(fields.split()[load.field])
    raise LookupError(load.ifname)


def measure(lab: Lab, program: int, load: Load, rounds: int, slice_: float) -> list[Round]:
    """Each subject for `slice_` seconds, `rounds` times."""
    found: list[Round] = []
    order = list(SUBJECTS)
    with (
        lab.client.spawn(*load.argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running,
        lab.gateway.entered(),
    ):
        try:
            time.sleep(1)  # flows begin slowly
            for _ in range(rounds):
                random.shuffle(order)
                found.append({name: _rate(program, name, load, slice_) for name in order})
            if running.poll() is not None:
                raise RuntimeError(f"{' '.join(load.argv)} ended with {running.returncode} before it was measured")
        finally:
            running.terminate()
    return found


def _rate(program: int, name: str, load: Load, slice_: float) -> float:
    hook = HOOKS[name]("capture", program, "lan0") if name != PLAIN else None
    try:
        time.sleep(_SETTLE)
        start, before = time.monotonic(), sent(load)
        time.sleep(slice_)
        return (sent(load) - before) * load.factor / (time.monotonic() - start)
    finally:
        if hook is not None:
            hook.close()


def send(seconds: float) -> None:
    """Send datagrams to DIRECT4, `_BURST` a call (sendmmsg(2)), as fast as the kernel takes them."""
    payload, libc = ctypes.create_string_buffer(_PAYLOAD), ctypes.CDLL(None, use_errno=True)
    vector = ctypes.create_string_buffer(struct.pack("@PN", ctypes.addressof(payload), _PAYLOAD))
    # struct msghdr: name, namelen, iov, iovlen, control, controllen, flags; and the length that was sent.
    message = struct.pack("@PIPNPNiI", 0, 0, ctypes.addressof(vector), 1, 0, 0, 0, 0)
    messages = ctypes.create_string_buffer(message * _BURST)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((plan.DIRECT4, _PORT))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(64):
                libc.sendmmsg(sock.fileno(), messages, _BURST, 0)


def cost(lab: Lab, program: int) -> float:
    """Nanoseconds that the program takes for a small packet, by the kernel's own count (which costs time as well)."""
    stats = bpfcall.bpf(_ENABLE_STATS, bpfcall.attributes("=I", 0))
    try:
        with lab.gateway.entered():
            hook = TcxHook("capture", program, "lan0")
        lab.client.run(sys.executable, "-m", "bench.direct", "--send", "0.5", cwd=ROOT)
        hook.close()
        number = bpfcall.program_info(program).id
        [found] = [json.loads(lab.gateway.run("bpftool", "-j", "prog", "show", "id", str(number)).stdout)]
    finally:
        os.close(stats)
    return float(found["run_time_ns"]) / max(found["run_cnt"], 1)


@contextlib.contextmanager
def classifier(lab: Lab, prefixes: int) -> Iterator[int]:
    """The program of a ztun that has a LAN without traffic. prefixes: of rules for other places."""
    lab.gateway.ip("link add spare0 type veth peer name spare1", "link set spare0 up", "link set spare1 up")
    networks = [f"{20 + number // 65536}.{number // 256 % 256}.{number % 256}.0/24" for number in range(prefixes)]
    rules = [{"ip_cidr": [*networks, plan.SITE4], "outbound": "socks"}]
    capture = {"backend": "tcx", "lan": ["spare0"]}
    instance: Ztun = lab.ztun({"capture": capture, "route": {"rules": rules, "default": "direct"}})
    try:
        [number] = [one["id"] for one in instance.routes()["programs"] if one["name"] == "capture"]
        program = bpfcall.open_program(number)
        try:
            yield program
        finally:
            os.close(program)
    finally:
        instance.stop()


def run(rounds: int, slice_: float, prefixes: int) -> tuple[dict[str, list[Round]], float]:
    """Line of the table -> its rounds; nanoseconds a packet."""
    found: dict[str, list[Round]] = {}
    with Lab() as lab, classifier(lab, prefixes) as program:
        drop = f"table ip bench {{ chain in {{ type filter hook prerouting priority raw; udp dport {_PORT} drop; }}; }}"
        lab.upstream.run("nft", drop)
        for load in loads(rounds * len(SUBJECTS) * (slice_ + 2 * _SETTLE) + 10):
            busy = wait_for_quiet()
            if busy is not None:
                print(f"  {load.name}: {busy:.0%} of the machine is busy", file=sys.stderr)
            found[load.name] = measure(lab, program, load, rounds, slice_)
        return found, cost(lab, program)


def ratio(rounds: list[Round], name: str) -> tuple[float, float]:
    """The median of a subject's ratios to plain forwarding, and how far off that may be (its standard error)."""
    ratios = [one[name] / one[PLAIN] for one in rounds]
    median = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(each - median) for each in ratios)
    return median, 1.2533 * deviation / math.sqrt(len(ratios))


def show(found: dict[str, list[Round]], nanoseconds: float) -> bool:
    """Print the table; whether throughput is as it should be."""
    is_good = True
    print(f"{'':<26}" + "".join(f"{name:>10}" for name in SUBJECTS) + "".join(f"{name:>16}" for name in HOOKS))
    for line, rounds in found.items():
        medians = [statistics.median(one[name] for one in rounds) for name in SUBJECTS]
        ratios = [ratio(rounds, name) for name in HOOKS]
        shown = "".join(f"{value:>10.2f}" for value in medians)
        print(f"{line:<26}{shown}" + "".join(f"{f'{median:.3f} ±{error:.3f}':>16}" for median, error in ratios))
        if line.endswith("Gbit/s"):
            is_good &= all(median >= _GOAL for median, _ in ratios)
    print(f"classifier: {nanoseconds:.0f} ns a packet")
    print(f"throughput is {'' if is_good else 'NOT '}at least {_GOAL:.0%} of plain forwarding everywhere")
    return is_good


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.direct", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--slice", type=float, default=0.2, help="seconds of each measurement")
    parser.add_argument("--prefixes", type=int, default=1000, help="in the rules")
    parser.add_argument("--json", type=Path, help="write all rounds there")
    parser.add_argument("--send", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send is not None:
        send(options.send)
        return 0
    found, nanoseconds = run(options.rounds, options.slice, options.prefixes)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if show(found, nanoseconds) else 1


if __name__ == "__main__":
    sys.exit(main())
