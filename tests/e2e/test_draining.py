"""A graceful end: no new flows, a FIN for the idle ones, time for the busy ones, a reset for the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import Any

import pytest

from e2e.conftest import BASE
from e2e.traffic import read_exactly, start
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until

# Carried by ztun and by the kernel: clients do not see which.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.parametrize("backend", ["tcx", "offload"], indirect=True),
]
CHUNK = 100_000
FAMILIES = pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])


def draining(lab: Lab, seconds: float) -> Any:
    return start(lab, {**BASE, "timeouts": {"dial": 3, "drain": seconds}})


def stop_soon(instance: Any, number: int = signal.SIGTERM) -> threading.Thread:
    """Stop it in the background; `join` to wait for its end."""
    thread = threading.Thread(target=instance.stop, args=(number, 20.0))
    thread.start()
    assert wait_until(lambda: "stopping" in instance.output)
    return thread


@FAMILIES
def test_a_transfer_in_progress_comes_to_its_end(lab: Lab, address: str) -> None:
    instance = draining(lab, 15)
    sock = lab.client.connect(address, plan.ECHO_PORT)
    sock.settimeout(10)
    stopping = None
    for number in range(15):
        sock.sendall(bytes([number]) * CHUNK)
        assert read_exactly(sock, CHUNK) == bytes([number]) * CHUNK
        if number == 2:
            stopping = stop_soon(instance)
        time.sleep(0.1)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""
    sock.close()
    assert stopping is not None
    stopping.join()
    assert instance.returncode == 0


@FAMILIES
def test_an_idle_flow_gets_a_fin_at_once(lab: Lab, address: str) -> None:
    instance = draining(lab, 15)
    sock = lab.client.connect(address, plan.ECHO_PORT)
    sock.settimeout(5)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"
    time.sleep(1.2)
    began = time.monotonic()
    stopping = stop_soon(instance)
    assert sock.recv(1) == b""  # a FIN, no reset
    sock.close()
    stopping.join()
    assert instance.returncode == 0
    assert time.monotonic() - began < 10


@FAMILIES
def test_what_does_not_end_is_reset(lab: Lab, address: str) -> None:
    instance = draining(lab, 1)
    sock = lab.client.connect(address, plan.ECHO_PORT)
    sock.settimeout(0.1)
    stopping = None
    with pytest.raises(ConnectionResetError):  # noqa: PT012
        for _ in range(200):
            sock.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                sock.recv(10)
            stopping = stopping or stop_soon(instance)
            time.sleep(0.05)
    sock.close()
    assert stopping is not None
    stopping.join()
    assert instance.returncode == 0


@FAMILIES
def test_a_new_flow_is_refused_while_it_stops(lab: Lab, address: str) -> None:
    instance = draining(lab, 15)
    busy = lab.client.connect(address, plan.ECHO_PORT)
    busy.settimeout(5)
    busy.sendall(b"x")
    stopping = stop_soon(instance)
    with pytest.raises(ConnectionRefusedError):
        lab.client.connect(address, plan.ECHO_PORT)
    assert instance.status()["state"] == "stopping"
    assert instance.status()["drops"]["stopping"] >= 1
    busy.close()
    stopping.join()
    assert instance.returncode == 0


def test_a_second_signal_ends_it_at_once(lab: Lab) -> None:
    instance = draining(lab, 30)
    busy = lab.client.connect(plan.SITE4, plan.ECHO_PORT)
    feeder = threading.Event()

    def feed() -> None:
        while not feeder.wait(0.05):
            try:
                busy.sendall(b"x")
                busy.recv(10)
            except OSError:
                return

    feeding = threading.Thread(target=feed)
    feeding.start()
    stopping = stop_soon(instance)
    began = time.monotonic()
    os.kill(instance.pid, signal.SIGTERM)
    stopping.join()
    assert time.monotonic() - began < 5
    feeder.set()
    feeding.join()
    busy.close()
    assert instance.returncode == 0


@FAMILIES
def test_the_flows_that_live_are_listed(lab: Lab, address: str) -> None:
    instance = draining(lab, 0)
    sock = lab.client.connect(address, plan.ECHO_PORT)
    sock.settimeout(5)
    sock.sendall(b"four")
    assert read_exactly(sock, 4) == b"four"
    (flow,) = [flow for flow in instance.request("GET", "/flows")["flows"] if flow["protocol"] == "tcp"]
    client, destination = (plan.CLIENT4, address) if address == plan.SITE4 else (f"[{plan.CLIENT6}]", f"[{address}]")
    assert flow["client"].startswith(f"{client}:")
    assert flow["destination"] == f"{destination}:{plan.ECHO_PORT}"
    assert flow["outbound"] == "direct"
    assert flow["state"] in ("established", "offloaded")
    assert (flow["up"], flow["down"]) == (4, 4)
    printed = instance.command("status", "--flows", "--config", str(instance.config_path)).stdout
    (line,) = [line for line in printed.splitlines() if f"{destination}:{plan.ECHO_PORT}" in line]
    assert flow["state"] in line
    assert f"{client}:" in line
    sock.close()
    assert wait_until(lambda: instance.request("GET", "/flows")["flows"] == [])
