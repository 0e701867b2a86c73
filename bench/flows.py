"""Many idle TCP flows: `python -m bench.flows N…` opens flows until there are N, says so, and goes on when told.

Each flow is used for one byte there and back, so that it exists from end to end. After each N a line of JSON:
{"flows": N, "seconds": time since the last line's answer}; an answer is any line on standard input.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

from ztun.lab import plan

_AT_ONCE = 64
_PATIENCE = 30.0  # seconds without any progress


def open_flows(count: int, poll: select.epoll) -> list[socket.socket]:
    """Open `count` flows, some at once. Raises RuntimeError when they are refused or get stuck."""
    opened: list[socket.socket] = []
    waiting: dict[int, socket.socket] = {}
    asked: set[int] = set()
    while len(opened) < count:
        while len(waiting) < _AT_ONCE and len(opened) + len(waiting) < count:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((plan.SITE4, plan.ECHO_PORT))
            waiting[sock.fileno()] = sock
            poll.register(sock, select.EPOLLOUT)
        events = poll.poll(_PATIENCE)
        if not events:
            raise RuntimeError(f"stuck at {len(opened)} flows")
        for fd, _ in events:
            sock = waiting[fd]
            try:
                if fd not in asked:
                    sock.send(b"x")
                    asked.add(fd)
                    poll.modify(sock, select.EPOLLIN)
                    continue
                if sock.recv(1) != b"x":
                    raise OSError("ended early")
            except OSError as error:
                raise RuntimeError(f"flow {len(opened) + 1}: {error}") from None
            poll.unregister(sock)
            asked.discard(fd)
            opened.append(waiting.pop(fd))
    return opened


def main() -> None:
    poll = select.epoll()
    flows: list[socket.socket] = []
    for wanted in map(int, sys.argv[1:]):
        started = time.monotonic()
        flows += open_flows(wanted - len(flows), poll)
        print(json.dumps({"flows": len(flows), "seconds": time.monotonic() - started}), flush=True)
        if not sys.stdin.readline():
            return


if __name__ == "__main__":
    main()
