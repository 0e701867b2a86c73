"""Connections given to the kernel by a real classifier, on real sockets: what is taken, and what is left as it was."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from lan_world import CLIENT4, MARK, SERVER4, World, packed

from ztun.lab.namespace import wait_until
from ztun.platform.linux.classifier import BpfClassifier
from ztun.platform.linux.offload import _GROWING_AT, SPLICE_SIZE, KernelOffload
from ztun.platform.linux.sockets import SpareSockets
from ztun.ports import Progress
from ztun.wire.handshake import Offer, Terms

PORT = 1080
KEY = packed(CLIENT4) + packed("203.0.113.5") + struct.pack("!HH", 40000, 80)
SILENT = Progress(0, 0, False, False, "", 0, 0.0, 0, 0, 0, 0)
LINUX = Offer(KEY, 1000, 1460, 7, True, 5)


class Bench:
    """A classifier that carries, a client that it has seen, and connections to the server, which is the proxy."""

    def __init__(self, world: World, offload: KernelOffload) -> None:
        self.world = world
        self.offload = offload
        with world.server.entered():
            self._listener = socket.create_server((SERVER4, PORT))
        self._sockets: list[socket.socket] = [self._listener]

    def connects(self) -> tuple[socket.socket, socket.socket]:
        """(ours, the proxy's)."""
        ours = socket.socket()
        return ours, self.connect(ours)

    def connect(self, ours: socket.socket) -> socket.socket:
        """To the proxy, whose socket it returns, and talk to it as one does."""
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        ours.settimeout(1)
        ours.connect((SERVER4, PORT))
        theirs, _ = self._listener.accept()
        theirs.settimeout(1)
        self._sockets += [ours, theirs]
        ours.sendall(b"greeting")
        assert theirs.recv(100) == b"greeting"
        theirs.sendall(b"agreed")
        assert ours.recv(100) == b"agreed"
        return theirs

    def takes(
        self, sock: socket.socket, offer: Offer, stamp: int, unread: int = 0, address: str = ""
    ) -> tuple[int, Terms] | None:
        return self.offload.take(sock, address, PORT, unread, offer, stamp)

    def carried(self) -> int:
        return len(self.offload.describe())

    def hears_client(self, place: int) -> None:
        """As if a segment of its client had been carried."""
        struct.pack_into("=Q", self.offload._memory, place * SPLICE_SIZE + _GROWING_AT + 20, 1)

    def forget_sockets(self) -> None:
        while len(self._sockets) > 1:
            self._sockets.pop().close()

    def close(self) -> None:
        self.forget_sockets()
        self._listener.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Bench]:
    world = World()
    try:
        world.create()
        with world.gateway.entered(), world.running("tcx", offload=True) as (_, classifier):
            assert isinstance(classifier, BpfClassifier)
            assert classifier.offload is not None
            with world.client.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"here I am", ("203.0.113.5", 9))  # captured, so that it is a client
            assert wait_until(lambda: classifier.origin(packed(CLIENT4)) is not None)
            made = Bench(world, classifier.offload)
            yield made
            made.close()
    finally:
        world.delete()


@pytest.fixture
def bench(shared: Bench) -> Iterator[Bench]:
    """With nothing carried, before and after."""
    shared.offload.follow({SERVER4: "wan0"})
    shared.offload.refused = 0
    yield shared
    shared.offload.release(list(shared.offload._places))
    shared.offload.ended()
    shared.forget_sockets()


def talks(ours: socket.socket, theirs: socket.socket) -> bool:
    """Both hear each other."""
    ours.sendall(b"up")
    theirs.sendall(b"down")
    return theirs.recv(10) == b"up" and ours.recv(10) == b"down"


def test_what_is_taken_is_for_the_client(bench: Bench) -> None:
    """Who has to have answered. This one is not there, and says so to the proxy."""
    ours, theirs = bench.connects()
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    place, terms = taken
    assert (terms.mss, terms.sack, terms.stamps) == (1460, True, True)
    assert terms.scale is not None
    theirs.sendall(b"for the client")
    theirs.settimeout(0.3)
    with pytest.raises(TimeoutError):
        theirs.recv(10)
    assert bench.offload.read(place) == SILENT
    bench.hears_client(place)
    theirs.settimeout(3)
    with pytest.raises(ConnectionResetError):
        theirs.recv(10)
    progress = bench.offload.read(place)
    assert (progress.down, progress.reset) == (len(b"for the client"), "client")
    assert bench.offload.ended() == [place]


def test_what_was_taken_is_forgotten_in_silence(bench: Bench) -> None:
    """Neither FIN nor RST: the kernel's TCP would have old numbers for them."""
    ours, theirs = bench.connects()
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    [entry] = bench.offload.describe()
    assert (entry["client"], entry["proxy"], entry["local_port"]) == (CLIENT4, SERVER4, ours.getsockname()[1])
    bench.offload.release([taken[0]])
    ours.close()
    theirs.settimeout(0.5)
    with pytest.raises(TimeoutError):
        theirs.recv(10)
    assert bench.carried() == 0


def test_what_was_taken_is_as_new_afterwards(bench: Bench) -> None:
    """Its proxy hears nothing of that, and the next connection is one from another port."""
    spares = bench.offload.spares = SpareSockets()
    ours, theirs = bench.connects()
    port = ours.getsockname()[1]
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    bench.offload.release([taken[0]])
    assert bench.offload.spare(ours)
    theirs.settimeout(0.3)
    with pytest.raises(TimeoutError):
        theirs.recv(10)
    again = spares.take(socket.AF_INET)
    assert again is ours
    assert spares.take(socket.AF_INET) is None
    theirs = bench.connect(again)
    assert again.getsockname()[1] != port
    assert again.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK
    assert talks(again, theirs)
    taken = bench.takes(again, LINUX, 78)
    assert taken is not None
    bench.offload.spares = None


def test_a_socket_that_was_made_deaf_is_not_used_again(bench: Bench) -> None:
    bench.offload.spares = SpareSockets()
    ours, _ = bench.connects()
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    bench.offload.follow({SERVER4: "nowhere0"})
    bench.offload.release([taken[0]])
    assert not bench.offload.spare(ours)
    bench.offload.spares = None


def test_few_are_kept() -> None:
    """Descriptors of low numbers, since high ones tell of many that are in use."""
    spares = SpareSockets()
    made = [socket.socket() for _ in range(129)]
    assert [spares.keep(sock) for sock in made] == [True] * 128 + [False]
    spares.close()
    assert [sock.fileno() for sock in made[:128]] == [-1] * 128
    high = fcntl.fcntl(made[128], fcntl.F_DUPFD_CLOEXEC, 512)
    with socket.socket(fileno=high) as sock:
        assert not spares.keep(sock)
    made[128].close()


def test_a_reset_reaches_a_proxy_whose_client_never_spoke(bench: Bench) -> None:
    ours, theirs = bench.connects()
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    bench.offload.reset(taken[0])
    with pytest.raises(ConnectionResetError):
        theirs.recv(10)


@pytest.mark.parametrize(
    "offer",
    [LINUX._replace(stamp=None), LINUX._replace(sack=False), LINUX._replace(mss=1459)],
    ids=["no timestamps", "no SACK", "small segments"],
)
def test_what_does_not_fit_together_is_left_as_it_was(bench: Bench, offer: Offer) -> None:
    ours, theirs = bench.connects()
    assert bench.takes(ours, offer, 77) is None
    assert (bench.carried(), bench.offload.refused) == (0, 1)
    assert talks(ours, theirs)


def test_a_client_without_window_scale_is_told_of_none(bench: Bench) -> None:
    ours, _ = bench.connects()
    taken = bench.takes(ours, LINUX._replace(scale=None), 77)
    assert taken is not None
    assert taken[1].scale is None


def test_a_destination_that_has_spoken_is_left_as_it_was(bench: Bench) -> None:
    ours, theirs = bench.connects()
    theirs.sendall(b"220 ready")
    assert wait_until(lambda: ours.recv(100, socket.MSG_PEEK))
    assert bench.takes(ours, LINUX, 77) is None
    assert bench.carried() == 0
    assert ours.recv(100) == b"220 ready"
    assert talks(ours, theirs)


def test_what_a_proxy_said_before_may_wait_in_the_socket(bench: Bench) -> None:
    """Nobody needs it any more, and reading it would be a system call."""
    ours, theirs = bench.connects()
    theirs.sendall(b"granted")
    assert wait_until(lambda: ours.recv(100, socket.MSG_PEEK))
    taken = bench.takes(ours, LINUX, 77, unread=len(b"granted"), address=SERVER4)
    assert taken is not None
    bench.offload.release([taken[0]])
    ours.close()
    theirs.settimeout(0.3)
    with pytest.raises(TimeoutError):  # nor does it make a reset of the end
        theirs.recv(10)


class Interrupted(socket.socket):
    """Calls `meanwhile` when it is about to be taken from the kernel's TCP."""

    meanwhile: Callable[[], None] | None = None

    def setsockopt(self, *args: Any) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        super().setsockopt(*args)


def test_what_comes_while_it_is_taken_is_not_for_the_kernels_tcp(bench: Bench) -> None:
    """It would acknowledge what the client never gets. Kept from it, the proxy sends it again."""

    spoken: list[float] = []

    def speaks() -> None:
        theirs.sendall(b"220 ready")
        time.sleep(0.05)
        spoken.append(time.monotonic())

    ours = Interrupted()
    theirs = bench.connect(ours)
    ours.meanwhile = speaks
    assert bench.takes(ours, LINUX, 77) is not None
    assert spoken
    assert fcntl.ioctl(ours, termios.FIONREAD, bytes(4)) == bytes(4)


@pytest.mark.parametrize("unread", [3, 8])
def test_more_or_less_than_that_is_the_destinations(bench: Bench, unread: int) -> None:
    ours, theirs = bench.connects()
    theirs.sendall(b"granted")
    assert wait_until(lambda: ours.recv(100, socket.MSG_PEEK))
    assert bench.takes(ours, LINUX, 77, unread=unread) is None
    assert ours.recv(100) == b"granted"
    assert talks(ours, theirs)


def test_clients_without_timestamps_are_known_not_to_fit_for_a_while(bench: Bench) -> None:
    """Their connections would be entered, and taken out again, for nothing."""
    ours, _ = bench.connects()
    for refused in (1, 2):
        assert bench.takes(ours, LINUX._replace(stamp=None), 77) is None
        assert bench.offload.refused == refused
        assert SERVER4 in bench.offload._stamping
    assert bench.takes(ours, LINUX, 77) is not None  # which is about those clients alone
    bench.offload.follow({SERVER4: "wan0"})  # another network, and another proxy perhaps
    assert not bench.offload._stamping


def test_a_destination_that_has_closed_is_left_as_it_was(bench: Bench) -> None:
    ours, theirs = bench.connects()
    theirs.shutdown(socket.SHUT_WR)
    assert ours.recv(10, socket.MSG_PEEK) == b""
    assert bench.takes(ours, LINUX, 77) is None
    ours.sendall(b"still here")
    assert theirs.recv(100) == b"still here"


def test_a_connection_that_is_broken_is_left_as_it_was(bench: Bench) -> None:
    ours, theirs = bench.connects()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    theirs.close()
    with pytest.raises(ConnectionResetError):
        ours.recv(10)
    assert bench.takes(ours, LINUX, 77) is None
    assert bench.carried() == 0


def test_who_was_never_captured_is_no_client(bench: Bench) -> None:
    """This host itself, or somebody behind an interface that is captured from by routes."""
    ours, theirs = bench.connects()
    stranger = LINUX._replace(key=packed("10.9.0.77") + KEY[4:])
    assert bench.takes(ours, stranger, 77) is None
    assert talks(ours, theirs)


def test_client_and_proxy_are_of_one_family(bench: Bench) -> None:
    ours, theirs = bench.connects()
    six = LINUX._replace(key=packed("fd00:9::2") + packed("2001:db8::5") + KEY[-4:])
    assert bench.takes(ours, six, 77) is None
    assert talks(ours, theirs)


def test_a_proxy_on_this_host_is_left_to_ztun(bench: Bench) -> None:
    bench.offload.follow({"127.0.0.1": "lo"})
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as ours:
        assert bench.takes(ours, LINUX, 77) is None


def test_an_address_that_nobody_told_of_is_looked_up_once(bench: Bench) -> None:
    bench.offload.follow({})
    ours, _ = bench.connects()
    assert bench.takes(ours, LINUX, 77) is not None
    again, _ = bench.connects()
    assert bench.takes(again, LINUX._replace(key=KEY[:-4] + struct.pack("!HH", 40001, 80)), 77) is not None


def test_when_all_places_are_taken_the_rest_is_left_to_ztun(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.offload, "_most", bench.offload._used + 2)
    monkeypatch.setattr(bench.offload, "_free", deque())
    pairs = [bench.connects() for _ in range(3)]
    keys = [KEY[:-4] + struct.pack("!HH", 40000 + number, 80) for number in range(3)]
    taken = [bench.takes(ours, LINUX._replace(key=key), 77) for (ours, _), key in zip(pairs, keys, strict=True)]
    assert [one is not None for one in taken] == [True, True, False]
    assert talks(*pairs[2])
    assert taken[0] is not None
    bench.offload.release([taken[0][0]])
    assert bench.takes(pairs[2][0], LINUX._replace(key=keys[2]), 77) is not None


def test_a_proxy_by_another_interface_takes_its_connections_along(bench: Bench) -> None:
    ours, theirs = bench.connects()
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    bench.hears_client(taken[0])
    bench.world.gateway.ip("link set wan0 down", "link set wan0 name wan1", "link set wan1 up")
    bench.offload.follow({SERVER4: "wan1"})
    assert [program["ifname"] for program in bench.offload.programs()] == ["wan1"]
    theirs.sendall(b"later")
    assert wait_until(lambda: bench.offload.read(taken[0]).down == 5)
    bench.world.gateway.ip("link set wan1 down", "link set wan1 name wan0", "link set wan0 up")


def test_a_proxy_that_knows_nothing_of_what_is_sent_is_left_to_ztun(bench: Bench) -> None:
    """As behind SNAT of this host's own packets: it resets what comes from another source than before."""
    for number in range(4):
        ours, theirs = bench.connects()
        offer = LINUX._replace(key=KEY[:-4] + struct.pack("!HH", 40000 + number, 80))
        taken = bench.takes(ours, offer, 77)
        assert (taken is None) == (number == 3)
        if taken is not None:
            bench.hears_client(taken[0])
            theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            theirs.close()
            assert wait_until(lambda at=taken[0]: bench.offload.read(at).reset == "proxy")
            bench.offload.release([taken[0]])
    assert talks(ours, theirs)


def test_connections_that_ipsec_might_encrypt_are_left_to_ztun(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.world.gateway.ip("xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir out priority 1 action allow")
    try:
        monkeypatch.setattr(bench.offload, "_next_look", 0.0)
        ours, theirs = bench.connects()
        assert bench.takes(ours, LINUX, 77) is None
        assert talks(ours, theirs)
    finally:
        bench.world.gateway.ip("xfrm policy flush")
    bench.offload._next_look = 0.0
    assert bench.takes(ours, LINUX, 77) is not None


def test_without_a_way_its_socket_believes_nothing(bench: Bench) -> None:
    """Else the kernel would acknowledge what the client never gets."""
    ours, theirs = bench.connects()
    taken = bench.takes(ours, LINUX, 77)
    assert taken is not None
    bench.offload.follow({SERVER4: "nothing0"})
    for _, hook in bench.offload._hooks.values():
        hook.close()
    theirs.sendall(b"to nobody")
    theirs.settimeout(0.3)
    with pytest.raises(TimeoutError):
        theirs.recv(10)
    assert struct.unpack("=I", theirs.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)[24:])[0] == 1  # tcpi_unacked
