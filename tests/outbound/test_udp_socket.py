"""Several datagrams with one call (UDP_SEGMENT), and one by one where the kernel does not cut them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztun import platform
from ztun.outbound.udp import UdpSocket
from ztun.ports import Destination, Failure

from .links import Link
from .netns import ROUTER4, ROUTER6, Namespace
from .support import Sockets, outbound, until

SO_NO_CHECK, SO_RCVBUFFORCE = 11, 33  # asm-generic/socket.h
UDP_GRO = 104  # linux/udp.h
HEADER = b"proxyhead:"
SIZES = st.sampled_from([0, 1, 100, 1200, 1462, 30000, 65497])


class Far:
    """The other end. It takes super-datagrams whole, so that it sees what was one call."""

    def __init__(self, sock: socket.socket, host: str) -> None:
        self.sock = sock
        sock.bind((host, 0))
        sock.settimeout(2)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)

    @property
    def address(self) -> tuple[str, int]:
        host, port, *_ = self.sock.getsockname()
        return host, port

    def hear(self, count: int) -> list[list[bytes]]:
        """The next `count` datagrams, together where they came together."""
        calls: list[list[bytes]] = []
        while sum(map(len, calls)) < count:
            data, ancillary, _, _ = self.sock.recvmsg(65536, 64)
            sizes = [struct.unpack("=i", value)[0] for *_, value in ancillary]
            size = sizes[0] if sizes else len(data) or 1
            calls.append([data[at : at + size] for at in range(0, len(data) or 1, size)])
        return calls


@contextlib.contextmanager
def far() -> Iterator[Far]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield Far(sock, "127.0.0.1")


@contextlib.contextmanager
def opened(sock: socket.socket, drops: Counter[str] | None = None) -> Iterator[UdpSocket]:
    sock.setblocking(False)
    poller = platform.poller_of(asyncio.get_running_loop())
    counted = Counter() if drops is None else drops
    made = UdpSocket(poller, sock, lambda run: None, lambda number, address: None, counted)
    yield made
    made.close()


def plain() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def numbered(sizes: Sequence[int]) -> list[bytes]:
    return [(struct.pack("!I", number) * (size // 4 + 1))[:size] for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [
        ([100], [1]),
        ([100, 100], [2]),
        ([100, 100, 7], [3]),
        ([100] * 64, [64]),
        ([100] * 65, [64, 1]),
        ([1200] * 54, [54]),
        ([1200] * 55, [54, 1]),
        ([32730] * 2, [2]),
        ([32744] * 2, [1, 1]),
        ([65497] * 2, [1, 1]),
        ([0], [1]),
    ],
)
async def test_a_run_takes_as_few_calls_as_64_datagrams_and_65507_bytes_allow(
    sizes: list[int], calls: list[int]
) -> None:
    with far() as other, opened(plain()) as sock:
        sock.cuts = 65507
        payloads = numbered(sizes)
        sock.send_run(HEADER, payloads, other.address)
        heard = other.hear(len(sizes))
        assert [len(call) for call in heard] == calls
        assert [datagram for call in heard for datagram in call] == [HEADER + payload for payload in payloads]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(SIZES, st.integers(1, 70), SIZES), max_size=4), st.sampled_from([b"", HEADER]))
def test_runs_are_the_datagrams_in_them(runs: list[tuple[int, int, int]], header: bytes) -> None:
    """The oracle is the list itself: what `send` would do with one after the other."""

    async def check() -> None:
        with far() as other, opened(plain()) as sock:
            for size, count, last in runs:
                payloads = numbered([size] * (count if 0 < size < 3000 else 1))
                payloads += [b"!" * last] if 0 < last <= size else []
                sock.send_run(header, payloads, other.address)
                heard = other.hear(len(payloads))
                assert [datagram for call in heard for datagram in call] == [header + payload for payload in payloads]

    asyncio.run(check())


async def test_a_kernel_that_refuses_to_cut_is_asked_once() -> None:
    """It refuses on a socket that sends without checksums (SO_NO_CHECK), as it does for IPsec and on older devices."""
    with far() as other, opened(plain()) as sock:
        sock._sock.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        for _ in range(2):
            payloads = numbered([100] * 20)
            sock.send_run(HEADER, payloads, other.address)
            assert other.hear(20) == [[HEADER + payload] for payload in payloads]
            assert sock.cuts == 0


async def test_simulated_by_flag_a_system_that_cannot_cut() -> None:
    with far() as other, opened(plain()) as sock:
        sock.cuts = 0
        payloads = numbered([1200] * 70)
        sock.send_run(HEADER, payloads, other.address)
        assert other.hear(70) == [[HEADER + payload] for payload in payloads]


@pytest.mark.parametrize("host", [ROUTER4, ROUTER6])
async def test_what_the_path_does_not_take_whole_goes_in_fragments_and_less_is_cut_still(
    client: Sockets, router: Namespace, host: str
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with router.socket(family, socket.SOCK_DGRAM) as listener, opened(client(family, socket.SOCK_DGRAM)) as sock:
        other = Far(listener, host)
        for size, together in ((1452, True), (1490, False), (1490, False), (1489, None), (1400, True)):
            payloads = numbered([size] * 5)
            sock.send_run(b"", payloads, other.address)
            heard = other.hear(5)
            assert [datagram for call in heard for datagram in call] == payloads
            if together is not None:
                assert (len(heard) == 1) is together
        assert 1452 <= sock.cuts < 1490


async def test_what_no_datagram_can_hold_is_counted() -> None:
    drops: Counter[str] = Counter()
    with far() as other, opened(plain(), drops) as sock:
        sock.send_run(HEADER, [bytes(65500)] * 2, other.address)
        sock.send_run(HEADER, [b"fits"], other.address)
        assert other.hear(1) == [[HEADER + b"fits"]]
    assert drops == {"too long": 2}


async def test_a_run_to_where_nobody_listens_is_told_and_the_next_one_arrives(
    client: Sockets, router: Namespace
) -> None:
    from .test_datagrams import direct

    seen = Link()
    link = await seen.open(direct(client))
    with router.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        other = Far(listener, ROUTER4)
        for round_ in range(1, 4):
            link.send_run(Destination(ROUTER4, 9), [b"x" * 100] * 3)
            payloads = numbered([100] * 10)
            link.send_run(Destination(*other.address), payloads)
            assert [datagram for call in other.hear(10) for datagram in call] == payloads
            await until(lambda count=round_: len(seen.unreachable) >= count)  # type: ignore[misc]
    assert set(seen.unreachable) == {(Destination(ROUTER4, 9), Failure.REFUSED)}
    link.close()


async def test_a_run_to_a_new_name_waits_for_its_address(sockets: Sockets) -> None:
    seen = Link()

    async def resolve(name: str) -> list[str]:
        await asyncio.sleep(0.01)
        return ["127.0.0.1"]

    way = outbound(sockets, "direct", resolve=resolve)
    link = await seen.open(way)
    with far() as other:
        payloads = numbered([100] * 20)
        link.send_run(Destination("name.example", other.address[1]), payloads)
        await asyncio.sleep(0.05)
        assert [datagram for call in other.hear(16) for datagram in call] == payloads[:16]
    assert way.drops == {"name pending": 4}
    link.close()
