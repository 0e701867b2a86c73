"""`python -m bench.direct`: what direct traffic pays for the classifier, against plain forwarding.

Rounds are interleaved: each measures forwarding without ztun and with each way of hooking BPF in, in an order that
turns, and a ratio is taken within a round; the table has the medians. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import socket
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.quiet import wait_for_quiet
from ztun.lab import Lab, Ztun, plan
from ztun.platform.linux.bpfcall import attributes, bpf

ROOT = Path(__file__).parents[1]
PLAIN = "plain"
SUBJECTS = (PLAIN, "tcx", "clsact")
_PORT = 9999  # what arrives there is dropped
_PAYLOAD = 18  # bytes: with IPv4, UDP and Ethernet headers the shortest frame there is, 60 bytes
_BURST = 64  # datagrams of one system call
_ENABLE_STATS = 32  # BPF_ENABLE_STATS, enum bpf_cmd
_LIMIT = 0.97

Cells = dict[str, float]


def measure(lab: Lab, seconds: float) -> Cells:
    """Gbit/s of one and of eight flows up and down, thousands of small packets a second."""
    cells: Cells = {}
    for flows in (1, 8):
        for direction in ("up", "down"):
            cells[f"{flows} flow{'s' * (flows > 1)} {direction}, Gbit/s"] = _iperf(lab, flows, direction, seconds)
    cells["small packets, 1000/s"] = _packets(lab, seconds)
    return cells


def _iperf(lab: Lab, flows: int, direction: str, seconds: float) -> float:
    argv = [
        "iperf3",
        "--json",
        "-c",
        plan.DIRECT4,
        "-p",
        str(plan.IPERF_PORT),
        "-t",
        str(max(round(seconds), 1)),
        "-P",
        str(flows),
    ]
    argv += ["--reverse"] * (direction == "down")
    answer = json.loads(lab.client.run(*argv, check=False, timeout=seconds + 30).stdout)
    if "error" in answer:
        raise RuntimeError(f"iperf3: {answer['error']}")
    return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9


def _packets(lab: Lab, seconds: float) -> float:
    """What left the gateway by wan0 while a client sent as many as it could, none of them merged (no GSO, no GRO)."""
    before = _sent(lab)
    done = lab.client.run(sys.executable, "-m", "bench.direct", "--send", str(seconds), cwd=ROOT, timeout=seconds + 30)
    return (_sent(lab) - before) / float(done.stdout) / 1e3


def _sent(lab: Lab) -> int:
    [link] = json.loads(lab.gateway.run("ip", "-j", "-s", "link", "show", "wan0").stdout)
    return int(link["stats64"]["tx"]["packets"])


def send(seconds: float) -> None:
    """Send datagrams to DIRECT4, `_BURST` a call (sendmmsg(2)); prints for how many seconds."""
    payload, libc = ctypes.create_string_buffer(_PAYLOAD), ctypes.CDLL(None, use_errno=True)
    vector = ctypes.create_string_buffer(struct.pack("@PN", ctypes.addressof(payload), _PAYLOAD))
    # struct msghdr: name, namelen, iov, iovlen, control, controllen, flags; and the length that was sent.
    message = struct.pack("@PIPNPNiI", 0, 0, ctypes.addressof(vector), 1, 0, 0, 0, 0)
    messages = ctypes.create_string_buffer(message * _BURST)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect((plan.DIRECT4, _PORT))
        start = now = time.monotonic()
        while now < start + seconds:
            for _ in range(64):
                libc.sendmmsg(sock.fileno(), messages, _BURST, 0)
            now = time.monotonic()
    print(now - start)


def cost(lab: Lab, instance: Ztun) -> Cells:
    """Nanoseconds that the program on lan0 takes for a packet, by the kernel's own count (which costs time as well)."""
    [number] = [one["id"] for one in instance.routes()["programs"] if one["name"].startswith("capture")]
    stats = bpf(_ENABLE_STATS, attributes("=I", 0))
    try:
        _packets(lab, 0.5)
        [found] = [json.loads(lab.gateway.run("bpftool", "-j", "prog", "show", "id", str(number)).stdout)]
    finally:
        os.close(stats)
    return {"classifier, ns a packet": found["run_time_ns"] / max(found["run_cnt"], 1)}


@contextlib.contextmanager
def subject(lab: Lab, name: str, prefixes: int) -> Iterator[Ztun | None]:
    """ztun, or nothing, between the client and what it asks for directly. prefixes: of rules for other places."""
    if name == PLAIN:
        yield None
        return
    networks = [f"{20 + number // 65536}.{number // 256 % 256}.{number % 256}.0/24" for number in range(prefixes)]
    rules = [{"ip_cidr": [*networks, plan.SITE4], "outbound": "socks"}]
    instance = lab.ztun({"capture": {"backend": name}, "route": {"rules": rules, "default": "direct"}})
    try:
        yield instance
    finally:
        instance.stop(signal.SIGTERM)


def run(rounds: int, seconds: float, prefixes: int) -> dict[str, list[Cells]]:
    """Subject -> the cells of each round."""
    found: dict[str, list[Cells]] = {name: [] for name in SUBJECTS}
    with Lab() as lab:
        drop = f"table ip bench {{ chain in {{ type filter hook prerouting priority raw; udp dport {_PORT} drop; }}; }}"
        lab.upstream.run("nft", drop)
        for number in range(rounds):
            turn = number % len(SUBJECTS)
            for name in SUBJECTS[turn:] + SUBJECTS[:turn]:
                with subject(lab, name, prefixes) as instance:
                    busy = wait_for_quiet()
                    if busy is not None:
                        print(f"  round {number + 1}, {name}: {busy:.0%} of the machine is busy", file=sys.stderr)
                    cells = measure(lab, seconds)
                    found[name].append(cells | (cost(lab, instance) if instance is not None else {}))
    return found


def show(found: dict[str, list[Cells]]) -> bool:
    """Print the table; whether throughput is within the limit."""
    is_good = True
    print(f"{'':<26}" + "".join(f"{name:>10}" for name in SUBJECTS) + "".join(f"{name:>10}" for name in SUBJECTS[1:]))
    for line in dict.fromkeys(line for rounds in found.values() for cells in rounds for line in cells):
        medians = [
            statistics.median([cells[line] for cells in found[name] if line in cells] or [0]) for name in SUBJECTS
        ]
        ratios = [_ratio(found[PLAIN], found[name], line) for name in SUBJECTS[1:]]
        shown = "".join(f"{value:>10.2f}" if value else f"{'':>10}" for value in medians)
        print(f"{line:<26}{shown}" + "".join(f"{ratio:>10.3f}" if ratio else f"{'':>10}" for ratio in ratios))
        if line.endswith("Gbit/s"):
            is_good &= all(ratio >= _LIMIT for ratio in ratios)
    print(f"throughput {'is' if is_good else 'IS NOT'} at least {_LIMIT:.0%} of plain forwarding everywhere")
    return is_good


def _ratio(plain: list[Cells], other: list[Cells], line: str) -> float:
    pairs = [(mine[line], theirs[line]) for theirs, mine in zip(plain, other, strict=True) if line in theirs]
    return statistics.median(mine / theirs for mine, theirs in pairs) if pairs else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.direct", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--prefixes", type=int, default=1000, help="in the rules")
    parser.add_argument("--json", type=Path, help="write all cells there")
    parser.add_argument("--send", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send is not None:
        send(options.send)
        return 0
    found = run(options.rounds, options.seconds, options.prefixes)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))
    return 0 if show(found) else 1


if __name__ == "__main__":
    sys.exit(main())
