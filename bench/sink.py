"""A SOCKS5 server that plays the destinations too: `python -m bench.sink PORT` grants every CONNECT, then echoes; it
grants every UDP ASSOCIATE and names `bench.datagrams` as the relay.

For 10,000 idle flows: danted has a bound on its clients and microsocks a thread for each, and both would want a second
socket per flow. This one is epoll and a dictionary.
"""

from __future__ import annotations

import select
import socket
import sys

from bench.datagrams import DATA_PORT
from ztun.lab import plan

PORT = 1090
_GRANTED = bytes([5, 0, 0, 1]) + socket.inet_aton(plan.UPSTREAM4) + DATA_PORT.to_bytes(2, "big")
_REQUEST_SIZES = {1: 10, 4: 22}


class Client:
    """One connection: greeting, request, then bytes back."""

    __slots__ = ("rest", "sock", "state")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.state = 0  # messages of the dialogue seen
        self.rest = b""

    def receive(self, data: bytes) -> None:
        data = self.rest + data
        self.rest = b""
        while data and self.state < 2:
            size = _message_size(self.state, data)
            if size is None or len(data) < size:
                self.rest = data
                return
            self.sock.send(b"\x05\x00" if self.state == 0 else _GRANTED)
            self.state += 1
            data = data[size:]
        if data:
            self.sock.send(data)


def _message_size(state: int, data: bytes) -> int | None:
    if len(data) < 5:
        return 2 + data[1] if state == 0 and len(data) >= 2 else None
    if state == 0:
        return 2 + data[1]
    return 4 + 1 + data[4] + 2 if data[3] == 3 else _REQUEST_SIZES[data[3]]


def main() -> None:
    listener = socket.create_server((plan.UPSTREAM4, int(sys.argv[1])), backlog=4096)
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    clients: dict[int, Client] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                _accept(listener, poll, clients)
                continue
            try:
                data = clients[fd].sock.recv(65536)
                clients[fd].receive(data)
            except OSError:
                data = b""
            if not data:
                clients.pop(fd).sock.close()


def _accept(listener: socket.socket, poll: select.epoll, clients: dict[int, Client]) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        clients[sock.fileno()] = Client(sock)
        poll.register(sock, select.EPOLLIN)


if __name__ == "__main__":
    main()
