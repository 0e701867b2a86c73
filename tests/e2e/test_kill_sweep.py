"""SIGKILL at more than 200 points of start, run, stop and sweep: the host is as before, each time.

After each kill the host itself and direct traffic of the LAN work; after the next `ztun down`, or `ztun up` and an end
in peace, every route, rule, filter, qdisc, sysctl, table of nft and file is what it was. Figures: docs/reliability.md.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from e2e.kill_world import (
    CLIENT4,
    CLIENT6,
    GATEWAY4,
    TUNNELLED4,
    UPSTREAM4,
    UPSTREAM6,
    KillWorld,
    Run,
    bpf_exists,
    configuration,
    is_dead,
)
from ztun.lab.namespace import wait_until
from ztun.lab.ztun import command

BACKENDS = ("tcx", "clsact", "routes")
# Points of each backend, by phase.
SPREAD = {"start": 30, "run": 8, "stop": 20, "sweep": 8}
LANES = 2
REAL = 4  # of each backend: fresh processes, killed from outside, at random times


class Point(NamedTuple):
    """Where a run is killed: before call `at` of `phase`, of some `count` of them."""

    number: int
    backend: str
    phase: str
    at: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.backend} {self.phase} {self.at}/{self.count}"

    def is_turn(self, every: int) -> bool:
        """Whether it is one of those, one in `every`, of each backend, that are done in another way."""
        return self.number // len(BACKENDS) % every == every - 1


@dataclass
class Figures:
    """What came of the points. slowest: what was tried -> the most seconds it took after a kill."""

    killed: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def took(self, what: str, seconds: float) -> None:
        self.slowest[what] = max(self.slowest.get(what, 0.0), seconds)


class Lane:
    """One world and its share of the points."""

    def __init__(self, world: KillWorld) -> None:
        self.world = world
        self.figures = Figures()
        self.before: dict[str, str] = {}

    def configured(self, point: Point, fail: str) -> str:
        # Some have another TUN, so that some start on the left-overs of another name.
        tun = "zt1" if point.is_turn(3) else "ztun0"
        host = not point.is_turn(4)
        made = configuration(self.world.directory, point.backend, fail=fail, tun=tun, host=host)
        return str(self.world.configure("config", made))

    def count(self, backend: str) -> dict[str, int]:
        """How many calls there are in each phase of an undisturbed run."""
        world, path = self.world, self.configured(Point(0, backend, "", 0, 0), "open")
        counts = {}
        for phase in ("start", "stop"):
            world.forget_output()
            with world.launched("up", "--config", path, phase=phase) as (pid, ended):
                world.await_up(pid)
                assert world.reached(world.client, UPSTREAM4) == CLIENT4
                world.time_until(world.client, TUNNELLED4, TUNNELLED4)
                os.kill(pid, signal.SIGTERM)
            assert ended[0].status == 0, world.output()
            assert world.changes(self.before) == []
            counts[phase] = ended[0].count
        # The calls of the stop were counted with the start's.
        return {"start": counts["start"] - counts["stop"], "run": 40, "stop": counts["stop"], "sweep": 60}

    def check(self, point: Point) -> None:
        """Kill there, look, clean up, compare."""
        fail = "closed" if point.is_turn(5) else "open"
        path = self.configured(point, fail)
        run = self.kill(point, path)
        self.look(point, fail)
        if point.is_turn(7):
            return  # what is left is the next one's to live with
        self.clean_up(point, path)
        left = self.world.changes(self.before)
        assert left == [], left
        assert [each for each in run.ids if bpf_exists(*each)] == []

    def kill(self, point: Point, path: str) -> Run:
        world = self.world
        world.forget_output()
        phase = "run" if point.phase == "sweep" else point.phase
        at = 3 if point.phase == "sweep" else point.at
        with world.launched("up", "--config", path, phase=phase, at=at, compiled=not point.is_turn(3)) as (pid, ended):
            if phase != "start":
                world.await_up(pid)
            if phase == "run":
                self.disturb(pid)
            elif phase == "stop":
                os.kill(pid, signal.SIGTERM)
        if point.phase == "sweep":
            ended.append(world.run("down", "--config", path, at=point.at))
        (self.figures.killed if ended[-1].status == -signal.SIGKILL else self.figures.ended)[point.phase] += 1
        assert ended[-1].status in (0, 1, -signal.SIGKILL), (ended, world.output())
        return Run(ended[-1].status, ended[-1].count, ended[0].ids)

    def disturb(self, pid: int) -> None:
        """Give a running gateway something to do until it is dead."""
        gateway = self.world.gateway
        for _ in range(20):
            gateway.run("ip", "address", "add", "10.7.0.9/24", "dev", "lan1", check=False)
            self.world.reached(self.world.client, TUNNELLED4)
            gateway.run("ip", "address", "del", "10.7.0.9/24", "dev", "lan1", check=False)
            for tun in ("ztun0", "zt1"):
                gateway.run("ip", "link", "set", tun, "down", check=False)
            if wait_until(lambda: is_dead(pid), 0.2):
                return
        os.kill(pid, signal.SIGKILL)

    def look(self, point: Point, fail: str) -> None:
        world, figures = self.world, self.figures
        figures.took("host", world.time_until(world.gateway, UPSTREAM4, GATEWAY4))
        figures.took("direct", world.time_until(world.client, UPSTREAM4, CLIENT4))
        figures.took("direct, IPv6", world.time_until(world.client, UPSTREAM6, CLIENT6))
        if fail == "open" and (point.backend != "clsact" or point.is_turn(2)):
            seconds = world.time_until(world.client, TUNNELLED4, CLIENT4)
            figures.took(f"tunnelled, fail open, {point.backend}", seconds)
            seconds = world.time_until(world.gateway, TUNNELLED4, GATEWAY4)
            figures.took(f"the host's own, tunnelled, fail open, {point.backend}", seconds)
        elif fail == "closed" and point.backend != "tcx" and point.phase == "run":
            assert world.reached(world.client, TUNNELLED4) is None

    def clean_up(self, point: Point, path: str) -> None:
        world = self.world
        if not point.is_turn(6):
            assert world.run("down", "--config", path).status in (0, 1), world.output()
            return
        world.forget_output()
        with world.launched("up", "--config", path) as (pid, ended):
            world.await_up(pid)
            world.time_until(world.client, TUNNELLED4, TUNNELLED4)
            os.kill(pid, signal.SIGTERM)
        assert ended[0].status == 0, world.output()

    def kill_for_real(self, backend: str, seconds: float) -> None:
        """A process of its own, killed from outside: also while it imports, and while the compiler runs."""
        point = Point(0, backend, "real", 0, 0)
        path = self.configured(point, "open")
        with (self.world.directory / "output").open("ab") as output:
            process = self.world.gateway.spawn(*command("up", "--config", path), stdout=output, stderr=output)
        time.sleep(seconds)
        process.kill()
        process.wait()
        self.figures.killed["real"] += 1
        self.look(point, "open")
        self.clean_up(point, path)
        assert self.world.changes(self.before) == []


def spread(count: int, points: int) -> list[int]:
    """`points` numbers from 1 to `count`, as evenly as can be."""
    return [1 + index * (count - 1) // max(1, points - 1) for index in range(points)]


def plan(counts: dict[str, dict[str, int]]) -> Iterator[Point]:
    number = 0
    for phase, points in SPREAD.items():
        for index in range(points):
            for backend in BACKENDS:
                count = counts[backend][phase]
                yield Point(number, backend, phase, spread(count, points)[index], count)
                number += 1


def play(lane: Lane, points: Iterable[Point], seed: int) -> Figures:
    for point in points:
        try:
            lane.check(point)
        except Exception as error:
            lane.figures.failures.append(f"{point.name}: {error!r}")
            if len(lane.figures.failures) > 5:
                return lane.figures
            lane.world.run("down", "--config", str(lane.world.directory / "config.json"))
    chance = random.Random(seed)
    for backend in BACKENDS:
        for _ in range(REAL // LANES):
            lane.kill_for_real(backend, chance.uniform(0.2, 2.5))
    return lane.figures


@pytest.fixture
def lanes() -> Iterator[list[Lane]]:
    worlds = [KillWorld(f"zk{os.getpid()}{number}") for number in range(LANES)]
    try:
        yield [Lane(world.__enter__()) for world in worlds]
    finally:
        for world in worlds:
            world.close()


@pytest.mark.timeout(1500)
def test_killed_anywhere_it_leaves_the_host_as_it_was(lanes: list[Lane]) -> None:
    for lane in lanes:
        lane.before = lane.world.state()
    counts = {backend: lanes[0].count(backend) for backend in BACKENDS}
    for backend in BACKENDS:
        lanes[1].count(backend)  # has the programs compiled there, too
    points = list(plan(counts))
    with ThreadPoolExecutor(LANES) as pool:
        shares = [pool.submit(play, lane, points[number::LANES], number) for number, lane in enumerate(lanes)]
        figures = [share.result() for share in shares]
    for each in figures:
        print(each)
    assert [failure for each in figures for failure in each.failures] == []
    killed = sum((each.killed for each in figures), Counter())
    assert killed.total() >= 200, killed
