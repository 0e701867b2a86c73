"""Plays many scripts side by side, one step of each in turn, and notes each stack's answers."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Sequence

from .client import Answer, Client, Facts, Heard, pattern
from .kernel import SERVER, KernelApp, KernelSide
from .script import Application, Script
from .ztun_side import ZtunSide

_PREFIX = {4: int(ipaddress.ip_address("10.97.1.0")), 6: int(ipaddress.ip_address("fd97::1:0"))}
_PORTS = 256  # scripts from one address
_LIMIT = 0.9  # seconds a batch may take before the kernel's timers (1 s for a SYN-ACK) take part


Played = list[tuple[list[Answer], list[Facts]]]  # for each script: the answers to its steps, and where they stood


class TooSlowError(Exception):
    """The machine was so busy that the kernel's timers answered too."""


def _clients(scripts: Sequence[Script], first: int) -> dict[tuple[bytes, int], Client]:
    """Each script has its own address and port; `first`: how many were used before."""
    clients = {}
    for number, script in enumerate(scripts, first):
        size = 4 if script.family == 4 else 16
        address = (_PREFIX[script.family] + number // _PORTS).to_bytes(size, "big")
        port = 20000 + number % _PORTS
        clients[address, port] = Client(script, address, SERVER[script.family], port)
    return clients


def _target(packet: bytes) -> tuple[bytes, int] | None:
    """Whom a TCP packet is for."""
    if packet[0] >> 4 == 4 and packet[9] == 6:
        return packet[16:20], int.from_bytes(packet[22:24], "big")
    if packet[0] >> 4 == 6 and packet[6] == 6:
        return packet[24:40], int.from_bytes(packet[42:44], "big")
    return None  # the kernel's own neighbourhood chatter


def play_to_ztun(scripts: Sequence[Script], first: int = 0) -> Played:
    """The answers to each step of each script."""
    side = ZtunSide()
    clients = _clients(scripts, first)
    answers: dict[tuple[bytes, int], list[Answer]] = {key: [] for key in clients}
    for turn in range(max(len(script.steps) for script in scripts)):
        heard: dict[tuple[bytes, int], list[Heard]] = {key: [] for key in clients}
        for key, client in clients.items():
            if turn < len(client.script.steps):
                step = client.script.steps[turn]
                if not isinstance(step, Application):
                    side.inject(client.build(step))
                    continue
                client.note_application_step()
                if key in side.apps:
                    side.apps[key].act(step, pattern(client.sent, step.count), side.now)
        for packet in side.drain():
            key = _target(packet)
            assert key is not None
            heard[key].append(clients[key].read(packet))
        for key, client in clients.items():
            app = side.apps.get(key)
            if turn < len(client.script.steps):
                told = (app.received, app.eof_seen, app.broken) if app is not None else (b"", False, False)
                answers[key].append(client.answer(heard[key], *told))
                client.note_application(app, told[1])
    return [(answers[key], client.facts) for key, client in clients.items()]


def play_to_kernel(side: KernelSide, scripts: Sequence[Script], first: int = 0) -> Played:
    """The answers to each step of each script. Raises TooSlowError."""
    started = time.monotonic()
    clients = _clients(scripts, first)
    apps = {key: KernelApp() for key in clients}
    answers: dict[tuple[bytes, int], list[Answer]] = {key: [] for key in clients}
    try:
        for turn in range(max(len(script.steps) for script in scripts)):
            _kernel_turn(side, turn, clients, apps, answers)
            if time.monotonic() - started > _LIMIT:
                raise TooSlowError
    finally:
        for app in apps.values():
            app.abort()
        for _ in side.drain():
            pass
    return [(answers[key], client.facts) for key, client in clients.items()]


def _kernel_turn(
    side: KernelSide,
    turn: int,
    clients: dict[tuple[bytes, int], Client],
    apps: dict[tuple[bytes, int], KernelApp],
    answers: dict[tuple[bytes, int], list[Answer]],
) -> None:
    heard: dict[tuple[bytes, int], list[Heard]] = {key: [] for key in clients}

    def listen() -> None:
        for packet in side.drain():
            key = _target(packet)
            if key in clients:
                heard[key].append(clients[key].read(packet))

    active = [(key, client) for key, client in clients.items() if turn < len(client.script.steps)]
    for number, (key, client) in enumerate(active):
        step = client.script.steps[turn]
        if isinstance(step, Application):
            client.note_application_step()
            apps[key].act(step, pattern(client.sent, step.count))
        else:
            side.inject(client.build(step))
        if number % 64 == 63:
            listen()
    for address, port, sock in side.accept():
        if (address, port) in apps:
            apps[address, port].abort()
            apps[address, port] = KernelApp(sock)
        else:
            sock.close()
    for key, _ in active:
        apps[key].look()
    listen()
    for key, client in active:
        app = apps[key]
        answers[key].append(client.answer(heard[key], app.received, app.eof, app.broken))
        client.note_application(app if app.accepted else None, app.eof)
