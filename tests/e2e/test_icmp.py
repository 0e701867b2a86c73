"""What real clients hear of by ICMP, and what the gateway hears of them."""

from __future__ import annotations

import errno
import socket
import struct

import pytest

from e2e.traffic import ask_udp
from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

pytestmark = pytest.mark.usefixtures("backend")

_IP_RECVERR, _IPV6_RECVERR = 11, 25  # linux/in.h, linux/in6.h
_SCTP = 132  # a protocol that no proxy carries


@pytest.mark.parametrize("type", ["A", "AAAA"])
@pytest.mark.parametrize("size", [1472, 1473, 4000, 30000])
def test_large_pings_come_back_whole(lab: Lab, any_ztun: Ztun, type: str, size: int) -> None:
    """ping(8) compares the payload."""
    done = lab.client.run("ping", "-c2", "-i0.05", "-W2", f"-s{size}", lab.dig("site.test", type), check=False)
    assert " 2 received" in done.stdout, done.stdout
    assert "wrong" not in done.stdout


@pytest.mark.parametrize(
    ("family", "address", "level", "option", "number"),
    [
        (socket.AF_INET, plan.SITE4, socket.IPPROTO_IP, _IP_RECVERR, errno.ENOPROTOOPT),
        (socket.AF_INET6, plan.SITE6, socket.IPPROTO_IPV6, _IPV6_RECVERR, errno.EPROTO),
    ],
    ids=["v4", "v6"],
)
def test_an_unknown_protocol_is_told_of(
    lab: Lab, any_ztun: Ztun, family: socket.AddressFamily, address: str, level: int, option: int, number: int
) -> None:
    """The client's kernel says "protocol not available" to whoever tried (RFC 1122 section 3.2.2.1, RFC 8200 4)."""
    before = any_ztun.status()["drops"].get("ip-protocol", 0)
    with lab.client.socket(family, socket.SOCK_RAW, _SCTP) as sock:
        sock.setsockopt(level, option, 1)
        sock.settimeout(3)
        sock.connect((address, 0))
        sock.send(bytes(20))
        with pytest.raises(OSError, match=r".") as told:
            sock.recv(100)
    assert told.value.errno == number
    assert any_ztun.status()["drops"]["ip-protocol"] == before + 1


@pytest.mark.parametrize("address", [plan.SITE4, plan.SITE6], ids=["v4", "v6"])
def test_a_client_that_closed_its_socket_is_noticed(lab: Lab, any_ztun: Ztun, address: str) -> None:
    """Its kernel answers the late reply; the socket that takes the port next has a session as new."""
    assert ask_udp(lab.client, address, plan.ECHO_PORT, b"the association is fast from now on")
    before = any_ztun.status()["drops"].get("icmp-port", 0)
    sessions = any_ztun.status()["udp"]["active"]
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with lab.client.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, plan.ECHO_PORT))
        port = sock.getsockname()[1]
        sock.send(b"x" * 100)
    assert wait_until(lambda: any_ztun.status()["drops"].get("icmp-port", 0) == before + 1), any_ztun.status()["drops"]
    assert wait_until(lambda: any_ztun.status()["udp"]["active"] == sessions), "the session went with the socket"
    with lab.client.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)
        sock.bind(("::" if ":" in address else "0.0.0.0", port))
        sock.connect((address, plan.ECHO_PORT))
        sock.send(b"again")
        assert sock.recv(100) == b"again"


def test_the_other_flows_of_its_port_go_on(lab: Lab, any_ztun: Ztun) -> None:
    """A connected socket takes datagrams of its peer only, and its kernel refuses those of others for it."""
    whoami, echo = (plan.SITE4, plan.WHOAMI_PORT), (plan.SITE4, plan.ECHO_PORT)
    with lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(3)

        def ask(peer: tuple[str, int], text: bytes) -> bytes:
            sock.connect(peer)
            sock.send(text)
            return sock.recv(2000)

        seen_as = ask(whoami, b"?")
        before = any_ztun.status()["drops"].get("icmp-port", 0)
        sock.connect(echo)
        sock.send(b"too late")
        sock.connect(whoami)
        assert wait_until(lambda: any_ztun.status()["drops"].get("icmp-port", 0) == before + 1)
        assert ask(whoami, b"?") == seen_as
        assert ask(echo, b"wanted again") == b"wanted again"


def test_fragments_of_a_broken_datagram_are_not_put_together(lab: Lab, any_ztun: Ztun) -> None:
    """Overlaps (RFC 5722), from a raw socket."""
    before = any_ztun.status()["drops"].get("ip-fragment-overlap", 0)
    udp = struct.pack("!HHHH", 40000, plan.ECHO_PORT, 2008, 0) + bytes(2000)
    with lab.client.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        for offset, piece, more in ((0, udp[:1000], True), (992, udp[992:2000], True), (2000, udp[2000:], False)):
            word = offset // 8 | more << 13
            head = struct.pack(
                "!BBHHHBBH4s4s", 0x45, 0, 20 + len(piece), 99, word, 64, 17, 0,
                socket.inet_aton(plan.CLIENT4), socket.inet_aton(plan.SITE4),
            )  # fmt: skip
            sock.sendto(head + piece, (plan.SITE4, 0))
    assert wait_until(lambda: any_ztun.status()["drops"].get("ip-fragment-overlap", 0) == before + 2)
