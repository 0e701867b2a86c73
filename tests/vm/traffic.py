"""What the client does, in the words of the tests."""

from __future__ import annotations

import json
from typing import Any

from vm.guest import Guest
from ztun.lab import plan

PROXY = {plan.UPSTREAM4, plan.UPSTREAM6}
ITSELF = {plan.CLIENT4, plan.CLIENT6}
UNANSWERED, REFUSED = 28, 7  # curl(1), exit codes

_UDP = """
import socket, sys
host, port, payload = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.connect((host, port))
    for _ in range(3):
        sock.send(payload)
        try:
            print(sock.recv(65535).decode())
            break
        except TimeoutError:
            pass
"""
_DIGEST = """
import hashlib, os, socket, sys
data = os.urandom(int(sys.argv[3]))
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=100) as sock:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: sock.recv(4096), b"")).decode().strip()
print(answer == f"{len(data)} {hashlib.sha256(data).hexdigest()}")
"""


def page(client: Guest, url: str, *options: str) -> dict[str, Any]:
    """The page every site of the lab shows: {"client": who the server saw, "host": …, "server": …}."""
    shown: dict[str, Any] = json.loads(curl(client, url, *options))
    return shown


def seen(client: Guest, url: str, *options: str) -> str | None:
    """Who the server saw, None when the page did not come."""
    done = client.run(f"curl -sS --max-time 20 {' '.join(options)} '{url}'", check=False)
    return str(json.loads(done.stdout)["client"]) if done.returncode == 0 else None


def curl(client: Guest, url: str, *options: str) -> str:
    return client.read(f"curl -sS --max-time 60 {' '.join(options)} '{url}'")


def dig(client: Guest, *words: str) -> str:
    return client.read(f"dig +short +tries=2 +time=10 {' '.join(words)}")


def ask_udp(client: Guest, host: str, port: int, payload: str = "?") -> str:
    """Send a datagram; the answer."""
    return client.python(_UDP, host, str(port), payload)


def uploads_whole(client: Guest, host: str, size: int) -> bool:
    """Send random bytes and FIN; whether the server got them all and says so over the half that is still open."""
    return client.python(_DIGEST, host, str(plan.DIGEST_PORT), str(size)) == "True"


def ping(client: Guest, address: str, *options: str) -> bool:
    return client.run(f"ping -c1 -W10 {' '.join(options)} {address}", check=False).returncode == 0
