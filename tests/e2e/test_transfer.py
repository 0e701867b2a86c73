"""Bulk: every byte arrives once and in order, both ways, over both families, for one flow and for hundreds."""

from __future__ import annotations

import concurrent.futures
import hashlib
import time

import pytest

from e2e.traffic import download, echo_flow, upload
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

MEGABYTES = 256
FAMILIES = pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])


@FAMILIES
def test_256_megabytes_down(lab: Lab, ztun: Ztun, address: str) -> None:
    content = lab.file(MEGABYTES).read_bytes()

    with lab.client.connect(address, plan.HTTP_PORT) as sock:
        size, digest = download(sock, f"/files/{MEGABYTES}M", "site")

    assert size == len(content)
    assert digest == hashlib.sha256(content).hexdigest()


@FAMILIES
def test_256_megabytes_up(lab: Lab, ztun: Ztun, address: str) -> None:
    with lab.client.connect(address, plan.DIGEST_PORT) as sock:
        answered, expected = upload(sock, MEGABYTES)

    assert answered == expected


def test_by_name_through_every_kind_of_proxy(lab: Lab, any_ztun: Ztun) -> None:
    digest = hashlib.sha256(lab.file(16).read_bytes()).hexdigest()
    for name in ("web.test", "a.auth.bulk.test", "a.udp.bulk.test"):
        with lab.client.connect(lab.dig(name), plan.HTTP_PORT) as sock:
            assert download(sock, "/files/16M", name) == (16 << 20, digest), name


def test_300_flows_at_once(lab: Lab, any_ztun: Ztun) -> None:
    address = lab.dig("echo.udp.bulk.test")

    def one(number: int) -> bool:
        with lab.client.connect(address if number % 2 else plan.SITE4, plan.ECHO_PORT, timeout=30) as sock:
            return echo_flow(sock, 100_000)

    with concurrent.futures.ThreadPoolExecutor(300) as threads:
        results = list(threads.map(one, range(300)))

    assert results.count(True) == 300
    assert wait_until(lambda: any_ztun.status()["tcp"]["active"] == 0), any_ztun.status()["tcp"]


def test_slow_reader_holds_its_own_server_back_and_nobody_else(lab: Lab, any_ztun: Ztun) -> None:
    """Back-pressure: what the client does not read stays with the server, not in ztun's memory."""
    lab.file(MEGABYTES)
    with lab.client.connect(plan.SITE4, plan.HTTP_PORT) as sock:
        sock.sendall(f"GET /files/{MEGABYTES}M HTTP/1.0\r\n\r\n".encode())
        time.sleep(1.5)
        held = _resident_megabytes(any_ztun.pid)
        started = time.monotonic()
        assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
        assert time.monotonic() - started < 1
        received = 0
        while data := sock.recv(1 << 20):
            received += len(data)

    assert received > MEGABYTES << 20
    assert held < MEGABYTES


def test_answers_stay_prompt_under_load(lab: Lab, any_ztun: Ztun) -> None:
    """The read loop yields: names and the control socket are served while a big transfer runs."""
    lab.file(MEGABYTES)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        url = f"http://{plan.SITE4}/files/{MEGABYTES}M"
        bulk = threads.submit(lab.curl, "-o", "/dev/null", url, url, "-o", "/dev/null")
        worst = 0.0
        while not bulk.done():
            started = time.monotonic()
            any_ztun.status()
            lab.dig("site.test")
            worst = max(worst, time.monotonic() - started)
        bulk.result()

    assert worst < 1


def _resident_megabytes(pid: int) -> float:
    with open(f"/proc/{pid}/status") as status:
        line = next(line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
