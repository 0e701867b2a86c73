"""Loss, small segments, silence: what a real network does to TCP; and that the fast path is really taken."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator

import pytest

from e2e.conftest import BASE
from e2e.traffic import ask_udp, download, start, upload
from ztun.config.values import join_endpoint
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

FAMILIES = pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])


@contextlib.contextmanager
def losing(lab: Lab, hook: str, which: str) -> Iterator[None]:
    """Some of the client's TCP packets are lost: of those that come down ("input") or that go up ("output").

    which: an nftables expression. nftables sees super-segments: one loss is a burst of up to 45 segments.
    """
    chain = f"type filter hook {hook} priority 0;"
    lab.client.run("nft", f"table inet loss {{ chain c {{ {chain} meta l4proto tcp {which} counter drop; }}; }}")
    try:
        yield
        counted = lab.client.run("nft", "list", "table", "inet", "loss").stdout
    finally:
        lab.client.run("nft", "delete", "table", "inet", "loss")
    assert "counter packets" in counted
    assert "counter packets 0 " not in counted


@FAMILIES
@pytest.mark.parametrize("hook", ["input", "output"])
def test_every_byte_arrives_in_spite_of_loss(lab: Lab, any_ztun: Ztun, hook: str, address: str) -> None:
    digest = hashlib.sha256(lab.file(16).read_bytes()).hexdigest()
    with losing(lab, hook, "numgen random mod 100 < 5"):
        with lab.client.connect(address, plan.HTTP_PORT, timeout=30) as sock:
            assert download(sock, "/files/16M", "site") == (16 << 20, digest)
        with lab.client.connect(address, plan.DIGEST_PORT, timeout=30) as sock:
            answered, expected = upload(sock, 16)
    assert answered == expected


def test_handshake_survives_the_loss_of_two_answers(lab: Lab, any_ztun: Ztun) -> None:
    first_two = "tcp flags & (syn | ack) == syn | ack quota until 119 bytes"  # 60 bytes each
    with losing(lab, "input", first_two), lab.client.connect(plan.SITE4, plan.BANNER_PORT, timeout=30) as sock:
        assert sock.recv(100) == b"220 lab ready\r\n"


@pytest.mark.parametrize("mtu", [1280, 1400])
@FAMILIES
def test_client_on_a_narrow_link(lab: Lab, any_ztun: Ztun, address: str, mtu: int) -> None:
    """Segments follow the MSS that the client offered, so nothing is lost on its link."""
    digest = hashlib.sha256(lab.file(16).read_bytes()).hexdigest()
    lab.client.ip(f"link set eth0 mtu {mtu}")
    try:
        with lab.client.connect(address, plan.HTTP_PORT) as sock:
            assert download(sock, "/files/16M", "site") == (16 << 20, digest)
        with lab.client.connect(address, plan.DIGEST_PORT) as sock:
            answered, expected = upload(sock, 4)
    finally:
        lab.client.ip(
            "link set eth0 mtu 1500",
            f"route replace default via {plan.GATEWAY_LAN6} src {plan.CLIENT6}",  # IPv6 forgets it with the MTU
        )
    assert answered == expected


@FAMILIES
@pytest.mark.parametrize("direction", ["up", "down"])
def test_super_segments_pass_the_tun_whole(lab: Lab, ztun: Ztun, direction: str, address: str) -> None:
    lab.file(16)
    with lab.watching(lab.gateway, "ztun0") as packets:
        if direction == "down":
            lab.curl("-o", "/dev/null", f"http://{join_endpoint(address, plan.HTTP_PORT)}/files/16M")
        else:
            with lab.client.connect(address, plan.DIGEST_PORT) as sock:
                upload(sock, 16)

    assert max(map(len, packets)) > 20_000
    assert "vnet_hdr on" in lab.gateway.run("ip", "-d", "link", "show", "ztun0").stdout


@FAMILIES
def test_silent_flows_end_after_their_time(lab: Lab, address: str) -> None:
    instance = start(lab, {**BASE, "timeouts": {"dial": 3, "tcp_idle": 1.5, "udp_idle": 1.5}})
    with lab.client.connect(address, plan.BANNER_PORT) as sock:
        assert sock.recv(100)
        ask_udp(lab.client, address, plan.ECHO_PORT, b"x")
        assert instance.status()["tcp"]["active"] == 1
        assert instance.status()["udp"]["active"] == 1
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(100) == b""

    assert 1 < time.monotonic() - started < 5
    assert wait_until(lambda: instance.status()["udp"]["active"] == 0)
    assert instance.status()["tcp"]["active"] == 0


def test_flow_that_speaks_now_and_then_does_not_end(lab: Lab) -> None:
    start(lab, {**BASE, "timeouts": {"dial": 3, "tcp_idle": 1.5, "udp_idle": 1.5}})
    with lab.client.connect(plan.SITE4, plan.BANNER_PORT) as sock:
        assert sock.recv(100)
        for _ in range(5):
            time.sleep(0.6)
            sock.sendall(b"still here")
            assert sock.recv(100) == b"still here"
