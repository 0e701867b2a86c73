"""UDP load that knows what arrived: 1200-byte datagrams one way, counts back over a TCP connection beside the subject.

The far end is what a SOCKS5 relay and the destination behind it would be together (`bench.sink` names it as the relay):
danted forwards 55,000 datagrams a second at most, less than what is to be measured. Datagrams that come bare were
forwarded plainly.

`python -m bench.datagrams serve` in upstream; `python -m bench.datagrams up|down SECONDS WINDOW` in the client prints
{"delivered": datagrams, "sent": datagrams, "seconds": s} as JSON. WINDOW bounds how many are under way, so that what is
measured is the rate that gets through and not who suffers most from a flood; 0 takes the bound away.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time

from ztun.lab import plan

CONTROL_PORT = 7100
DATA_PORT = 7101
SIZE = 1200
_REPORT_EVERY = 32  # datagrams
_BURST = 16  # datagrams between two looks at the clock
_LOST_AFTER = 0.02  # seconds without news: what is under way is lost
_COUNT = struct.Struct("!Q")
_FINAL = 1 << 63
_PATIENCE = 5.0  # seconds
_BUFFER = 4 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h


def send(sock: socket.socket, reports: Reports, seconds: float, window: int, header: bytes = b"") -> int:
    """Send for so long, at most `window` under way (0: as fast as it goes). Returns how many were sent."""
    payload = header + bytes(SIZE)
    end = time.monotonic() + seconds
    sent = settled = 0  # settled: arrived, or taken for lost
    while time.monotonic() < end:
        room = _BURST if not window else min(window - (sent - settled), _BURST)
        before = reports.count
        if room > 0:
            for _ in range(room):
                try:
                    sock.send(payload)
                except OSError:  # an ICMP error, or no room: it counts as lost
                    pass
            sent += room
            reports.read()
        elif not reports.wait(_LOST_AFTER):
            settled = sent
        settled = min(settled + reports.count - before, sent)
    return sent


class Reports:
    """The receiver's running count, read from the control connection. The last one carries a flag."""

    def __init__(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._rest = b""
        self._final = False
        self.count = 0

    def wait(self, seconds: float) -> bool:
        return bool(self._poll.poll(seconds * 1000)) and self.read()

    def read(self) -> bool:
        """Take what is there. True when the count grew or became final."""
        if self._final:
            return False
        try:
            data = self._control.recv(65536)
        except BlockingIOError:
            return False
        if not data:
            raise RuntimeError("the receiver ended early")
        data = self._rest + data
        whole = len(data) // _COUNT.size * _COUNT.size
        self._rest = data[whole:]
        if whole:
            (count,) = _COUNT.unpack_from(data, whole - _COUNT.size)
            self._final = bool(count & _FINAL)
            self.count = count & ~_FINAL
        return whole > 0

    def finish(self) -> int:
        """The final count. Raises RuntimeError when it does not come."""
        while not self._final:
            if not self.wait(_PATIENCE) and not self._final:
                raise RuntimeError("the receiver does not answer")
        return self.count


def receive(sock: socket.socket, control: socket.socket, seconds: float, header: bytes = b"") -> int:
    """Count what arrives within `seconds`, and report. Returns the count."""
    size = len(header) + SIZE
    end = time.monotonic() + seconds
    buffer = bytearray(65536)
    sock.setblocking(False)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    count = reported = 0
    recv_into = sock.recv_into
    while time.monotonic() < end:
        try:
            for _ in range(_REPORT_EVERY):
                count += recv_into(buffer) == size
        except BlockingIOError:
            if count == reported:
                poll.poll(max((end - time.monotonic()) * 1000, 0))
                continue
        except OSError:
            continue  # an ICMP error of an earlier run
        if count > reported:
            control.sendall(_COUNT.pack(count))
            reported = count
    control.sendall(_COUNT.pack(count | _FINAL))
    return count


def _data_socket() -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
    return sock


def serve() -> None:
    """One run at a time, for ever."""
    listener = socket.create_server((plan.UPSTREAM4, CONTROL_PORT))
    while True:
        control, _ = listener.accept()
        with control, _data_socket() as plain, _data_socket() as relay:
            plain.bind((plan.SITE4, DATA_PORT))
            relay.bind((plan.UPSTREAM4, DATA_PORT))
            try:
                _serve_one(control, [plain, relay])
            except (OSError, ValueError, RuntimeError) as error:  # ValueError: the client went without a request
                print(f"run ended: {error}", file=sys.stderr, flush=True)


def _serve_one(control: socket.socket, sockets: list[socket.socket]) -> None:
    control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    control.sendall(b"ready\n")
    request = json.loads(control.makefile("r").readline())
    sock, header, peer = _await_hello(sockets, request["hello"].encode())
    sock.connect(peer)  # what comes from elsewhere is of an earlier run
    control.sendall(b"found\n")
    if request["direction"] == "up":
        receive(sock, control, request["seconds"], header)
    else:
        sock.setblocking(True)
        reports = Reports(control)
        sent = send(sock, reports, request["seconds"], request["window"], header)
        reports.finish()
        control.setblocking(True)
        control.sendall(json.dumps({"sent": sent}).encode() + b"\n")


def _await_hello(sockets: list[socket.socket], hello: bytes) -> tuple[socket.socket, bytes, tuple[str, int]]:
    """The socket that this run's first datagram comes to, its header of RFC 1928 section 7 (empty where no proxy is
    between), and where it comes from. What is left of an earlier run is not taken for it."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        for sock in select.select(sockets, [], [], 0.1)[0]:
            data, peer = sock.recvfrom(65536)
            if data.endswith(hello):
                return sock, data[: -len(hello)], peer
    raise RuntimeError("no datagram came")


def run(direction: str, seconds: float, window: int) -> dict[str, float]:
    """The client's side of one run. Raises RuntimeError when no datagram passes."""
    with socket.create_connection((plan.UPSTREAM4, CONTROL_PORT), 5) as control, _data_socket() as sock:
        control.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = control.makefile("rb", buffering=0)
        lines.readline()
        hello = f"hello {os.getpid()} {time.monotonic_ns()}"
        request = {"direction": direction, "seconds": seconds, "window": window, "hello": hello}
        control.sendall(json.dumps(request).encode() + b"\n")
        sock.connect((plan.SITE4, DATA_PORT))
        _find(sock, control, hello.encode())
        lines.readline()
        if direction == "down":
            delivered = receive(sock, control, seconds)
            return {"delivered": delivered, "sent": json.loads(lines.readline())["sent"], "seconds": seconds}
        reports = Reports(control)
        sent = send(sock, reports, seconds, window)
        return {"delivered": reports.finish(), "sent": sent, "seconds": seconds}


def _find(sock: socket.socket, control: socket.socket, hello: bytes) -> None:
    """Small datagrams until the server has seen one: the subject opens its association meanwhile."""
    for _ in range(25):
        sock.send(hello)
        if select.select([control], [], [], 0.2)[0]:
            return
    raise RuntimeError("no datagram arrives: this subject does not carry UDP")


def main() -> None:
    if sys.argv[1] == "serve":
        serve()
    else:
        try:
            print(json.dumps(run(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))
        except (RuntimeError, OSError) as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
