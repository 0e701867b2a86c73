"""`python -m bench.xdp`: what it costs to drop blocked packets, by tc alone, by generic and by native XDP.

Two figures for each, medians of interleaved rounds: the packets a second that one core sends into a veth pair and the
kernel drops at its other end, which costs the sender's core too; and the cost of the program alone on one packet, by
BPF_PROG_TEST_RUN. And what it costs everybody else: iperf3 through the gateway's forwarding, while nothing is dropped.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from bench.quiet import wait_for_quiet
from ztun.lab.namespace import Namespace, wait_until
from ztun.platform.linux import bpfcall, layout, loader, make_routes, open_device, xdp
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS, BpfClassifier
from ztun.platform.linux.hooks import TcxHook
from ztun.platform.linux.layout import PORT, U32
from ztun.platform.linux.maps import Map
from ztun.ports import Prefix, Verdict
from ztun.wire import ip

FORMS = ("tc", "generic", "native")
CLIENT, GATEWAY, SERVER, BLOCKED = "10.9.0.2", "10.9.0.1", "10.8.0.2", "203.0.113.5"
_PROG_TEST_RUN = 10
_REPEAT = 200_000
_BATCH = 256
_SOL_PACKET, _QDISC_BYPASS = 263, 20  # linux/if_packet.h


def main() -> None:
    options = _options()
    if options.send:
        print(json.dumps(_send(bytes.fromhex(options.send), options.seconds)))
        return
    samples: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
    order = random.Random(0)
    with _world() as (client, gateway), gateway.entered():
        objects = asyncio.run(_load())
        for number in range(options.rounds):
            turn = list(FORMS)
            order.shuffle(turn)
            for form in turn:
                busy = wait_for_quiet()
                print(f"round {number + 1}, {form}" + (f" (machine {busy:.0%} busy)" if busy else ""), file=sys.stderr)
                with _filtering(form, objects) as classifier:
                    for name, value in _measure(client, classifier, objects, form, options.seconds).items():
                        samples[form].setdefault(name, []).append(value)
    print(f"{'medians of ' + str(options.rounds):<40}" + "".join(f"{form:>12}" for form in FORMS))
    for name in samples["tc"]:
        print(f"{name:<40}" + "".join(f"{statistics.median(samples[form][name]):>12.4g}" for form in FORMS))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.xdp", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--send", help=argparse.SUPPRESS)  # the sender, in the client's namespace
    return parser.parse_args()


def _measure(
    client: Namespace, classifier: BpfClassifier, objects: loader.Objects, form: str, seconds: float
) -> dict[str, float]:
    frame = _frame(client)
    before = classifier.counters()["drop_rule"]["packets"]
    argv = [sys.executable, "-m", "bench.xdp", "--seconds", str(seconds), "--send", frame.hex()]
    sent = json.loads(client.run(*argv, timeout=seconds + 30, cwd=os.getcwd()).stdout)
    dropped = classifier.counters()["drop_rule"]["packets"] - before
    program = objects.programs["capture" if form == "tc" else xdp.PROGRAM]
    return {
        "dropped, 1/s": dropped / sent["seconds"],
        "dropped / sent": dropped / sent["packets"],
        "CPU of all cores for one, ns": sent["busy"] * 1e9 / max(dropped, 1),
        "the program on a blocked one, ns": _cost(program, frame),
        "the program on another one, ns": _cost(program, frame[:30] + socket.inet_aton(SERVER) + frame[34:]),
        "forwarded up, Gbit/s": _iperf(client, seconds),
        "forwarded down, Gbit/s": _iperf(client, seconds, "--reverse"),
    }


# Senders.


def _send(frame: bytes, seconds: float) -> dict[str, float]:
    """Send one frame over and over through eth0; {"packets", "seconds", "busy"}, the last of all cores."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        sock.setsockopt(_SOL_PACKET, _QDISC_BYPASS, 1)
        call = _sendmmsg(sock, frame)
        packets, busy, started = 0, _busy_seconds(), time.monotonic()
        while (spent := time.monotonic() - started) < seconds:
            packets += call()
        return {"packets": packets, "seconds": spent, "busy": _busy_seconds() - busy}


def _sendmmsg(sock: socket.socket, frame: bytes) -> Callable[[], int]:
    """A call of sendmmsg(2) with _BATCH copies of `frame`; it returns how many went."""
    held = ctypes.create_string_buffer(frame, len(frame))
    vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(held), len(frame)))
    # struct mmsghdr: name, its length, the vector and how long it is, control, its length, flags; then the length sent.
    message = struct.pack("=QI4xQQQQi4xI4x", 0, 0, ctypes.addressof(vector), 1, 0, 0, 0, 0)
    messages = ctypes.create_string_buffer(message * _BATCH)
    libc, fd, kept = ctypes.CDLL(None, use_errno=True), sock.fileno(), (held, vector)

    def call() -> int:
        assert kept
        return max(int(libc.sendmmsg(fd, messages, _BATCH, 0)), 0)

    return call


def _busy_seconds() -> float:
    """CPU time of all cores since boot, interrupts included, idle and iowait not (proc(5), stat)."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _cost(program: int, frame: bytes) -> float:
    """Nanoseconds that one run of a program takes, as the kernel measures many (bpf(2), BPF_PROG_TEST_RUN)."""
    held = ctypes.create_string_buffer(bytes(6) + frame[6:], len(frame))  # to the address of lo, where it runs
    attr = bpfcall.attributes("=IIIIQQII", program, 0, len(frame), 0, ctypes.addressof(held), 0, _REPEAT, 0)
    bpfcall.bpf(_PROG_TEST_RUN, attr)
    return float(struct.unpack_from("=I", attr.raw, 36)[0])


def _iperf(client: Namespace, seconds: float, *arguments: str) -> float:
    argv = ["iperf3", "--json", "-c", SERVER, "-t", f"{seconds:g}", *arguments]
    answer = json.loads(client.run(*argv, check=False, timeout=seconds + 30).stdout)
    return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9


# The world: client -- gateway -- server.


@contextlib.contextmanager
def _world() -> Iterator[tuple[Namespace, Namespace]]:
    client, gateway, server = namespaces = tuple(Namespace(f"bx{os.getpid()}{letter}") for letter in "cgs")
    try:
        for namespace in namespaces:
            namespace.create(resolver="127.0.0.1", sysctls={"ipv4/ip_forward": "1"})
        gateway.ip(
            f"link add lan0 type veth peer name eth0 netns {client.name}",
            f"link add wan0 type veth peer name eth0 netns {server.name}",
            f"address add {GATEWAY}/24 dev lan0",
            "address add 10.8.0.1/24 dev wan0",
            "link set lan0 up",
            "link set wan0 up",
        )
        for namespace, net in ((client, 9), (server, 8)):
            namespace.ip(
                f"address add 10.{net}.0.2/24 dev eth0", "link set eth0 up", f"route add default via 10.{net}.0.1"
            )
        listener = server.spawn("iperf3", "--server", stdout=subprocess.DEVNULL)
        try:
            assert wait_until(lambda: client.run("ping", "-c1", "-W1", SERVER, check=False).returncode == 0)
            yield client, gateway
        finally:
            listener.kill()
            listener.wait()
    finally:
        for namespace in namespaces:
            namespace.delete()


async def _load() -> loader.Objects:
    programs = {xdp.PROGRAM: xdp.label("ztun0")}
    return await loader.load(layout.find_sources(), PROGRAMS, {**MAPS, **xdp.MAPS}, programs)


@contextlib.contextmanager
def _filtering(form: str, objects: loader.Objects) -> Iterator[BpfClassifier]:
    """Capture on lan0 as a gateway does, without a stack behind it, with XDP in this form."""
    own = loader.Objects(*({name: os.dup(fd) for name, fd in part.items()} for part in objects[:2]))
    device = open_device("ztun0", 1500)
    routes = make_routes("ztun0", mtu=1500, address="198.18.0.1/15")
    routes.up()
    wanted = False if form == "tc" else form
    classifier = BpfClassifier(own, "tcx", TcxHook, Capture("ztun0", ("lan0",), 0, False, False, (), wanted))
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(classifier, over))
    try:
        classifier.replace_rules([Prefix(socket.inet_aton(BLOCKED)[:3] + bytes(1), 24, Verdict.DROP, 0)])
        classifier.attach()
        Map(own.maps["ports"], U32.size, PORT.size).update(U32.pack(1), PORT.pack(bytes(6)))  # lo, for _cost
        heart.start()
        yield classifier
    finally:
        over.set()
        heart.join()
        classifier.close()
        routes.down()
        device.close()


def _beat(classifier: BpfClassifier, over: threading.Event) -> None:
    while not over.wait(0.2):
        classifier.heartbeat()


def _frame(client: Namespace) -> bytes:
    """A datagram of 18 octets to a blocked address, in an Ethernet frame to the gateway: 60 octets, the least."""
    gateway = client.run("ip", "neigh", "get", GATEWAY, "dev", "eth0").stdout.split("lladdr ")[1].split()[0]
    sender = client.run("cat", "/sys/class/net/eth0/address").stdout.strip()
    transport = struct.pack("!HHHH", 4321, 9, 26, 0) + bytes(18)
    header = bytes(ip.header(socket.inet_aton(CLIENT), socket.inet_aton(BLOCKED), socket.IPPROTO_UDP, len(transport)))
    return bytes.fromhex(gateway.replace(":", "") + sender.replace(":", "")) + b"\x08\x00" + header + transport


if __name__ == "__main__":
    main()
