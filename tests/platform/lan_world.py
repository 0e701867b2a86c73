"""A client, a gateway and a server in namespaces of their own, and packets made by hand."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ztun.lab.namespace import Namespace, wait_until
from ztun.platform.linux import layout, loader, offload, xdp
from ztun.platform.linux import make_classifier as make_classifier_async
from ztun.platform.linux.bpfcall import attributes
from ztun.platform.linux.bpfcall import bpf as bpf_call
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import MAPS, PROGRAMS, BpfClassifier
from ztun.platform.linux.hooks import TcxHook
from ztun.platform.linux.maps import Map, possible_cpus
from ztun.platform.linux.policy import RoutesClassifier
from ztun.platform.linux.routes import TunRoutes
from ztun.platform.linux.tun import TunDevice, open_tun
from ztun.ports import RULE_DEFAULT, Prefix, Verdict
from ztun.wire import checksum, ip, vnet

TUN = "ztun0"
MARK = 0x7A74
CLIENT4, CLIENT6 = "10.9.0.2", "fd00:9::2"
SERVER4, SERVER6 = "10.8.0.2", "fd00:8::2"
FAR4, FAR6 = "203.0.113.5", "2001:db8::5"  # exist nowhere
GATEWAY4 = "10.9.0.1"
PROG_TEST_RUN = 10

GO_ON, SHOT, REDIRECT = -1, 2, 7
ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def prefix(text: str, verdict: Verdict, rule: int) -> Prefix:
    network, _, length = text.partition("/")
    return Prefix(packed(network), int(length), verdict, rule)


EVERYTHING = [prefix("0.0.0.0/0", Verdict.TUNNEL, RULE_DEFAULT), prefix("::/0", Verdict.TUNNEL, RULE_DEFAULT)]
SERVERS_DIRECT = [prefix("10.0.0.0/8", Verdict.DIRECT, 0), prefix("fd00::/8", Verdict.DIRECT, 0)]


# Packets.


def packet(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    """An IP packet around `payload`, whose checksum is left alone."""
    return bytes(ip.header(packed(source), packed(destination), protocol, len(payload))) + payload


def udp(source: str, destination: str, port: int, payload: bytes = b"") -> bytes:
    return packet(
        source, destination, socket.IPPROTO_UDP, struct.pack("!HHHH", 4321, port, 8 + len(payload), 0) + payload
    )


def frame(data: bytes, ethertype: bytes | None = None) -> bytes:
    """An Ethernet frame to 00:00:00:00:00:00, which is the address of the device that BPF_PROG_TEST_RUN takes."""
    return bytes(12) + (ethertype or ETHERTYPE[data[0] >> 4]) + data


# Programs without an interface.


def load_now(
    directory: Path,
    programs: Iterable[str],
    maps: Mapping[str, tuple[int, int, str]],
    xdp: Mapping[str, str] = {},
    optional: Iterable[str] = (),
) -> loader.Objects:
    return asyncio.run(loader.load(directory, programs, maps, xdp, optional))


def make_classifier(*arguments: Any, **options: Any) -> Any:
    return asyncio.run(make_classifier_async(*arguments, **options))


@cache
def _objects() -> loader.Objects:
    """Compiled once for all tests."""
    maps = {**MAPS, **xdp.MAPS, **offload.MAPS}
    return load_now(layout.find_sources(), PROGRAMS, maps, {xdp.PROGRAM: xdp.label(TUN)}, offload.PROGRAMS)


class Bench:
    """The classifier loaded, and its programs run on packets by BPF_PROG_TEST_RUN (bpf(2)): no traffic needed."""

    def __init__(
        self, *, hijack_dns: bool = False, fail_closed: bool = False, own: Sequence[str] = (), host: bool = False
    ) -> None:
        capture = Capture("lo", (), MARK, hijack_dns, fail_closed, [packed(address) for address in own], host=host)
        self.objects = loader.Objects(*({name: os.dup(fd) for name, fd in part.items()} for part in _objects()[:2]))
        self._empty()
        self.classifier = BpfClassifier(self.objects, "tcx", TcxHook, capture)
        self.is_alive = True

    def _empty(self) -> None:
        for name, (key_size, value_size, kind) in {**MAPS, **xdp.MAPS}.items():
            size = value_size * possible_cpus() if kind.startswith("percpu") else value_size
            table = Map(self.objects.maps[name], key_size, size)
            keys = [key for key, _ in table.items()]
            if kind.endswith("array"):
                table.update_many(dict.fromkeys(keys, bytes(size)))
            else:
                table.delete_many(keys)

    def run(self, data: bytes, *, program: str = "capture", mark: int = 0) -> int:
        """What the program returns for a frame: GO_ON, SHOT or REDIRECT, or an action of XDP. The heart beats unless
        `is_alive` is off.
        """
        return self.transform(data, program=program, mark=mark)[0]

    def transform(self, data: bytes, *, program: str, mark: int = 0) -> tuple[int, bytes]:
        """The same, and the frame as the program left it."""
        if self.is_alive:
            self.classifier.heartbeat()
        held, out = ctypes.create_string_buffer(data, len(data)), ctypes.create_string_buffer(len(data) + 256)
        context = ctypes.create_string_buffer(struct.pack("=II", 0, 0) + struct.pack("=I", mark), 192)
        length = 0 if program == "xdp" else len(context)  # that of XDP would have to tell where the frame ends
        attr = attributes(
            "=IIIIQQIIIIQQ",
            self.objects.programs[program],
            0,
            len(data),
            len(out),
            ctypes.addressof(held),
            ctypes.addressof(out),
            1,
            0,
            length,
            0,
            ctypes.addressof(context) if length else 0,
            0,
        )
        bpf_call(PROG_TEST_RUN, attr)
        result, _, size = struct.unpack_from("=iII", attr.raw, 4)
        return int(result), out.raw[:size]

    def counted(self) -> dict[str, int]:
        """Counter -> packets, of those that are not zero."""
        return {name: value["packets"] for name, value in self.classifier.counters().items() if value["packets"]}

    def close(self) -> None:
        self.classifier.close()


# Real traffic.


class World:
    """client -- gateway -- server. The test runs in the gateway's namespace, which forwards only after `forward`."""

    def __init__(self) -> None:
        stem = f"pf{os.getpid()}"
        self.client, self.gateway, self.server = (Namespace(stem + letter) for letter in "cgs")

    def create(self) -> None:
        for namespace in (self.client, self.gateway, self.server):
            namespace.create(resolver="127.0.0.1", sysctls={"ipv6/conf/default/accept_dad": "0"})
        c, s = self.client.name, self.server.name
        self.gateway.ip(
            f"link add lan0 type veth peer name eth0 netns {c}",
            f"link add wan0 type veth peer name eth0 netns {s}",
            f"address add {GATEWAY4}/24 dev lan0",
            "address add fd00:9::1/64 dev lan0 nodad",
            "address add 10.8.0.1/24 dev wan0",
            "address add fd00:8::1/64 dev wan0 nodad",
            "link set lan0 up",
            "link set wan0 up",
        )
        for namespace, net in ((self.client, 9), (self.server, 8)):
            namespace.ip(
                f"address add 10.{net}.0.2/24 dev eth0",
                f"address add fd00:{net}::2/64 dev eth0 nodad",
                "link set eth0 up",
                f"route add default via 10.{net}.0.1",
                f"route add default via fd00:{net}::1",
            )
        # The kernel notices the carrier a moment later, and tests compare what it was like before.
        links = ("lan0", "wan0")
        assert wait_until(
            lambda: all("UP" in self.gateway.run("ip", "-br", "link", "show", one).stdout.split() for one in links)
        )

    def forward(self) -> None:
        """Let the gateway forward, as one that serves direct traffic must."""
        for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", key).write_text("1")

    def delete(self) -> None:
        for namespace in (self.client, self.gateway, self.server):
            namespace.delete()

    @contextlib.contextmanager
    def running(
        self,
        backend: str,
        prefixes: Sequence[Prefix] = (),
        *,
        hijack_dns: bool = False,
        fail: str = "open",
        attach: bool = True,
        xdp: bool | str = True,
        offload: bool = False,
    ) -> Iterator[tuple[TunDevice, BpfClassifier | RoutesClassifier]]:
        """The device up and the classifier attached, all undone at the end."""
        device = open_tun(TUN, 1500)
        routes = TunRoutes(TUN, 1500, ["198.18.0.1/15", "2001:2::1/48"], [])
        classifier = None
        try:
            routes.up()
            own = [packed(GATEWAY4), packed("fd00:9::1")]
            options: dict[str, Any] = {"hijack_dns": hijack_dns, "fail": fail, "xdp": xdp, "offload": offload}
            classifier = make_classifier(backend, TUN, ["lan0"], mark=MARK, own_addresses=own, **options)
            classifier.replace_rules([*EVERYTHING, *SERVERS_DIRECT, *prefixes])
            if attach:
                classifier.attach()
            yield device, classifier
        finally:
            if classifier is not None:
                classifier.close()
            routes.down()
            device.close()


def read_packet(device: TunDevice, timeout: float = 2.0) -> tuple[tuple[int, ...], bytes] | None:
    """The next (vnet header, IP packet) that is not the kernel's own chatter; None when none comes."""
    buffer = bytearray(70000)
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        select.select([device], [], [], left)
        length = device.recv_into(buffer)
        if length and not _is_chatter(bytes(buffer[vnet.LENGTH : length])):
            return vnet.unpack(buffer), bytes(buffer[vnet.LENGTH : length])
    return None


def _is_chatter(data: bytes) -> bool:
    """Multicast listener reports and the like."""
    return data[0] >> 4 == 6 and data[24] == 0xFF


def answer_udp(data: bytes, payload: bytes) -> bytes:
    """The answer to a UDP packet, with a virtio_net_hdr in front and the checksum left to the kernel."""
    source, destination, sport, dport = flow_of(data)
    transport = struct.pack("!HHHH", dport, sport, 8 + len(payload), 0)
    total = checksum.ones_sum(checksum_base(destination, source, socket.IPPROTO_UDP, 8 + len(payload)))
    transport = transport[:6] + struct.pack("!H", total)
    header = bytes(ip.header(destination, source, socket.IPPROTO_UDP, 8 + len(payload)))
    return vnet.pack(flags=vnet.NEEDS_CSUM, csum_start=len(header), csum_offset=6) + header + transport + payload


def checksum_base(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    """The pseudo-header (RFC 768, RFC 8200 section 8.1), whose sum is what NEEDS_CSUM wants in the field."""
    return source + destination + struct.pack("!IHH", length, 0, protocol)


def flow_of(data: bytes) -> tuple[bytes, bytes, int, int]:
    """(source, destination, source port, destination port) of a packet without options or extension headers."""
    start = 20 if data[0] >> 4 == 4 else 40
    addresses = data[12:20] if start == 20 else data[8:40]
    half = len(addresses) // 2
    return (addresses[:half], addresses[half:], *struct.unpack_from("!HH", data, start))


class HandmadePeer:
    """The far end of one TCP connection, just able to take and give bulk data through a TUN."""

    def __init__(self, device: TunDevice) -> None:
        self._device = device
        self._next = 0  # of the client's sequence numbers
        self._sent = 1000
        self.gso_sizes: set[int] = set()
        self.needs_checksum = False

    def accept(self) -> None:
        """Answer a SYN and take the acknowledgement."""
        got = read_packet(self._device)
        assert got is not None
        source, destination, sport, dport = flow_of(got[1])
        self._ends = destination, source, dport, sport
        self._next = self._tcp(got[1])[0] + 1
        self._emit(0x12, b"", options=struct.pack("!BBHBBBB", 2, 4, 1460, 1, 3, 3, 7))
        self._sent += 1
        assert read_packet(self._device) is not None

    def receive(self, octets: int) -> list[int]:
        """Take that much from the client, acknowledging; returns the sizes of the packets."""
        sizes: list[int] = []
        while sum(sizes) < octets:
            got = read_packet(self._device)
            assert got is not None
            (flags, kind, _, gso_size, _, _), data = got
            start, length = self._tcp(data)
            assert start == self._next
            self._next = start + length
            if kind != vnet.GSO_NONE:
                self.gso_sizes.add(gso_size)
                self.needs_checksum = bool(flags & vnet.NEEDS_CSUM)
            sizes.append(length)
            self._emit(0x10, b"")
        return sizes

    def send(self, data: bytes, gso_size: int) -> None:
        """Give the client one super-segment."""
        self._emit(0x18, data, gso_size=gso_size)
        self._sent += len(data)

    @staticmethod
    def _tcp(data: bytes) -> tuple[int, int]:
        """(sequence number, length of the payload)."""
        start = 20 if data[0] >> 4 == 4 else 40
        return struct.unpack_from("!I", data, start + 4)[0], len(data) - start - (data[start + 12] >> 4) * 4

    def _emit(self, flags: int, payload: bytes, *, options: bytes = b"", gso_size: int = 0) -> None:
        source, destination, sport, dport = self._ends
        length = 20 + len(options) + len(payload)
        total = checksum.ones_sum(checksum_base(source, destination, socket.IPPROTO_TCP, length))
        offset = (5 + len(options) // 4) << 4
        header = struct.pack("!HHIIBBHHH", sport, dport, self._sent, self._next, offset, flags, 65535, total, 0)
        network = bytes(ip.header(source, destination, socket.IPPROTO_TCP, length))
        kind = vnet.GSO_NONE
        if gso_size:
            kind = vnet.GSO_TCPV4 if len(source) == 4 else vnet.GSO_TCPV6
        front = vnet.pack(vnet.NEEDS_CSUM, kind, len(network) + 20 + len(options), gso_size, len(network), 16)
        assert self._device.send([front, network, header + options, payload])
