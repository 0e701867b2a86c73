"""Urgent data (RFC 6093) is data: it arrives in its place, and what comes behind it arrives too."""

from __future__ import annotations

import socket

from e2e.conftest import OUTBOUNDS, SITE
from e2e.traffic import read_all, read_exactly, start
from ztun.lab import Lab, plan

PORT = 7777
RULES = [
    {"ip_cidr": SITE, "port": [PORT], "protocol": "tcp", "outbound": "direct"},
    {"ip_cidr": ["203.0.113.0/24", "2001:db8::/48"], "outbound": "socks-udp"},
]


def test_urgent_bytes_of_a_server_arrive_in_line(lab: Lab) -> None:
    start(lab, {"route": {"rules": RULES}, "outbounds": OUTBOUNDS, "timeouts": {"dial": 3, "drain": 0.2}})
    with lab.upstream.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((plan.SITE4, PORT))
        listener.listen()
        listener.settimeout(5)
        with lab.client.connect(plan.SITE4, PORT) as client:
            client.settimeout(5)
            server, _ = listener.accept()
            with server:
                server.send(b"before")
                assert read_exactly(client, 6) == b"before"
                for round_number in range(20):
                    server.send(b"a" * 100)
                    server.send(b"!", socket.MSG_OOB)
                    server.send(b"b" * 100)
                    assert read_exactly(client, 201) == b"a" * 100 + b"!" + b"b" * 100, round_number
                server.shutdown(socket.SHUT_WR)
                assert read_all(client) == b""
