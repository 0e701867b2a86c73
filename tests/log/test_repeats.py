"""Repeats: a token bucket for each kind of line, and a count of what was held back that comes on time."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from log.conftest import Log
from ztun.log.repeats import WINDOW, Limit, Repeats

LIMIT = Limit(burst=3, per_second=0.5)


def test_a_burst_passes_and_then_as_many_as_the_rate_says() -> None:
    repeats: Repeats[str] = Repeats()

    admitted = [time for time in range(20) if repeats.admit("line", Limit(3, 0.25), float(time))]

    # 0, 1, 2 from the burst of 3, which had 3/4 of a line more by then; then one every four seconds.
    assert admitted == [0, 1, 2, 4, 8, 12, 16]
    assert repeats.suppressed == 13


def test_kinds_have_a_bucket_each() -> None:
    repeats: Repeats[str] = Repeats()

    assert [repeats.admit("one", LIMIT, 0.0) for _ in range(4)] == [True, True, True, False]
    assert repeats.admit("other", LIMIT, 0.0)


def test_the_count_is_due_when_the_window_ends_and_not_before() -> None:
    repeats: Repeats[str] = Repeats(window=10.0)
    for number in range(3 + 7):
        repeats.admit("line", LIMIT, number / 1000)

    assert repeats.next_end == 0.003 + 10.0
    assert repeats.ended(10.0) == []
    assert repeats.ended(10.003) == [("line", 7)]
    assert repeats.next_end is None
    assert repeats.ended(1e9) == []


def test_windows_of_different_kinds_end_on_their_own() -> None:
    repeats: Repeats[str] = Repeats(window=10.0)
    for kind, at in (("early", 0.0), ("late", 4.0)):
        for _ in range(4):
            repeats.admit(kind, LIMIT, at)

    assert repeats.ended(10.0) == [("early", 1)]
    assert repeats.next_end == 14.0
    assert repeats.ended(14.0) == [("late", 1)]


def test_the_number_of_kinds_is_bounded() -> None:
    repeats: Repeats[int] = Repeats()
    for _ in range(4):
        repeats.admit(-1, LIMIT, 0.0)
    for number in range(100_000):
        assert repeats.admit(number, LIMIT, 0.0)

    assert len(repeats._kinds) <= 1024
    assert repeats.ended(100.0) == [(-1, 1)]  # what was held back is not forgotten for it


_Line = tuple[str, float]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 20)), max_size=60),
    st.integers(1, 5),
    st.sampled_from([0.25, 1.0, 4.0]),
)
def test_it_does_what_a_naive_bucket_does(lines: list[_Line], burst: int, rate: float) -> None:
    """The naive one keeps every kind's level from line to line, and looks through all windows whenever asked."""
    repeats: Repeats[str] = Repeats(window=5.0)
    level: dict[str, float] = {}
    last: dict[str, float] = {}
    windows: dict[str, list[float]] = {}
    now = 0.0
    for kind, wait in lines:
        now += wait
        expected_counts = sorted((k, len(held)) for k, held in windows.items() if held and held[0] + 5.0 <= now)
        windows = {k: held for k, held in windows.items() if not held or held[0] + 5.0 > now}
        assert sorted(repeats.ended(now)) == expected_counts

        level[kind] = min(burst, level.get(kind, burst) + (now - last.get(kind, now)) * rate)
        last[kind] = now
        expected = level[kind] >= 1
        if expected:
            level[kind] -= 1
        else:
            windows.setdefault(kind, []).append(now)
        assert repeats.admit(kind, Limit(burst, rate), now) == expected


async def test_the_count_comes_without_another_event(log: Log) -> None:
    log.configure(repeats=Limit(2, 0.001))
    log.system.admission.repeats._window = 0.05
    log.system.attach(asyncio.get_running_loop())
    for number in range(7):
        log.get("ztun.dns").warning("it happened again", number=number)
    assert log.said("number") == [0, 1]

    await asyncio.sleep(0.2)

    count = log.events[-1]
    assert (count["event"], count["of"], count["count"]) == ("lines suppressed", "it happened again", 5)
    assert (count["level"], count["logger"]) == ("warning", "ztun.dns")
    assert log.system.statistics()["suppressed"] == 5
    assert len(log.events) == 3
    log.system.detach()


async def test_counts_are_written_when_the_process_ends_within_the_window(log: Log) -> None:
    log.configure(repeats=Limit(1, 0.001))
    log.system.attach(asyncio.get_running_loop())
    for _ in range(4):
        log.get().info("again")
    log.system.detach()

    assert [(event["event"], event.get("count")) for event in log.events] == [("again", None), ("lines suppressed", 3)]


async def test_what_another_thread_repeats_is_counted_too(log: Log) -> None:
    log.configure(repeats=Limit(1, 0.001))
    log.system.admission.repeats._window = 0.05
    log.system.attach(asyncio.get_running_loop())

    def repeat() -> None:
        for _ in range(100):
            log.get().info("again")

    await asyncio.gather(*(asyncio.to_thread(repeat) for _ in range(4)))
    await asyncio.sleep(0.2)
    log.system.detach()

    assert sum(event.get("count", 0) for event in log.events) == 399


def test_a_line_below_the_level_takes_nothing_from_the_bucket(log: Log) -> None:
    log.configure(repeats=Limit(1, 0.001))
    for _ in range(5):
        log.get().debug("detail")
    assert log.system.statistics()["suppressed"] == 0


def test_without_a_limit_everything_is_written(log: Log) -> None:
    log.configure(repeats=None, flows=None)
    for _ in range(2000):
        log.get().info("again")
        log.get("ztun.flow").info("flow ended")

    assert len(log.events) == 4000


def test_flows_have_a_limit_of_their_own(log: Log) -> None:
    log.configure(repeats=Limit(1, 0.001), flows=Limit(20, 0.001))
    for _ in range(50):
        log.get("ztun.flow").info("flow ended")

    assert len(log.events) == 20


def test_the_window_is_that_of_the_document(log: Log) -> None:
    values: dict[str, Any] = {}
    log.configure(repeats=Limit(1, 0.001))
    log.get().info("a")
    log.get().info("a")
    log.system.detach()
    values.update(log.events[-1])
    assert values["seconds"] == WINDOW == 10.0
