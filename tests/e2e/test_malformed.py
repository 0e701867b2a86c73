"""Packets that no sane stack sends: dropped, counted under a reason, and the gateway goes on."""

from __future__ import annotations

import functools
import random
import socket
import struct

import pytest

from ztun.lab import Lab, Ztun, plan
from ztun.lab.namespace import wait_until

pytestmark = pytest.mark.usefixtures("backend")

_SOURCE, _SITE = (socket.inet_aton(address) for address in (plan.CLIENT4, plan.SITE4))
_SYN = struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 5 << 4, 0x02, 65535, 0, 0)


def ipv4(payload: bytes, *, protocol: int = 6, ihl: int = 5, length: int | None = None, fragment: int = 0) -> bytes:
    """An IPv4 packet to SITE4 (RFC 791, section 3.1) whose checksum is right and whose other fields may not be."""
    total = 20 + len(payload) if length is None else length
    header = struct.pack("!BBHHHBBH4s4s", 4 << 4 | ihl, 0, total, 1, fragment, 64, protocol, 0, _SOURCE, _SITE)
    words = sum(struct.unpack("!10H", header))
    words = (words & 0xFFFF) + (words >> 16)
    return header[:10] + struct.pack("!H", ~(words + (words >> 16)) & 0xFFFF) + header[12:] + payload


PACKETS = {
    "TCP header cut": ipv4(_SYN[:10]),
    "TCP header longer than the packet": ipv4(_SYN[:12] + b"\xf0" + _SYN[13:]),
    "TCP header shorter than 20": ipv4(_SYN[:12] + b"\x10" + _SYN[13:]),
    "TCP checksum wrong": ipv4(_SYN[:16] + b"\xde\xad" + _SYN[18:]),
    "UDP length beyond the packet": ipv4(struct.pack("!HHHH", 40000, 7000, 500, 0) + b"x", protocol=17),
    "UDP header cut": ipv4(b"\x9c\x40\x1b", protocol=17),
    "protocol that nobody speaks": ipv4(b"\x00" * 20, protocol=253),
}


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS.keys())
def test_malformed_packet_is_dropped_and_counted(lab: Lab, any_ztun: Ztun, packet: bytes) -> None:
    before = _drops(any_ztun)

    send_raw(lab, packet)

    assert wait_until(lambda: _drops(any_ztun) > before, timeout=2), any_ztun.status()["drops"]
    assert lab.page(f"http://{plan.SITE4}/")


def test_hundreds_of_them_leave_it_working(lab: Lab, any_ztun: Ztun) -> None:
    noise = random.Random(7)
    for _ in range(300):
        body = noise.randbytes(noise.randrange(60))
        send_raw(
            lab, ipv4(body, protocol=noise.choice([1, 6, 17, 41, 50, 132]), fragment=noise.choice([0, 0, 0x2000, 7]))
        )

    assert any_ztun.returncode is None
    assert lab.page(f"http://{plan.SITE4}/")["client"] == plan.UPSTREAM4
    assert "Traceback" not in any_ztun.output


def send_raw(lab: Lab, packet: bytes) -> None:
    """Put a packet on the client's wire as it is, addressed to the gateway's MAC address (packet(7))."""
    with lab.client.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)) as sock, lab.client.entered():
        sock.sendto(packet, ("eth0", 0x0800, 0, 0, _gateway_mac(lab)))


@functools.cache
def _gateway_mac(lab: Lab) -> bytes:
    return bytes.fromhex(lab.gateway.run("cat", "/sys/class/net/lan0/address").stdout.strip().replace(":", ""))


def _drops(instance: Ztun) -> int:
    """Packets dropped by the stack and by the classifier, whatever the reason."""
    counters = instance.routes()["counters"]
    dropped = sum(counter["packets"] for reason, counter in counters.items() if reason.startswith("drop_"))
    return dropped + sum(instance.status()["drops"].values())
