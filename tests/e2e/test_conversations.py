"""How TCP conversations begin and end, as both ends see it."""

from __future__ import annotations

import socket
import time

import pytest

from e2e.conftest import EVERY_WAY
from e2e.traffic import read_all, read_exactly, reset, upload
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

pytestmark = [pytest.mark.usefixtures("backend"), EVERY_WAY]

FAMILIES = pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])


@FAMILIES
def test_server_that_speaks_first(lab: Lab, any_ztun: Ztun, address: str) -> None:
    with lab.client.connect(address, plan.BANNER_PORT) as sock:
        assert sock.recv(100) == b"220 lab ready\r\n"
        sock.sendall(b"QUIT\r\n")
        assert read_exactly(sock, 6) == b"QUIT\r\n"


@FAMILIES
def test_server_that_waits_for_the_client(lab: Lab, any_ztun: Ztun, address: str) -> None:
    with lab.client.connect(address, plan.CLIENT_FIRST_PORT) as sock:
        sock.sendall(b"hello\n")
        assert read_all(sock) == b"you said hello\n"


@FAMILIES
def test_clients_fin_leaves_the_other_half_open(lab: Lab, any_ztun: Ztun, address: str) -> None:
    with lab.client.connect(address, plan.DIGEST_PORT) as sock:
        answered, expected = upload(sock, 1)  # it answers after our FIN

    assert answered == expected


@FAMILIES
def test_servers_fin_leaves_the_other_half_open(lab: Lab, any_ztun: Ztun, address: str) -> None:
    size = 3_000_000 + len(address)
    with lab.client.connect(address, plan.FIN_FIRST_PORT) as sock:
        assert read_all(sock) == b"that is all\n"
        sock.sendall(bytes(size))

    assert wait_until(lambda: _ended(lab, plan.FIN_FIRST_PORT, "eof", size)), lab.journal()[-3:]


@FAMILIES
def test_servers_reset_reaches_the_client_as_one(lab: Lab, any_ztun: Ztun, address: str) -> None:
    with lab.client.connect(address, plan.RESET_PORT) as sock:
        sock.sendall(b"reset me\n")
        with pytest.raises(ConnectionResetError):
            sock.recv(100)


@FAMILIES
def test_clients_reset_reaches_the_server_as_one(lab: Lab, any_ztun: Ztun, address: str) -> None:
    before = _count(lab, plan.ECHO_PORT, "reset")
    sock = lab.client.connect(address, plan.ECHO_PORT)
    sock.sendall(b"x")
    assert sock.recv(1) == b"x"

    reset(sock)

    assert wait_until(lambda: _count(lab, plan.ECHO_PORT, "reset") == before + 1), lab.journal()[-3:]


def test_clients_reset_ends_the_flow_through_a_proxy_too(lab: Lab, any_ztun: Ztun) -> None:
    before = _count(lab, plan.BANNER_PORT)
    sock = lab.client.connect(plan.SITE4, plan.BANNER_PORT)
    assert sock.recv(100)

    reset(sock)

    assert wait_until(lambda: _count(lab, plan.BANNER_PORT) == before + 1)
    assert wait_until(lambda: any_ztun.status()["tcp"]["active"] == 0), any_ztun.status()["tcp"]


class TestHonestConnect:
    """The client is connected when its destination is, and hears the truth when it is not."""

    @pytest.mark.parametrize("through", ["site.test", plan.SITE4, plan.SITE6])
    def test_refused_upstream_is_refused_to_the_client(self, lab: Lab, any_ztun: Ztun, through: str) -> None:
        address = lab.dig(through) if through.endswith(".test") else through
        with pytest.raises(ConnectionRefusedError):
            lab.client.connect(address, plan.CLOSED_PORT)

    @pytest.mark.parametrize("address", [plan.SHARED4, plan.SHARED6], ids=["v4", "v6"])
    def test_refused_by_the_direct_outbound(self, lab: Lab, any_ztun: Ztun, address: str) -> None:
        with pytest.raises(ConnectionRefusedError):
            lab.client.connect(address, plan.CLOSED_PORT)

    @pytest.mark.parametrize("address", [plan.UNREACHABLE4, plan.UNREACHABLE6], ids=["v4", "v6"])
    def test_unreachable_upstream_is_unreachable_to_the_client(self, lab: Lab, any_ztun: Ztun, address: str) -> None:
        started = time.monotonic()
        with pytest.raises(OSError, match=r"No route to host|Network is unreachable|refused"):
            lab.client.connect(address, plan.HTTP_PORT)
        assert time.monotonic() - started < 2

    def test_silent_upstream_is_given_up_within_the_dial_time(self, lab: Lab, any_ztun: Ztun) -> None:
        started = time.monotonic()
        with pytest.raises(OSError, match=r"No route to host|unreachable|refused|timed out"):
            lab.client.connect(plan.SILENT4, plan.HTTP_PORT, timeout=8)
        assert 2.5 < time.monotonic() - started < 5

    def test_unmapped_fake_ip_is_refused_and_never_dialled(self, lab: Lab, any_ztun: Ztun) -> None:
        for address in ("198.19.200.200", "2001:2::7777"):
            started = time.monotonic()
            with pytest.raises(OSError, match=r"refused|unreachable|No route"):
                lab.client.connect(address, plan.HTTP_PORT)
            assert time.monotonic() - started < 1

    def test_connected_means_connected(self, lab: Lab, any_ztun: Ztun) -> None:
        """No SYN-ACK before the outbound connected: nobody is answered while the proxy still waits."""
        with lab.client.socket(socket.AF_INET) as sock:
            sock.setblocking(False)
            sock.connect_ex((plan.SILENT4, plan.HTTP_PORT))
            time.sleep(1)
            with pytest.raises(OSError, match="not connected"):
                sock.getpeername()


def _count(lab: Lab, port: int, event: str | None = None) -> int:
    return sum(line["port"] == port and event in (None, line["event"]) for line in lab.journal())


def _ended(lab: Lab, port: int, event: str, received: int) -> bool:
    return any((line["port"], line["event"], line["received"]) == (port, event, received) for line in lab.journal())
