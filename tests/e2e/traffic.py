"""What clients do, in the words of the tests."""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
from typing import Any

from ztun.lab import Lab, Namespace, Ztun
from ztun.lab.namespace import run

_CHUNK = 1 << 20
_LINGER_RESET = struct.pack("ii", 1, 0)


def start(lab: Lab, config: dict[str, Any]) -> Ztun:
    """A gateway on `config`, in the place of any that runs in this lab. It ends with the lab, or by the next start."""
    lab.stop()
    return lab.ztun(config)


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the other side's FIN."""
    parts = []
    while data := sock.recv(_CHUNK):
        parts.append(data)
    return b"".join(parts)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    parts, missing = [], size
    while missing and (data := sock.recv(min(missing, _CHUNK))):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def upload(sock: socket.socket, megabytes: int) -> tuple[str, str]:
    """Send random bytes to the digest server, then FIN: (the line it answers, the line it should answer)."""
    sha256 = hashlib.sha256()
    block = os.urandom(_CHUNK)
    for number in range(megabytes):
        chunk = number.to_bytes(8, "big") + block[8:]  # no two alike: a swap would show
        sha256.update(chunk)
        sock.sendall(chunk)
    sock.shutdown(socket.SHUT_WR)
    return read_all(sock).decode().strip(), f"{megabytes * _CHUNK} {sha256.hexdigest()}"


def download(sock: socket.socket, path: str, host: str) -> tuple[int, str]:
    """GET it: (bytes of the body, their SHA-256)."""
    sock.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
    head = b""
    while b"\r\n\r\n" not in head:
        data = sock.recv(4096)
        assert data, f"the connection ended within the header: {head!r}"
        head += data
    head, body = head.split(b"\r\n\r\n", 1)
    assert head.split()[1] == b"200", head
    size, sha256, buffer = len(body), hashlib.sha256(body), bytearray(_CHUNK)
    while count := sock.recv_into(buffer):
        size += count
        sha256.update(memoryview(buffer)[:count])
    return size, sha256.hexdigest()


def echo_flow(sock: socket.socket, size: int) -> bool:
    """Send random bytes to the echo server while reading them back; whether they came back whole, and then FIN."""
    data = os.urandom(size)

    def send() -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    back = read_all(sock)
    sender.join()
    return back == data


def reset(sock: socket.socket) -> None:
    """Close with RST (SO_LINGER with time 0)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
    sock.close()


def ask_udp(namespace: Namespace, host: str, port: int, payload: bytes, *, timeout: float = 2, tries: int = 3) -> bytes:
    """Send a datagram and wait for the answer, a few times. Raises OSError as the last try did."""
    with namespace.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect((host, port))
        for attempt in range(tries):
            sock.send(payload)
            try:
                return sock.recv(65535)
            except TimeoutError:
                if attempt == tries - 1:
                    raise
    raise AssertionError("not reached")


def bpf_exists(kind: str, number: int) -> bool:
    """Whether the kernel still has a BPF "prog", "map" or "link" of that id."""
    return run(["bpftool", kind, "show", "id", str(number)], check=False).returncode == 0
