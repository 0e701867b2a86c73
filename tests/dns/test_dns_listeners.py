"""The sockets on dns.listen: streams with many queries, limits, and addresses that are not to be had."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
from dns_support import Bench, Dnsmasq, ScriptedServer, free_port, good_answer, told
from dnslib import DNSRecord

from ztun.errors import ZtunError

MakeBench = Callable[..., Bench]


async def connect(bench: Bench) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", bench.port)


def framed(name: str, kind: str = "A") -> bytes:
    query = DNSRecord.question(name, kind).pack()
    return len(query).to_bytes(2) + bytes(query)


async def next_reply(reader: asyncio.StreamReader) -> DNSRecord:
    length = int.from_bytes(await reader.readexactly(2))
    return DNSRecord.parse(await reader.readexactly(length))


async def test_queries_in_one_stream_are_answered_as_they_are_ready(make_bench: MakeBench) -> None:
    async with ScriptedServer(lambda query, _tcp: [good_answer(query)], delay=0.1) as server:
        bench = make_bench([server.url])
        await bench.listen()
        reader, writer = await connect(bench)
        writer.write(framed("slow.direct.example") + framed("quick.example") + framed("quick.example", "AAAA"))
        writer.write_eof()
        names = [str((await next_reply(reader)).q.qname) for _ in range(3)]
        assert names == ["quick.example.", "quick.example.", "slow.direct.example."]
        assert await reader.read() == b""
        writer.close()


async def test_stream_may_come_octet_by_octet(bench: Bench) -> None:
    await bench.listen()
    reader, writer = await connect(bench)
    for octet in framed("www.example"):
        writer.write(bytes([octet]))
        await writer.drain()
        await asyncio.sleep(0)
    assert told(await next_reply(reader)) == ["198.18.0.2"]
    writer.close()


async def test_many_queries_in_one_stream(bench: Bench) -> None:
    await bench.listen()
    reader, writer = await connect(bench)
    count = 500
    writer.write(b"".join(framed(f"n{number % 50}.example") for number in range(count)))
    writer.write_eof()
    assert len([await next_reply(reader) for _ in range(count)]) == count
    assert bench.pool.statistics()["assigned"] == 50
    writer.close()


async def test_one_stream_cannot_have_endless_queries_under_way(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztun.gateway.dns.listeners._MAX_PIPELINED", 4)
    async with ScriptedServer(lambda query, _tcp: [good_answer(query)], delay=0.1) as server:
        bench = make_bench([server.url])
        await bench.listen()
        reader, writer = await connect(bench)
        writer.write(b"".join(framed(f"n{number}.direct.example") for number in range(10)))
        await asyncio.sleep(0.05)
        assert len(server.queries) == 4
        assert len([await next_reply(reader) for _ in range(10)]) == 10
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"\x00", b"\x00\x20half"])
async def test_idle_stream_is_closed(bench: Bench, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr("ztun.gateway.dns.listeners._STREAM_IDLE_S", 0.1)
    await bench.listen()
    reader, writer = await connect(bench)
    writer.write(framed("www.example") + sent)
    await next_reply(reader)
    try:
        assert await asyncio.wait_for(reader.read(), 2) == b""
    except ConnectionResetError:
        pass
    writer.close()


async def test_stream_is_not_idle_while_an_answer_is_awaited(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ztun.gateway.dns.listeners._STREAM_IDLE_S", 0.1)
    async with ScriptedServer(lambda query, _tcp: [good_answer(query)], delay=0.4) as server:
        bench = make_bench([server.url])
        await bench.listen()
        reader, writer = await connect(bench)
        writer.write(framed("www.direct.example"))
        assert told(await next_reply(reader)) == ["192.0.2.1"]
        writer.write(framed("www.example"))
        assert told(await next_reply(reader)) == ["198.18.0.2"]
        writer.close()


async def test_streams_are_bounded_in_number(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztun.gateway.dns.listeners._MAX_STREAMS", 2)
    await bench.listen()
    kept = [await connect(bench) for _ in range(2)]
    reader, writer = await connect(bench)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
    for reader, writer in kept:
        writer.write(framed("www.example"))
        assert told(await next_reply(reader)) == ["198.18.0.2"]
        writer.close()
    await asyncio.sleep(0.05)
    reader, writer = await connect(bench)
    writer.write(framed("www.example"))
    assert told(await next_reply(reader)) == ["198.18.0.2"]
    writer.close()
    assert bench.counters["overload_streams"] == 1


async def test_stream_with_something_else_in_it_is_cut(bench: Bench) -> None:
    await bench.listen()
    reader, writer = await connect(bench)
    writer.write(b"\x00\x05GET / HTTP/1.1\r\n\r\n")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    assert bench.counters["malformed_short"] == 1
    writer.close()


async def test_reply_comes_from_the_address_that_was_asked(bench: Bench) -> None:
    # dig does not take a reply from anywhere else. Without IP_PKTINFO it would come from 127.0.0.1 (or the LAN's).
    bench.port = free_port()
    await bench.service.start([f"0.0.0.0:{bench.port}", f"[::]:{bench.port}"])
    for server in ("127.0.0.2", "127.9.9.9", "::1"):
        assert "198.18.0.2" in await bench.dig("+notcp", "www.example", server=server)
        assert "198.18.0.2" in await bench.dig("+tcp", "www.example", server=server)


async def test_oversized_datagram_is_refused(bench: Bench) -> None:
    await bench.listen()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(("127.0.0.1", bench.port))
        sock.send(DNSRecord.question("www.example").pack() + bytes(8000))
        reply = DNSRecord.parse(await asyncio.get_running_loop().sock_recv(sock, 4096))
    assert reply.header.rcode == 1
    assert bench.counters["malformed_too_long"] == 1


async def test_after_closing_the_address_is_free_again(make_bench: MakeBench, dnsmasq: Dnsmasq) -> None:
    first = make_bench([dnsmasq.url])
    await first.listen()
    _reader, writer = await connect(first)
    await first.service.close()
    second = make_bench([dnsmasq.url])
    second.port = first.port
    await second.service.start([f"127.0.0.1:{first.port}"])
    assert await second.dig_short("www.example") == ["198.18.0.2"]
    writer.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_taken_port_is_named_and_nothing_stays_open(bench: Bench, kind: int) -> None:
    free = free_port()
    with socket.socket(socket.AF_INET, kind) as other:
        other.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(
            ZtunError, match=rf"^dns.listen\[1\]: 127.0.0.1:{taken} is taken by another program.*stop it"
        ):
            await bench.service.start([f"127.0.0.1:{free}", f"127.0.0.1:{taken}"])
    await bench.service.start([f"127.0.0.1:{free}", f"127.0.0.1:{taken}"])


async def test_address_of_no_interface_is_named(bench: Bench) -> None:
    with pytest.raises(ZtunError, match=r"^dns.listen\[0\]: 192.0.2.1 is on no interface of this host; choose"):
        await bench.service.start(["192.0.2.1:5300"])


UNPRIVILEGED = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from dns_support import Bench
from ztun.errors import ZtunError
try:
    asyncio.run(Bench(["udp://127.0.0.1"]).service.start(["127.0.0.1:53"]))
except ZtunError as error:
    print(error)
"""


def test_port_without_permission_is_named() -> None:
    here = __file__.rpartition("/")[0]
    # It may read everything, since the repository may lie below /root; the rest of root's power is gone.
    power = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *power]
    command = [*nobody, sys.executable, "-c", UNPRIVILEGED, here]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == (
        "dns.listen[0]: not permitted to use port 53; run as root or with CAP_NET_BIND_SERVICE, or choose a port from"
        " 1024\n"
    ), done.stderr
