"""Small servers for what nginx cannot play: protocols where the server speaks first, resets, half-closes, datagrams.

`python -m ztun.lab.peers JOURNAL` serves on all addresses until it is killed. What a client cannot see from its side
is appended to JOURNAL, one JSON object a line: {"port", "peer": address, "event": "eof" | "reset", "received": bytes}.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable

from ztun.lab import plan

_CHUNK = 1 << 20
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER with time 0

Handler = Callable[[socket.socket], int]


def echo(conn: socket.socket) -> int:
    """Every byte back, and the FIN too."""
    received = 0
    while data := conn.recv(_CHUNK):
        received += len(data)
        conn.sendall(data)
    return received


def banner(conn: socket.socket) -> int:
    """The server speaks first, as in SMTP and SSH."""
    conn.sendall(b"220 lab ready\r\n")
    return echo(conn)


def client_first(conn: socket.socket) -> int:
    """Silent until a line came, as in HTTP."""
    line = conn.makefile("rb").readline()
    conn.sendall(b"you said " + line)
    return len(line)


def digest(conn: socket.socket) -> int:
    """Reads to the FIN, then answers over the half that is still open."""
    received, sha256, buffer = 0, hashlib.sha256(), bytearray(_CHUNK)
    while count := conn.recv_into(buffer):
        received += count
        sha256.update(memoryview(buffer)[:count])
    conn.sendall(f"{received} {sha256.hexdigest()}\n".encode())
    return received


def reset(conn: socket.socket) -> int:
    """One line, then RST."""
    line = conn.makefile("rb").readline()
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    return len(line)


def fin_first(conn: socket.socket) -> int:
    """Says what it has to say, half-closes, and reads on."""
    conn.sendall(b"that is all\n")
    conn.shutdown(socket.SHUT_WR)
    received = 0
    while data := conn.recv(_CHUNK):
        received += len(data)
    return received


class Journal:
    """Appends events to a file, a line at a time (O_APPEND keeps lines whole)."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, port: int, peer: str, event: str, received: int) -> None:
        line = {"port": port, "peer": peer, "event": event, "received": received}
        os.write(self._fd, json.dumps(line).encode() + b"\n")


def serve_tcp(port: int, handler: Handler, journal: Journal) -> None:
    listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)

    def serve_one(conn: socket.socket, peer: str) -> None:
        event, received = "eof", 0
        with conn:
            try:
                received = handler(conn)
            except OSError as error:
                event = "reset" if isinstance(error, ConnectionResetError) else str(error)
        journal.write(port, peer, event, received)

    while True:
        conn, address = listener.accept()
        threading.Thread(target=serve_one, args=(conn, _plain(address[0])), daemon=True).start()


def serve_udp(port: int, address: str, whoami: bool) -> None:
    """Bound to one address, so that answers come from the address that was asked."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind((address, port))
    while True:
        data, sender = sock.recvfrom(65535)
        try:
            sock.sendto(f"{sender[0]} {sender[1]}".encode() if whoami else data, sender)
        except OSError:
            pass  # an ICMP error of an earlier answer; a server goes on


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def main() -> None:
    journal = Journal(sys.argv[1])
    handlers: dict[int, Handler] = {
        plan.ECHO_PORT: echo,
        plan.BANNER_PORT: banner,
        plan.CLIENT_FIRST_PORT: client_first,
        plan.DIGEST_PORT: digest,
        plan.RESET_PORT: reset,
        plan.FIN_FIRST_PORT: fin_first,
    }
    threads = [threading.Thread(target=serve_tcp, args=(port, handler, journal)) for port, handler in handlers.items()]
    for address in (plan.UPSTREAM4, plan.UPSTREAM6, *plan.INTERNET4, *plan.INTERNET6):
        threads.append(threading.Thread(target=serve_udp, args=(plan.ECHO_PORT, address, False)))
        threads.append(threading.Thread(target=serve_udp, args=(plan.WHOAMI_PORT, address, True)))
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main()
