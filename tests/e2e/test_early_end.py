"""A destination that says all it has at once: the proxy's reply, its bytes and its end come in one segment."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from e2e.conftest import EVERY_WAY
from e2e.traffic import read_all, read_exactly, start
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until

pytestmark = [pytest.mark.usefixtures("backend"), EVERY_WAY]

_PORT = 1099
_BANNER = b"that is all\n"
_GRANTED = b"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"


@contextlib.contextmanager
def hasty_proxy(lab: Lab) -> Iterator[list[bytes]]:
    """A SOCKS5 server of which the last words, the destination's and the FIN leave together; yields what it hears."""
    heard: list[bytes] = []
    listener = lab.upstream.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((plan.UPSTREAM4, _PORT))
    listener.listen()

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            if read_exactly(sock, 3) != b"\x05\x01\x00":
                return
            sock.sendall(b"\x05\x00")
            head = read_exactly(sock, 4)
            if len(head) < 4:
                return  # a connection that was kept ready and not needed
            read_exactly(sock, {1: 6, 4: 18}[head[3]])
            sock.send(_GRANTED + _BANNER, socket.MSG_MORE)  # held back until the FIN
            sock.shutdown(socket.SHUT_WR)
            heard.append(read_all(sock))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])
@pytest.mark.parametrize("warmup", [0, 2])
def test_the_client_hears_all_of_it_and_may_go_on_talking(lab: Lab, address: str, warmup: int) -> None:
    hasty = {"tag": "hasty", "type": "socks5", "server": f"{plan.UPSTREAM4}:{_PORT}"}
    rules = [{"ip_cidr": [plan.SITE4, plan.SITE6], "outbound": "hasty"}]
    with hasty_proxy(lab) as heard:
        start(lab, {"outbounds": [hasty], "route": {"rules": rules}, "pool": {"warmup": warmup}})
        for number in range(20):
            with lab.client.connect(address, plan.ECHO_PORT) as sock:
                sock.settimeout(3)
                assert read_all(sock) == _BANNER
                sock.sendall(b"thank you %d" % number)
                sock.shutdown(socket.SHUT_WR)
        assert wait_until(lambda: len(heard) == 20), heard
        lab.stop()
    assert sorted(heard) == sorted(b"thank you %d" % number for number in range(20))
