"""Reading many datagrams at once, and sending several with one call: on real sockets, to the byte and in order."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ztun.outbound.batch import BatchReader, PlainReader, Reader, Run

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
UDP_SEGMENT, UDP_GRO = 103, 104  # linux/udp.h
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
HEAD = 10

both = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])


@contextmanager
def receiver(family: int = socket.AF_INET) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sock.setblocking(False)
        sock.bind((HOSTS[family], 0))
        yield sock


@contextmanager
def sender_to(sock: socket.socket) -> Iterator[socket.socket]:
    with socket.socket(sock.family, socket.SOCK_DGRAM) as sender:
        sender.connect(sock.getsockname())
        yield sender


def read_all(reader: Reader) -> list[Run]:
    """Until there is nothing more. What a call returns is valid up to the next one."""
    runs = []
    while True:
        try:
            got = reader.receive()
        except BlockingIOError:
            return runs
        assert got
        runs += [run._replace(payload=memoryview(bytes(run.payload))) for run in got]


def datagrams(reader: Reader, runs: list[Run]) -> list[tuple[tuple[str, int], bytes]]:
    """(sender, datagram) for each in the runs."""
    return [
        (reader.sender_of(run), run.head + bytes(run.payload[at : at + run.size]))
        for run in runs
        for at in range(0, len(run.payload) or 1, run.size or 1)
    ]


def shapes(runs: list[Run]) -> list[tuple[int, int]]:
    return [(len(run.payload), run.size) for run in runs]


def payload(number: int, size: int) -> bytes:
    return (struct.pack("!I", number) * (size // 4 + 1))[:size]


SIZES = st.sampled_from([0, 1, 9, 10, 11, 100, 100, 1210, 1210, 1210, 1211, 2057, 2058, 2059, 9000, 65507])


Sent = list[tuple[int, bool, int]]


def bursts(parts: list[tuple[int, bool, int, int]]) -> Sent:
    """(sender, whether its header is marked, size) of each datagram, from the same and how many in a row."""
    return [
        (who, marked, size)
        for who, marked, size, count in parts
        for _ in range(count if size < 2000 else 1 + count % 3)
    ]


BURSTS = st.lists(st.tuples(st.integers(0, 1), st.booleans(), SIZES, st.integers(1, 70)), max_size=6).map(bursts)


@both
@settings(deadline=None, max_examples=60)
@given(BURSTS, st.integers(0, 100), st.integers(0, 22))
@example([(0, False, 1210)] * 70, 3, HEAD)
@example([(0, False, 1210)] * 10 + [(1, False, 1210)] * 10, 5, HEAD)
@example([(0, True, 1210), (0, False, 1210)] * 10, 5, HEAD)
def test_batches_hold_what_was_sent(family: int, sent: Sent, first: int, head: int) -> None:
    """From two senders, with two kinds of header, in two goes: what a plain reader would tell, in the same order."""
    with receiver(family) as sock, sender_to(sock) as one, sender_to(sock) as two:
        reader = BatchReader(sock, connected=False, head=head)
        expected, got = [], []
        for part in (sent[:first], sent[first:]):
            for number, (who, marked, size) in enumerate(part):
                whole = (b"\xff" if marked else b"\0") * min(size, head) + payload(number, size - min(size, head))
                (one, two)[who].send(whole)
                expected.append(((one, two)[who].getsockname()[:2], whole))
            got += datagrams(reader, read_all(reader))
        assert got == expected


@both
def test_alike_datagrams_come_as_one_run(family: int) -> None:
    with receiver(family) as sock, sender_to(sock) as sender:
        reader = BatchReader(sock, connected=False, head=HEAD)
        for _ in range(2):
            for number in range(20):
                sender.send(bytes(HEAD) + payload(number, 1200))
            sender.send(bytes(HEAD) + b"the last is shorter")
            runs = read_all(reader)
            assert shapes(runs) == [(20 * 1200 + 19, 1200)]
            assert runs[0].head == bytes(HEAD)


@pytest.mark.parametrize(
    ("size", "runs"), [(100, [(6400, 100), (600, 100)]), (1200, [(54 * 1200, 1200), (16 * 1200, 1200)])]
)
def test_a_run_is_bounded_by_64_datagrams_and_64_kilobytes(size: int, runs: list[tuple[int, int]]) -> None:
    with receiver() as sock, sender_to(sock) as sender:
        reader = BatchReader(sock, connected=False, head=0)
        for _ in range(2):  # the first teaches the size
            for number in range(70):
                sender.send(payload(number, size))
            got = read_all(reader)
        assert shapes(got) == runs


@both
@pytest.mark.parametrize("head", [0, HEAD])
def test_what_the_kernel_put_together_is_taken_apart(family: int, head: int) -> None:
    """One super-datagram between other datagrams; with UDP_GRO the kernel hands it over whole."""
    pieces = [bytes(head) + payload(number, 500) for number in range(9)] + [bytes(head) + b"short"]
    with receiver(family) as sock, sender_to(sock) as sender:
        sock.connect(sender.getsockname())
        reader = BatchReader(sock, connected=True, head=head)
        assert sock.getsockopt(socket.IPPROTO_UDP, UDP_GRO) == 1
        for _ in range(3):
            sender.send(bytes(head) + b"before")
            sender.sendmsg([b"".join(pieces)], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", head + 500))])
            sender.send(bytes(head) + b"after")
            got = [
                run.head + bytes(run.payload[at : at + run.size])
                for run in read_all(reader)
                for at in range(0, len(run.payload), run.size)
            ]
            assert got == [bytes(head) + b"before", *pieces, bytes(head) + b"after"]


def test_two_coalesced_halves_are_not_taken_for_one_datagram() -> None:
    """The kernel's message is as long as the datagrams that the reader has learned to expect."""
    with receiver() as sock, sender_to(sock) as sender:
        reader = BatchReader(sock, connected=False, head=0)
        for _ in range(2):
            sender.send(bytes(1000))
            sender.send(bytes(1000))
            assert shapes(read_all(reader)) == [(2000, 1000)]
        sender.sendmsg([bytes(1000)], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 500))])
        assert shapes(read_all(reader)) == [(1000, 500)]


def test_another_length_of_header_is_learned() -> None:
    with receiver() as sock, sender_to(sock) as sender:
        reader = BatchReader(sock, connected=False, head=HEAD)
        reader.head = 22
        sender.send(bytes(range(22)) + b"x" * 100)
        (run,) = read_all(reader)
        assert (run.head, bytes(run.payload)) == (bytes(range(22)), b"x" * 100)
        reader.head = 5000  # no header is so long
        assert reader.head == 22


def test_two_readers_share_their_memory_but_not_what_they_learned() -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(receiver()) for _ in range(2)]
        senders = [stack.enter_context(sender_to(sock)) for sock in socks]
        readers = [BatchReader(sock, connected=False, head=0) for sock in socks]
        for _ in range(3):
            for number, sender in enumerate(senders):
                for size in (300 + number, 300 + number):
                    sender.send(payload(number, size))
            assert [shapes(read_all(reader)) for reader in readers] == [[(600, 300)], [(602, 301)]]


@pytest.mark.parametrize("make", [BatchReader, PlainReader])
def test_an_icmp_error_is_the_sockets_own(make: type[BatchReader] | type[PlainReader]) -> None:
    with receiver() as sock:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as gone:
            gone.bind(("127.0.0.1", 0))
            sock.connect(gone.getsockname())
        reader = make(sock, connected=True, head=0)
        with pytest.raises(BlockingIOError):
            reader.receive()
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            reader.receive()


@settings(deadline=None, max_examples=30)
@given(st.lists(SIZES, max_size=30))
def test_a_system_without_recvmmsg_tells_the_same(sizes: list[int]) -> None:
    with receiver() as sock, sender_to(sock) as sender:
        reader = PlainReader(sock, connected=False, head=HEAD)
        sent = [payload(number, size) for number, size in enumerate(sizes)]
        for whole in sent:
            sender.send(whole)
        assert datagrams(reader, read_all(reader)) == [(sender.getsockname(), whole) for whole in sent]
