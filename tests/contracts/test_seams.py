"""What every implementation of a seam in ztun/ports.py promises: Linux's own, and macOS's on a stand-in for macOS that
was written from XNU's headers and manuals (tests/darwin/stand_in.py). No Mac was there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import pytest

from contracts.systems import SYSTEMS
from contracts.worlds import Host
from ztun.errors import ZtunError
from ztun.lab.namespace import wait_until
from ztun.lab.snapshot import differences, snapshot
from ztun.ports import RULE_DEFAULT, NetworkEvent, Prefix, Verdict
from ztun.wire import checksum, ip, tcp, vnet

NOBODY4, NOBODY6 = "198.18.7.7", "2001:2::7:7"


@pytest.fixture(params=SYSTEMS)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The host; the test runs in its namespace."""
    made = Host(request.param)
    try:
        made.create()
        with made.near.entered():
            yield made
    finally:
        made.delete()


@contextlib.contextmanager
def device_up(host: Host) -> Iterator[Any]:
    device = host.open_device()
    routes = host.make_routes(device.name)
    try:
        routes.up()
        yield device
    finally:
        routes.down()
        device.close()


def packed(address: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)


# PacketDevice.


def read(device: Any, wanted: Callable[[bytes], bool]) -> tuple[tuple[int, ...], bytes]:
    """(virtio_net_hdr, IP packet) of the first packet that is wanted."""
    buffer = bytearray(70000)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        select.select([device], [], [], 0.2)
        length = device.recv_into(buffer)
        if length and wanted(bytes(buffer[vnet.LENGTH : length])):
            return vnet.unpack(buffer), bytes(buffer[vnet.LENGTH : length])
    raise AssertionError("no such packet came")


@pytest.mark.parametrize("address", [NOBODY4, NOBODY6])
def test_device_brings_a_packet_behind_a_virtio_header(host: Host, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with device_up(host) as device, socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", (address, 9))
        flags, packet = (found := read(device, lambda data: data.endswith(b"hello")))[0][0], found[1]
        head = ip.parse(memoryview(packet), 0)
        assert head.destination == packed(address)
        total = checksum.pseudo_sum(head.source + head.destination, ip.UDP, head.end - head.payload)
        assert flags & vnet.NEEDS_CSUM or checksum.is_valid(packet[head.payload :], total)
        while device.recv_into(bytearray(70000)):
            pass
        assert device.recv_into(bytearray(70000)) == 0


@pytest.mark.parametrize(("peer", "own"), [(NOBODY4, "198.18.0.1"), (NOBODY6, "2001:2::1")])
@pytest.mark.parametrize("size", [0, 5, 1001])
def test_device_completes_what_is_left_to_it(host: Host, peer: str, own: str, size: int) -> None:
    """A datagram whose checksum is not complete, and a run of three that is to be cut (GSO_UDP_L4)."""
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    payload = bytes(number % 251 for number in range(size))
    with device_up(host) as device, socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((own, 0))
        sock.settimeout(1)
        assert deliver(device, udp(peer, own, sock.getsockname()[1], [payload]), sock, 1) == [payload]
        if size:
            run = [payload, payload, payload[:3]]
            assert deliver(device, udp(peer, own, sock.getsockname()[1], run), sock, 3) == run


def deliver(device: Any, packet: Sequence[bytes], sock: socket.socket, count: int) -> list[bytes]:
    """Write it, again when the kernel was not ready for it yet, until so many datagrams came out."""
    for _ in range(10):
        assert device.send(packet)
        with contextlib.suppress(TimeoutError):
            return [sock.recv(2000) for _ in range(count)]
    raise AssertionError("nothing came out")


def udp(source: str, destination: str, port: int, payloads: Sequence[bytes]) -> list[bytes]:
    """Datagrams of one size as the stack hands them to a device: headers, payload."""
    whole = b"".join(payloads)
    network = ip.header(packed(source), packed(destination), ip.UDP, 8 + len(whole))
    pseudo = checksum.pseudo_sum(packed(source) + packed(destination), ip.UDP, 8 + len(whole))
    kind, size = (vnet.GSO_UDP_L4, len(payloads[0])) if len(payloads) > 1 else (vnet.GSO_NONE, 0)
    front = vnet.pack(vnet.NEEDS_CSUM, kind, len(network) + 8, size, len(network), 6)
    return [front + network + struct.pack("!HHHH", 4321, port, 8 + len(whole), pseudo), whole]


@pytest.mark.parametrize(("peer", "own"), [(NOBODY4, "198.18.0.1"), (NOBODY6, "2001:2::1")])
def test_device_takes_a_super_segment(host: Host, peer: str, own: str) -> None:
    """A handshake by hand, then 20,000 bytes in one call, which a real TCP of the kernel receives."""
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    data = os.urandom(20_000)
    with device_up(host) as device, socket.create_server((own, 0), family=family) as listener:
        port = listener.getsockname()[1]
        device.send(segment(peer, own, port, 999, 0, tcp.SYN, options=b"\x02\x04\x05\x78"))
        _, answer = read(device, lambda data: is_tcp_from(data, port))
        seq = struct.unpack_from("!I", answer, (20 if ":" not in own else 40) + 4)[0]
        device.send(segment(peer, own, port, 1000, seq + 1, tcp.ACK))
        conn, _ = listener.accept()
        with conn:
            conn.settimeout(10)
            assert device.send(segment(peer, own, port, 1000, seq + 1, tcp.ACK | tcp.PSH, data, gso=1400))
            device.send(segment(peer, own, port, 21_000, seq + 1, tcp.ACK | tcp.FIN))
            assert b"".join(iter(lambda: conn.recv(65536), b"")) == data


def is_tcp_from(data: bytes, port: int) -> bool:
    head = ip.parse(memoryview(data), 0)
    return head.protocol == ip.TCP and struct.unpack_from("!H", data, head.payload)[0] == port


def segment(
    source: str, destination: str, port: int, seq: int, ack: int, flags: int, payload: bytes = b"", gso: int = 0,
    options: bytes = b"",
) -> list[bytes]:  # fmt: skip
    length = 20 + len(options) + len(payload)
    network = ip.header(packed(source), packed(destination), ip.TCP, length)
    pseudo = checksum.pseudo_sum(packed(source) + packed(destination), ip.TCP, length)
    offset = (20 + len(options)) // 4 << 4
    header = struct.pack("!HHIIBBHHH", 4321, port, seq, ack, offset, flags, 65535, pseudo, 0) + options
    kind = 0 if not gso else vnet.GSO_TCPV6 if ":" in source else vnet.GSO_TCPV4
    front = vnet.pack(vnet.NEEDS_CSUM, kind, len(network) + len(header), gso, len(network), 16)
    return [front + network + header, payload]


def test_device_whose_name_is_taken(host: Host) -> None:
    device = host.open_device()
    try:
        with pytest.raises(ZtunError) as refused:
            host.open_device()
        assert f"{device.name} exists already" in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "tun.name" in str(refused.value)
    finally:
        device.close()
        device.close()


def test_device_that_is_gone_says_so_and_is_made_again(host: Host) -> None:
    device = host.open_device()
    number = device.fileno()
    try:
        remove(host, device.name)
        assert wait_until(lambda: device.name not in host.near.run("ip", "link").stdout)
        with pytest.raises(OSError):  # noqa: PT012 (the kernel may need a moment)
            for _ in range(100):
                device.recv_into(bytearray(70000))
                time.sleep(0.05)
        device.reopen()
        assert device.fileno() == number
        assert device.name in host.near.run("ip", "link").stdout
        assert device.recv_into(bytearray(70000)) == 0
    finally:
        device.close()


def remove(host: Host, name: str) -> None:
    if name in host.calls.bridges:
        host.calls.bridges[name].remove()
    else:
        host.near.ip(f"link del {name}")


# Routes.


def test_routes_come_and_go(host: Host) -> None:
    before = snapshot(host.near)
    device = host.open_device()
    routes = host.make_routes(device.name, ["198.18.0.0/15", "2001:2::/48", "192.0.2.0/24"])
    assert (routes.snapshot()["routes"], routes.snapshot()["ip_rules"]) == ([], [])
    for _ in range(2):
        routes.up()
        assert {"192.0.2.0/24", "198.18.0.0/15"} <= {one["destination"] for one in routes.snapshot()["routes"]}
    assert {one["device"] for one in routes.snapshot()["routes"]} == {device.name}
    for address in ("198.18.200.1", "192.0.2.1", "2001:2::99"):
        assert f"dev {device.name}" in host.near.run("ip", "route", "get", address).stdout
    host.near.ip("route del 192.0.2.0/24")
    routes.restore()
    assert f"dev {device.name}" in host.near.run("ip", "route", "get", "192.0.2.1").stdout
    for _ in range(2):
        routes.down()
    assert (routes.snapshot()["routes"], routes.snapshot()["ip_rules"]) == ([], [])
    assert device.name not in host.near.run("ip", "-4", "route").stdout
    device.close()
    assert wait_until(lambda: differences(before, snapshot(host.near)) == [])


def test_routes_of_a_device_that_is_gone(host: Host) -> None:
    device = host.open_device()
    routes = host.make_routes(device.name)
    device.close()
    assert wait_until(lambda: device.name not in host.near.run("ip", "link").stdout)
    with pytest.raises(ZtunError) as refused:
        routes.up()
    assert device.name in str(refused.value)
    assert "\n" not in str(refused.value)
    routes.down()


# Classifier.

TABLE = [
    Prefix(packed("0.0.0.0"), 0, Verdict.DIRECT, RULE_DEFAULT),
    Prefix(packed("::"), 0, Verdict.DIRECT, RULE_DEFAULT),
    Prefix(packed("203.0.113.0"), 24, Verdict.TUNNEL, 0),
    Prefix(packed("2001:db8::"), 48, Verdict.DROP, 1),
]


async def test_classifier_tells_what_it_holds(host: Host) -> None:
    with device_up(host) as device:
        classifier = await host.make_classifier(device.name, own=[packed("10.7.1.1")])
        try:
            assert classifier.fallback_reason is None
            classifier.replace_rules(TABLE)
            classifier.learn(packed("192.0.2.7"), Verdict.TUNNEL, 0)
            assert classifier.captured() == {"a0": "absent"}
            for _ in range(2):
                classifier.attach()
                classifier.heartbeat()
            assert classifier.captured() == {"a0": "captured"}
            shown = json.loads(json.dumps(classifier.snapshot()))
            assert all({"name", "hook", "ifname", "id"} <= one.keys() for one in shown["programs"])
            maps = {one["name"]: one["entries"] for one in shown["maps"]}
            assert {"prefix": "203.0.113.0/24", "verdict": "tunnel", "rule": 0, "hits": 0} in maps["prefixes4"]
            assert {"prefix": "2001:db8::/48", "verdict": "drop", "rule": 1, "hits": 0} in maps["prefixes6"]
            assert maps["learned4"] == [{"address": "192.0.2.7", "verdict": "tunnel", "rule": 0, "hits": 0}]
            assert maps["own"] == [{"address": "10.7.1.1"}]
            assert {"rule", "packets", "bytes"} <= maps["rules"][0].keys()
            counters = classifier.counters()
            assert {"direct", "tunnel", "drop", "drop_rule", "pass_other"} <= counters.keys()
            assert counters["tunnel"] == {"packets": 0, "bytes": 0}
            classifier.replace_rules(TABLE[:2])
            classifier.forget()
            maps = {one["name"]: one["entries"] for one in classifier.snapshot()["maps"]}
            assert [len(maps[name]) for name in ("prefixes4", "prefixes6", "learned4")] == [1, 1, 0]
            assert classifier.origin(packed("10.7.1.1")) is None
        finally:
            for _ in range(2):
                classifier.close()


async def test_classifier_leaves_nothing_behind(host: Host) -> None:
    with device_up(host) as device:
        before = snapshot(host.near)
        classifier = await host.make_classifier(device.name)
        classifier.replace_rules(TABLE)
        classifier.attach()
        assert differences(before, snapshot(host.near)) != []
        classifier.close()
        assert differences(before, snapshot(host.near)) == []


# NetworkMonitor.


@contextlib.asynccontextmanager
async def following(host: Host) -> AsyncIterator[tuple[Any, list[NetworkEvent]]]:
    """A monitor that has read the state once, and the events that it tells from then on."""
    monitor = host.make_monitor()
    monitor.watch(lambda: ["9.9.9.9", "2620:fe::9", "10.7.2.2"])
    await monitor.read()
    told: list[NetworkEvent] = []

    async def follow() -> None:
        async for events in monitor.events(lambda: None):
            told.extend(events)

    task = asyncio.get_running_loop().create_task(follow())
    await asyncio.sleep(0)
    try:
        yield monitor, told
    finally:
        task.cancel()
        await asyncio.wait({task})
        monitor.close()


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.02)


async def test_monitor_reads_what_there_is(host: Host) -> None:
    async with following(host) as (monitor, _):
        state = monitor.state
        assert {"a0", "b0", "lo"} <= state.links.keys()
        assert state.links["a0"].enabled
        assert state.links["a0"].up
        assert state.links["a0"].ifindex == socket.if_nametoindex("a0")
        assert ("a0", packed("10.7.1.1"), 24) in state.addresses
        assert ("b0", packed("fd07:2::1"), 64) in state.addresses
        assert state.paths["9.9.9.9"] == ("a0", "10.7.1.1", "10.7.1.2", True)
        assert state.paths["2620:fe::9"] == ("a0", "fd07:1::1", "fd07:1::2", True)
        assert state.paths["10.7.2.2"] == ("b0", "10.7.2.1", None, True)
        assert {name: sorted(versions) for name, versions in state.exits.items()} == {"a0": [4, 6]}


async def test_monitor_tells_of_links_addresses_and_ways(host: Host) -> None:
    async with following(host) as (monitor, told):
        host.near.ip("link set b0 down")
        await until(lambda: NetworkEvent("link", "b0", False) in told)
        assert not monitor.state.links["b0"].enabled
        assert monitor.state.paths["10.7.2.2"] != ("b0", "10.7.2.1", None, True)
        host.near.ip("link set b0 up")
        await until(lambda: NetworkEvent("link", "b0", True) in told and monitor.state.links["b0"].up)
        host.near.ip("address add 10.7.2.9/24 dev b0")
        await until(lambda: ("b0", packed("10.7.2.9"), 24) in monitor.state.addresses)
        await until(lambda: NetworkEvent("address", "b0", True) in told)
        told.clear()
        host.near.ip("route replace default via 10.7.2.2")
        await until(lambda: NetworkEvent("route", "b0", True) in told)
        assert monitor.state.paths["9.9.9.9"][:3] == ("b0", "10.7.2.1", "10.7.2.2")
        host.near.ip("route del default")
        await until(lambda: monitor.state.paths["9.9.9.9"] is None)
        assert monitor.state.paths["2620:fe::9"] is not None
        assert all(monitor.counts[kind] for kind in ("link", "address", "route"))


async def test_monitor_resets_what_cannot_go_on_and_nothing_else(host: Host) -> None:
    """A connection by b0, whose address goes away; one by a0 stays."""
    loop = asyncio.get_running_loop()
    with host.far.socket() as listener:
        with host.far.entered():
            listener.bind(("0.0.0.0", 7))
            listener.listen()
        async with following(host) as (monitor, _):
            factory = host.make_sockets()
            stays, strays = factory(socket.AF_INET, socket.SOCK_STREAM), factory(socket.AF_INET, socket.SOCK_STREAM)
            with stays, strays:
                await loop.sock_connect(stays, ("10.7.1.2", 7))
                await loop.sock_connect(strays, ("10.7.2.2", 7))
                before = monitor.state
                host.near.ip("address del 10.7.2.1/24 dev b0")
                await until(lambda: monitor.state.paths["10.7.2.2"] != before.paths["10.7.2.2"])
                assert await monitor.reset_stranded(before, {"b0"}) == 1
                with pytest.raises(OSError):
                    strays.recv(1)
                with pytest.raises(BlockingIOError):
                    stays.recv(1)
                assert await monitor.reset_stranded(before, {"b0"}) == 0


# SocketFactory.


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_sockets_do_not_wait_and_are_not_inherited(host: Host, family: int, kind: int) -> None:
    with host.make_sockets()(family, kind) as sock:
        assert (sock.family, sock.type) == (family, kind)
        assert not sock.getblocking()
        assert not sock.get_inheritable()


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
async def test_sockets_reach_this_host_itself(host: Host, family: int, address: str) -> None:
    """A proxy on loopback is what `ssh -D` makes."""
    factory = host.make_sockets()
    with socket.create_server((address, 0), family=family) as listener:
        with factory(family, socket.SOCK_STREAM) as sock:
            await asyncio.get_running_loop().sock_connect(sock, listener.getsockname())
        with factory(family, socket.SOCK_DGRAM) as sock, socket.socket(family, socket.SOCK_DGRAM) as receiver:
            receiver.bind((address, 0))
            receiver.settimeout(5)
            sock.sendto(b"one", receiver.getsockname())
            sock.sendmsg([b"t", b"wo"], (), 0, receiver.getsockname())
            assert [receiver.recv(10), receiver.recv(10)] == [b"one", b"two"]


async def test_sockets_listen(host: Host) -> None:
    loop = asyncio.get_running_loop()
    with host.make_sockets()(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("10.7.1.1", 0))
        listener.listen()
        with host.far.socket() as client:
            client.setblocking(False)
            connecting = asyncio.ensure_future(loop.sock_connect(client, listener.getsockname()))
            conn, _ = await asyncio.wait_for(loop.sock_accept(listener), 5)
            await connecting
            with conn:
                conn.send(b"hello")
                assert await asyncio.wait_for(loop.sock_recv(client, 10), 5) == b"hello"
