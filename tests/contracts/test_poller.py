"""What every Poller promises (ztun.ports.Poller): Linux's on epoll, and macOS's on a stand-in for kqueue; in a loop of
its own, and nested in one of somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from contracts.systems import SYSTEMS, make_loop, make_nesting_loop, poller_of
from ztun.ports import ENDED, READABLE, WRITABLE, Poller

HELLO = b"hello"


def poller() -> Poller:
    return poller_of(asyncio.get_running_loop())


@contextlib.contextmanager
def pairs(count: int = 1) -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    """Connected pairs (near, far); the near ones are watched, and closed as those are that nobody watches any more."""
    made = [socket.socketpair() for _ in range(count)]
    for pair in made:
        for sock in pair:
            sock.setblocking(False)
    try:
        yield made
    finally:
        for near, far in made:
            if near.fileno() >= 0:
                poller().closing(near.fileno())
            near.close()
            far.close()


class Owner:
    """Somebody who is told."""

    def __init__(self, then: Callable[[int], None] = lambda mask: None) -> None:
        self.told: list[int] = []
        self._then = then

    def __call__(self, mask: int) -> None:
        self.told.append(mask)
        self._then(mask)


async def settle() -> None:
    """Long enough for everything that is there to be delivered, several times over."""
    for _ in range(6):
        await asyncio.sleep(0)


def fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65536))


def drain(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := sock.recv(65536):
            data += piece
    return data


def void(result: object) -> None:
    pass


def complaints() -> list[dict[str, Any]]:
    """What is said to asyncio's exception handler from now on."""
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    return heard


# What is news.


async def test_bytes_are_told_once_whether_they_are_read_or_not() -> None:
    owner = Owner()
    with pairs() as [(near, far)]:
        poller().watch(near.fileno(), owner)
        await settle()
        assert owner.told == []
        far.send(HELLO)
        await settle()
        assert owner.told == [READABLE]
        far.send(HELLO)
        await settle()
        assert owner.told == [READABLE] * 2
        assert drain(near) == HELLO * 2
        await settle()
        assert owner.told == [READABLE] * 2


async def test_the_pulse_comes_before_the_news() -> None:
    """Whoever stood still says that he lives before he says anything else."""
    order: list[str] = []
    poller().pulse = lambda: order.append("pulse")
    with pairs() as [(near, far)]:
        poller().watch(near.fileno(), lambda mask: order.append("news"))
        far.send(HELLO)
        await settle()
    assert "news" in order
    assert order[order.index("news") - 1] == "pulse"


async def test_what_was_there_before_it_was_watched_is_news() -> None:
    owner = Owner()
    with pairs() as [(near, far)]:
        far.send(HELLO)
        poller().watch(near.fileno(), owner)
        await settle()
        assert owner.told == [READABLE]


@pytest.mark.parametrize("end", [lambda sock: sock.shutdown(socket.SHUT_WR), lambda sock: sock.close()])
async def test_the_end_is_told_apart_from_bytes(end: Callable[[socket.socket], None]) -> None:
    owner = Owner()
    with pairs() as [(near, far)]:
        poller().watch(near.fileno(), owner)
        far.send(HELLO)
        end(far)
        await settle()
        assert len(owner.told) == 1  # both at once: who stops to read behind the bytes hears of the end no more
        assert owner.told[0] & READABLE
        assert owner.told[0] & ENDED


async def test_room_is_told_to_who_writes_when_there_is_some_again() -> None:
    owner = Owner()
    with pairs() as [(near, far)]:
        poller().watch(near.fileno(), owner, writing=True)
        await settle()
        assert owner.told == [WRITABLE]
        fill(near)
        await settle()
        assert owner.told == [WRITABLE]
        drain(far)
        await settle()
        assert owner.told[1:]
        assert all(mask == WRITABLE for mask in owner.told)


async def test_who_wants_to_write_later_is_told_of_the_room_that_is_there() -> None:
    owner = Owner()
    with pairs() as [(near, _)]:
        poller().watch(near.fileno(), owner)
        await settle()
        assert owner.told == []
        poller().want_write(near.fileno())
        await settle()
        assert owner.told == [WRITABLE]


async def test_a_level_is_told_until_it_is_read() -> None:
    owner = Owner()
    with pairs() as [(near, far)]:
        poller().watch_level(near.fileno(), owner)
        far.send(HELLO)
        await settle()
        assert owner.told[2:]
        drain(near)
        told = len(owner.told)
        await settle()
        assert len(owner.told) == told


# Who is told.


async def test_handed_over_news_go_to_the_new_owner_and_old_bytes_are_none() -> None:
    first, second = Owner(), Owner()
    with pairs() as [(near, far)]:
        poller().watch(near.fileno(), first)
        far.send(HELLO)
        await settle()
        poller().hand_over(near.fileno(), second)
        await settle()
        assert (first.told, second.told) == ([READABLE], [])
        far.send(HELLO)
        await settle()
        assert (first.told, second.told) == ([READABLE], [READABLE])


async def test_handed_over_by_a_neighbour_in_the_same_batch() -> None:
    with pairs(2) as [(one, to_one), (two, to_two)]:
        before, after = Owner(), Owner()
        poller().watch(one.fileno(), lambda mask: poller().hand_over(two.fileno(), after))
        poller().watch(two.fileno(), before)
        to_one.send(HELLO)
        to_two.send(HELLO)
        await settle()
        assert (before.told, after.told) == ([], [READABLE])


async def test_nobody_is_told_of_what_is_not_watched_any_more() -> None:
    owner = Owner()
    with pairs() as [(near, far)]:
        poller().watch(near.fileno(), owner)
        poller().unwatch(near.fileno())
        poller().unwatch(near.fileno())
        far.send(HELLO)
        await settle()
        assert owner.told == []
        assert await asyncio.get_running_loop().sock_recv(near, 100) == HELLO  # it may be asyncio's now


async def test_closing_is_enough() -> None:
    """The number is free for another descriptor, which has an owner of its own."""
    first, second = Owner(), Owner()
    with pairs() as [(near, far)], pairs() as [(other, to_other)]:
        number = near.fileno()
        poller().watch(number, first)
        far.send(HELLO)
        poller().closing(number)
        near.close()
        await settle()
        os.dup2(other.fileno(), number)
        poller().watch(number, second)
        to_other.send(HELLO)
        await settle()
        poller().closing(number)
        os.close(number)
        assert (first.told, second.told) == ([], [READABLE])


async def test_an_event_of_a_number_that_was_given_away_meanwhile() -> None:
    """It was for the one before: the new owner finds nothing there, and nobody else is told."""
    heard, empty = complaints(), []
    with pairs(2) as [(one, to_one), (two, to_two)], pairs() as [(fresh, to_fresh)]:
        number = two.fileno()
        old = Owner()

        def look(mask: int) -> None:
            try:
                assert os.read(number, 100) == b"first"
            except BlockingIOError:
                empty.append(mask)

        new = Owner(look)

        def give_away(mask: int) -> None:
            poller().closing(number)
            two.close()
            os.dup2(fresh.fileno(), number)
            poller().watch(number, new)

        poller().watch(one.fileno(), give_away)
        poller().watch(number, old)
        to_one.send(HELLO)
        to_two.send(HELLO)
        await settle()
        assert old.told == []
        assert new.told == empty == [READABLE]
        to_fresh.send(b"first")
        await settle()
        assert new.told == [READABLE] * 2
        assert not heard
        poller().closing(number)
        os.close(number)


async def test_what_cannot_be_watched_leaves_nothing_behind(tmp_path: Path) -> None:
    """A plain file has no readiness (epoll_ctl(2), EPERM). Its number may be a socket's next."""
    owner = Owner()
    number = os.open(tmp_path / "plain", os.O_CREAT | os.O_RDWR)
    with pytest.raises(PermissionError):
        poller().watch(number, owner)
    with pytest.raises(PermissionError):
        poller().watch_level(number, owner)
    loop = asyncio.get_running_loop()
    with pairs() as [(near, far)]:
        os.dup2(near.fileno(), number)
        read: list[bytes] = []
        loop.add_reader(number, lambda: read.append(os.read(number, 100)))
        far.send(HELLO)
        await settle()
        assert read == [HELLO]
        loop.remove_reader(number)
    os.close(number)
    assert owner.told == []


# Turns.


async def test_the_others_have_their_turn_before_it_goes_on() -> None:
    log: list[str] = []
    with pairs() as [(near, far)]:

        def busy(mask: int) -> None:
            assert mask == 0
            log.append("busy")
            if log.count("busy") == 1:
                far.send(HELLO)
            if log.count("busy") < 3:
                poller().again(busy)

        poller().watch(near.fileno(), lambda mask: log.append("news"))
        poller().again(busy)
        await settle()
    assert log == ["busy", "news", "busy", "busy"]


async def test_a_task_is_woken_from_a_handler() -> None:
    """The loop waits for something that is far away, and must come back for what a handler set off."""
    loop = asyncio.get_running_loop()
    with pairs() as [(near, far)]:
        woken = loop.create_future()
        poller().watch(near.fileno(), woken.set_result)
        threading.Timer(0.05, far.send, [HELLO]).start()
        assert await asyncio.wait_for(woken, 5) == READABLE


async def test_a_timer_that_a_handler_sets_is_minded() -> None:
    loop = asyncio.get_running_loop()
    with pairs() as [(near, far)]:
        rung = loop.create_future()
        owner = Owner(lambda mask: void(loop.call_later(0.02, rung.set_result, None)))
        poller().watch(near.fileno(), owner)
        threading.Timer(0.05, far.send, [HELLO]).start()
        await asyncio.wait_for(rung, 5)


async def test_a_timer_rings_while_there_are_events_without_end() -> None:
    with pairs() as [(near, far)]:
        far.send(HELLO)
        owner = Owner()
        poller().watch_level(near.fileno(), owner)
        await asyncio.wait_for(asyncio.sleep(0.05), 5)
        assert owner.told[10:]
        poller().unwatch(near.fileno())


# Defects.


async def test_a_defect_of_one_costs_the_others_nothing() -> None:
    heard = complaints()

    def fails(*mask: int) -> None:
        raise ZeroDivisionError

    with pairs(3) as made:
        owners = [Owner(), Owner(fails), Owner()]
        for owner, (near, far) in zip(owners, made, strict=True):
            poller().watch(near.fileno(), owner)
            far.send(HELLO)
        more = Owner()
        for handler in (fails, more):
            poller().again(handler)
        await settle()
        assert [owner.told for owner in owners] == [[READABLE]] * 3
        assert more.told == [0]
        assert [type(context["exception"]) for context in heard] == [ZeroDivisionError] * 2


# Beside asyncio.


async def test_streams_on_the_same_loop() -> None:
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
        writer.close()

    owner = Owner()
    async with await asyncio.start_server(upper, "127.0.0.1", 0, limit=1 << 23) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        with pairs() as [(near, far)]:
            poller().watch(near.fileno(), owner)
            for _ in range(20):
                far.send(HELLO)
                writer.write(b"hello\n")
                assert await asyncio.wait_for(reader.readline(), 5) == b"HELLO\n"
                await settle()
            assert len(owner.told) == 20
        writer.write(bytes(4_000_000) + b"\n")  # more than a socket takes: asyncio's writers
        assert len(await asyncio.wait_for(reader.readexactly(4_000_001), 5)) == 4_000_001
        writer.close()
        await writer.wait_closed()


async def test_readers_and_writers_by_object_and_by_number() -> None:
    loop = asyncio.get_running_loop()
    log: list[str] = []
    with pairs() as [(near, far)]:
        loop.add_reader(near, log.append, "not this one")
        loop.add_reader(near.fileno(), lambda: log.append(drain(near).decode()))
        loop.add_writer(near, lambda: log.append("room" * loop.remove_writer(near.fileno())))
        far.send(HELLO)
        await settle()
        assert sorted(log) == ["hello", "room"]
        assert loop.remove_reader(near)
        assert not loop.remove_reader(near)
        far.send(HELLO)
        await settle()
        assert len(log) == 2


async def test_a_reader_whose_descriptor_was_closed_first() -> None:
    loop = asyncio.get_running_loop()
    owner = Owner()
    with pairs() as [(near, _)], pairs() as [(other, to_other)]:
        loop.add_reader(near, lambda: None)
        number = near.fileno()
        near.close()
        assert loop.remove_reader(near)
        os.dup2(other.fileno(), number)
        loop.add_reader(number, lambda: owner(len(os.read(number, 100))))
        to_other.send(HELLO)
        await settle()
        assert owner.told == [5]
        loop.remove_reader(number)
        os.close(number)


async def test_signals_and_threads_wake_the_loop() -> None:
    loop = asyncio.get_running_loop()
    signalled, called = loop.create_future(), loop.create_future()
    loop.add_signal_handler(signal.SIGUSR1, signalled.set_result, None)
    try:
        threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGUSR1]).start()
        threading.Timer(0.04, loop.call_soon_threadsafe, [called.set_result, None]).start()
        await asyncio.wait_for(asyncio.gather(signalled, called), 5)
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


async def test_a_subprocess() -> None:
    process = await asyncio.create_subprocess_exec("echo", "hello", stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 10)
    assert (output, process.returncode) == (b"hello\n", 0)


@pytest.mark.parametrize("system", SYSTEMS)
def test_each_loop_has_one_poller(system: str) -> None:
    loops = [make_loop(system), make_loop(system), make_nesting_loop(system), make_nesting_loop(system)]
    try:
        pollers = [poller_of(loop) for loop in loops]
        assert [poller_of(loop) for loop in loops] == pollers
        assert len(set(map(id, pollers))) == 4
    finally:
        for loop in loops:
            loop.close()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_loop_can_be_stopped_from_a_handler(system: str) -> None:
    loop = make_loop(system)
    near, far = socket.socketpair()
    with near, far:
        poller_of(loop).watch(near.fileno(), lambda mask: loop.stop())
        threading.Timer(0.02, far.send, [HELLO]).start()
        late = loop.call_later(60, lambda: None)
        loop.run_forever()
        assert not late.cancelled()
        assert late.when() > loop.time() + 30
    loop.close()


# Many.


@contextlib.contextmanager
def descriptors(wanted: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, wanted), hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_thousand_at_once_are_each_told_once() -> None:
    with descriptors(3000), pairs(1000) as made:
        owners = [Owner() for _ in made]
        for owner, (near, _) in zip(owners, made, strict=True):
            poller().watch(near.fileno(), owner)
        for round_ in range(1, 4):
            for _, far in made:
                far.send(HELLO)
            await settle()
            assert all(len(owner.told) == round_ for owner in owners)
        await settle()
        assert all(owner.told == [READABLE] * 3 for owner in owners)
        assert all(drain(near) == HELLO * 3 for near, _ in made)
