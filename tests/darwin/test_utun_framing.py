"""The utun device, byte by byte: 4 bytes of address family in network order in front of each packet, as
bsd/net/if_utun.c wants it (AF_INET 2 and AF_INET6 30 of bsd/sys/socket.h). Not recorded on a Mac.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darwin.stand_in import LinuxStandIn
from darwin.test_gateway_without_a_mac import check_frame
from ztun.errors import ZtunError
from ztun.platform.darwin import numbers
from ztun.platform.darwin.calls import CTL_INFO, SystemCalls
from ztun.platform.darwin.utun import UtunDevice, open_utun, unit_of
from ztun.stack.header import FlowHeader
from ztun.wire import checksum, ip, vnet

PACKET4 = ip.header(b"\x0a\0\0\1", b"\xc6\x12\0\1", ip.UDP, 8) + struct.pack("!HHHH", 1, 2, 8, 0)
PACKET6 = ip.header(bytes(15) + b"\2", bytes(15) + b"\3", ip.UDP, 8) + struct.pack("!HHHH", 1, 2, 8, 0)


class Pair:
    """A device, and the other end of its control socket."""

    def __init__(self) -> None:
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.far.settimeout(5)
        self.device = UtunDevice("utun9", 1500, near.detach(), lambda name: -1)

    def close(self) -> None:
        self.device.close()
        self.far.close()


@pytest.fixture
def pair() -> object:
    made = Pair()
    yield made
    made.close()


def test_numbers_of_the_headers() -> None:
    """CTLIOCGINFO is _IOWR('N', 3, struct ctl_info) of bsd/sys/kern_control.h and bsd/sys/ioccom.h."""
    assert CTL_INFO.size == 100
    assert 0x80000000 | 0x40000000 | CTL_INFO.size << 16 | ord("N") << 8 | 3 == numbers.CTLIOCGINFO
    assert CTL_INFO.pack(0, b"com.apple.net.utun_control")[4:30] == b"com.apple.net.utun_control"


@pytest.mark.parametrize(
    ("packet", "family"), [(PACKET4, "00000002"), (PACKET6, "0000001e")], ids=["AF_INET", "AF_INET6"]
)
def test_the_family_stands_in_front(pair: Pair, packet: bytes, family: str) -> None:
    assert pair.device.send([vnet.EMPTY + packet])
    assert pair.far.recv(2000) == bytes.fromhex(family) + packet
    pair.far.send(bytes.fromhex(family) + packet)
    buffer = bytearray(b"\xee" * 2000)
    length = pair.device.recv_into(buffer)
    assert bytes(buffer[:length]) == bytes(10) + packet
    assert pair.device.recv_into(buffer) == 0


@pytest.mark.parametrize("frame", ["0200000045", "0000000a60", "00000002", "00", "0000000245"])
def test_frames_of_no_family_that_we_know_are_counted(pair: Pair, frame: str) -> None:
    """The first has its family in the order of the machine, the second has Linux's number."""
    pair.far.send(bytes.fromhex(frame))
    pair.far.send(bytes.fromhex("00000002") + PACKET4)
    buffer = bytearray(2000)
    if frame == "0000000245":  # a family and one byte: what is in it is looked at elsewhere
        assert pair.device.recv_into(buffer) == 11
    assert pair.device.recv_into(buffer) == 10 + len(PACKET4)
    assert pair.device.strangers == (0 if frame == "0000000245" else 1)


def test_what_is_not_admitted_is_not_seen(pair: Pair) -> None:
    asked: list[bytes] = []

    def admit(packet: memoryview) -> bool:
        asked.append(bytes(packet))
        return packet[0] >> 4 == 6

    pair.device.admit = admit
    pair.far.send(bytes.fromhex("00000002") + PACKET4)
    pair.far.send(bytes.fromhex("0000001e") + PACKET6)
    buffer = bytearray(2000)
    assert bytes(buffer[: pair.device.recv_into(buffer)]) == bytes(10) + PACKET6
    assert asked == [PACKET4, PACKET6]


def test_an_interface_that_is_gone(pair: Pair) -> None:
    pair.far.close()
    with pytest.raises(OSError, match="No such device"):
        pair.device.recv_into(bytearray(2000))


@given(
    v6=st.booleans(),
    size=st.integers(1, 20_000),
    mss=st.sampled_from([88, 536, 1220, 1400, 1428]),
    flags=st.sampled_from([0x10, 0x18, 0x19, 0x98]),
    cuts=st.integers(0, 3),
    seq=st.sampled_from([0, 1, 0xFFFFFE00, 0xFFFFFFFF]),
)
def test_super_segments_come_out_as_whole_segments(
    v6: bool, size: int, mss: int, flags: int, cuts: int, seq: int
) -> None:
    """Of the stack's own making: every length, number, flag and checksum of each piece."""
    pair = Pair()
    try:
        header = FlowHeader(bytes(range(1, 37)) if v6 else bytes(range(1, 13)))
        header.set_segment_size(mss, 12)
        payload = os.urandom(size)
        step = size // (cuts + 1) or 1
        views = [memoryview(payload)[at : at + step] for at in range(0, size, step)]
        assert pair.device.send([header.pack(seq, 7, flags, 500, bytes(12), size), *views])
        pair.far.setblocking(False)
        pieces, expected = [], seq
        for _ in range(-(-size // mss) if size > mss else 1):
            frame = pair.far.recv(4000)
            check_frame(frame)
            start = 4 + (40 if v6 else 20)
            number, mine = struct.unpack_from("!I", frame, start + 4)[0], frame[start + 13]
            assert number == expected & 0xFFFFFFFF
            pieces.append(frame[start + 32 :])
            expected += len(pieces[-1])
            is_first, is_last = len(pieces) == 1, expected == seq + size
            assert mine & 0x09 == (flags & 0x09 if is_last else 0)  # FIN, PSH
            assert mine & 0x80 == (flags & 0x80 if is_first else 0)  # CWR
            assert mine & 0x10
        assert b"".join(pieces) == payload
        with pytest.raises(BlockingIOError):
            pair.far.recv(1)
    finally:
        pair.close()


def test_a_datagram_whose_sum_is_zero_says_all_ones() -> None:
    """RFC 768: 0 in the checksum field says that there is none."""
    pair = Pair()
    try:
        source, destination = b"\x0a\0\0\1", b"\x0a\0\0\2"
        for value in range(65536):
            payload = struct.pack("!H", value)
            pseudo = checksum.pseudo_sum(source + destination, ip.UDP, 10)
            total = checksum.ones_sum(struct.pack("!HHH", 1, 2, 10) + payload, pseudo)
            if checksum.finish(total) == 0 or total == 0:
                break
        network = ip.header(source, destination, ip.UDP, 10)
        front = vnet.pack(vnet.NEEDS_CSUM, csum_start=20, csum_offset=6)
        pair.device.send([front + network + struct.pack("!HHHH", 1, 2, 10, pseudo), payload])
        frame = pair.far.recv(100)
        assert frame[-4:-2] == b"\xff\xff"
        check_frame(frame)
    finally:
        pair.close()


# Making one.


@pytest.mark.parametrize(("name", "unit"), [("utun", 0), ("utun0", 1), ("utun7", 8), ("utun123", 124)])
def test_units_count_from_one(name: str, unit: int) -> None:
    assert unit_of(name) == unit


@pytest.mark.parametrize("name", ["ztun0", "utunx", "utun-1", "tun0", ""])
def test_names_that_macos_cannot_give(name: str) -> None:
    with pytest.raises(ZtunError, match=r"tun\.name .*on macOS it is utun"):
        unit_of(name)


class Refusing(LinuxStandIn):
    """Fails in one of the calls, and counts the sockets that are left open."""

    def __init__(self, call: str, number: int) -> None:
        super().__init__()
        self._call, self._number = call, number
        self.sockets: list[socket.socket] = []

    def control_socket(self) -> socket.socket:
        self._maybe("control_socket")
        self.sockets.append(super().control_socket())
        return self.sockets[-1]

    def control_id(self, sock: socket.socket, name: str) -> int:
        self._maybe("control_id")
        return super().control_id(sock, name)

    def connect_control(self, sock: socket.socket, control: int, unit: int) -> None:
        self._maybe("connect_control")

    def _maybe(self, call: str) -> None:
        if call == self._call:
            raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(
    ("call", "number", "words"),
    [
        ("connect_control", errno.EPERM, "not permitted; run as root"),
        ("connect_control", errno.EBUSY, "utun7 exists already"),
        ("control_id", errno.ENOENT, "this system has no utun"),
        ("control_socket", errno.EPROTONOSUPPORT, "cannot open a kernel control socket"),
        ("connect_control", errno.ENOMEM, "cannot create utun7: cannot allocate memory"),
    ],
)
def test_what_is_refused_is_one_clear_line(call: str, number: int, words: str) -> None:
    calls = Refusing(call, number)
    with pytest.raises(ZtunError) as refused:
        open_utun("utun7", 1500, calls)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert all(sock.fileno() < 0 for sock in calls.sockets)


def test_the_real_calls_are_refused_here_in_one_line() -> None:
    """Linux has no PF_SYSTEM."""
    with pytest.raises(ZtunError, match="cannot open a kernel control socket"):
        open_utun("utun", 1500, SystemCalls())
