"""`python -m bench.warm`: how long a new connection's first answer takes, with and without connections kept ready.

The proxy is microsocks behind a forwarder that holds everything for 10 ms in either direction, as a proxy 20 ms away
would. (The handshake of TCP itself is not held, so what `pool.warmup` saves in earnest is a round trip more.)
"""

from __future__ import annotations

import asyncio
import signal
import socket
import statistics
import sys
import time

from bench.measure import ROOT
from ztun.lab import Lab, plan
from ztun.lab.namespace import wait_until

PORT = 1090
DELAY = 0.010  # seconds, each way
REQUESTS = 60
PAUSE = 0.03  # seconds between two requests: a person's browser, not a load test


async def forward() -> None:
    """The forwarder; runs until it is killed."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(65536):
            loop.call_later(DELAY, writer.write, data)
        await asyncio.sleep(2 * DELAY)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", plan.SOCKS_PORT)
        await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer), return_exceptions=True)

    server = await asyncio.start_server(serve, plan.UPSTREAM4, PORT)
    await server.serve_forever()


def first_answer(lab: Lab) -> float:
    """Seconds from the SYN to the first byte of the answer."""
    began = time.perf_counter()
    with lab.client.connect(plan.SITE4, plan.HTTP_PORT) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\nHost: site.test\r\n\r\n")
        sock.recv(1, socket.MSG_WAITALL)
        return time.perf_counter() - began


def measure(lab: Lab, warmup: int) -> float:
    """The median over REQUESTS, in ms."""
    instance = lab.ztun(
        {
            "outbounds": [{"tag": "far", "type": "socks5", "server": f"{plan.UPSTREAM4}:{PORT}"}],
            "route": {"rules": [{"ip_cidr": [plan.SITE4], "outbound": "far"}]},
            "pool": {"warmup": warmup},
        }
    )
    try:
        time.sleep(0.5)
        times = []
        for _ in range(REQUESTS):
            times.append(first_answer(lab))
            time.sleep(PAUSE)
        return statistics.median(times) * 1e3
    finally:
        instance.stop(signal.SIGTERM)


def main() -> None:
    with Lab() as lab:
        far = lab.spawn(lab.upstream, "far", sys.executable, "-m", "bench.warm", "forward", cwd=ROOT)
        try:
            if not wait_until(lambda: _listens(lab)):
                raise RuntimeError("the forwarder does not listen")
            rounds = [(measure(lab, 0), measure(lab, 4)) for _ in range(3)]
        finally:
            far.kill()
            far.wait()
    cold, warm = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"first answer, median of {REQUESTS}, 3 rounds by turns: {cold:.1f} ms without warm-up, {warm:.1f} ms with 4")


def _listens(lab: Lab) -> bool:
    with lab.upstream.socket() as probe:
        return probe.connect_ex((plan.UPSTREAM4, PORT)) == 0


if __name__ == "__main__":
    if sys.argv[1:] == ["forward"]:
        asyncio.run(forward())
    else:
        main()
