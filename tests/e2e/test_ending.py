"""However it ends, the host is intact; and it can be started again."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.conftest import BASE
from e2e.traffic import bpf_exists, start
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot

BACKENDS = pytest.mark.parametrize("backend", ["tcx", "clsact", "routes"])


@pytest.fixture
def untouched(lab: Lab) -> Iterator[None]:
    """The gateway's network after the test is what it was before it."""
    before = snapshot(lab.gateway)
    yield
    assert differences(before, snapshot(lab.gateway)) == []


def on(backend: str, **sections: Any) -> dict[str, Any]:
    return {**BASE, "capture": {"backend": backend}, **sections}


@BACKENDS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("untouched")
def test_signal_ends_it_cleanly(lab: Lab, backend: str, number: int) -> None:
    instance = start(lab, on(backend))
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    ids = instance.bpf_ids()
    assert ids["prog"] or backend == "routes"

    assert instance.stop(number) == 0, instance.output

    assert [(kind, number) for kind in ids for number in ids[kind] if bpf_exists(kind, number)] == []
    assert not instance.socket_path.exists()
    assert "Traceback" not in instance.output


@pytest.mark.usefixtures("untouched")
def test_down_ends_it_cleanly(lab: Lab) -> None:
    instance = start(lab, BASE)

    done = instance.command("down", "--config", str(instance.config_path))

    assert done.returncode == 0
    assert wait_until(lambda: instance.returncode == 0), instance.output


@pytest.mark.usefixtures("untouched")
def test_running_flows_are_told(lab: Lab) -> None:
    """Neither end is left to wait for the other: FIN or RST to the client and to the server."""
    instance = start(lab, BASE)
    before = len([line for line in lab.journal() if line["port"] == plan.BANNER_PORT])
    flows = [
        lab.client.connect(address, plan.BANNER_PORT) for address in (plan.SITE4, plan.SITE6, lab.dig("site.test"))
    ]
    for flow in flows:
        assert flow.recv(100)

    assert instance.stop() == 0

    for flow in flows:
        flow.settimeout(1)
        try:
            assert flow.recv(100) == b""
        except ConnectionResetError:
            pass
        flow.close()
    assert wait_until(lambda: len([e for e in lab.journal() if e["port"] == plan.BANNER_PORT]) == before + len(flows))


@pytest.mark.usefixtures("untouched")
def test_it_ends_promptly_under_load(lab: Lab) -> None:
    instance = start(lab, BASE)
    lab.file(256)
    load = lab.spawn(lab.client, "load", "curl", "-s", "-o", "/dev/null", f"http://{plan.SITE4}/files/256M")
    time.sleep(0.1)
    started = time.monotonic()

    assert instance.stop() == 0

    assert time.monotonic() - started < 6
    load.wait(5)


@BACKENDS
def test_after_sigkill_direct_traffic_flows_and_up_works_again(lab: Lab, backend: str) -> None:
    before = snapshot(lab.gateway)
    instance = start(lab, on(backend))
    assert lab.page("http://site.test/")

    instance.kill()

    ended = time.monotonic()
    with lab.client.connect(plan.DIRECT4, plan.HTTP_PORT, timeout=1) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert json.loads(_body(sock))["client"] == plan.CLIENT4
    # What was tunnelled is plain forwarding now: with `fail: open` nobody is cut off.
    assert wait_until(lambda: _client_seen(lab, plan.SITE4) == plan.CLIENT4, timeout=1.5)
    assert time.monotonic() - ended < 2

    again = lab.ztun(on(backend, control={"socket": str(instance.socket_path)}))
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert again.stop() == 0
    assert differences(before, snapshot(lab.gateway)) == []


def test_killed_with_fail_closed_lets_nothing_slip_past_the_proxy(lab: Lab) -> None:
    # clsact filters stay after a kill; a TCX link goes with its process, so there is nothing to keep closed there.
    instance = start(lab, on("clsact", capture={"backend": "clsact", "fail": "closed"}))
    instance.kill()
    time.sleep(1.5)

    assert _client_seen(lab, plan.DIRECT4) == plan.CLIENT4
    assert _client_seen(lab, plan.SITE4) is None

    assert lab.ztun(on("clsact")).stop() == 0  # sweeps
    assert _client_seen(lab, plan.SITE4) == plan.CLIENT4


def test_second_instance_refuses_with_one_line_and_changes_nothing(lab: Lab) -> None:
    first = start(lab, BASE)
    before = snapshot(lab.gateway)

    second = first.command("up", "--config", str(first.config_path), check=False)

    assert second.returncode == 1
    assert second.stdout == ""
    assert len(second.stderr.splitlines()) == 1
    assert str(first.pid) in second.stderr or "running" in second.stderr
    assert differences(before, snapshot(lab.gateway)) == []
    assert lab.page("http://site.test/")["client"] in (plan.UPSTREAM4, plan.UPSTREAM6)
    assert first.stop() == 0


@pytest.mark.usefixtures("untouched")
def test_start_and_stop_over_and_over(lab: Lab) -> None:
    for backend in ("tcx", "clsact", "tcx"):
        instance = start(lab, on(backend))
        assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
        assert instance.stop() == 0


def _body(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data.split(b"\r\n\r\n", 1)[1]


def _client_seen(lab: Lab, address: str) -> str | None:
    """Who the server saw, or None when it cannot be reached."""
    done = lab.curl(f"http://{address}/", check=False, timeout=1)
    return json.loads(done.stdout)["client"] if done.returncode == 0 else None
