"""A bounded slice of `make fuzz`: every target on inputs that hypothesis makes, and on long ones that a seed makes."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.targets import TARGETS

_LONG = 300  # inputs of full length to each target


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_breaks_on_made_up_inputs(name: str) -> None:
    target = TARGETS[name]
    beginning = st.sampled_from([b"", *target.seeds])

    @given(beginning, st.binary(max_size=min(target.size, 600)))
    @settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def play(start: bytes, data: bytes) -> None:
        target.run((start + data)[: target.size])

    play()


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_breaks_on_long_inputs(name: str) -> None:
    chance = random.Random(name)
    for _ in range(_LONG):
        TARGETS[name].run(chance.randbytes(TARGETS[name].size))


@pytest.mark.parametrize("name", TARGETS)
def test_memory_stays_flat(name: str) -> None:
    """What an input leaves behind would add up: the second and the third time nothing may be left."""
    chance = random.Random(name)
    inputs = [chance.randbytes(min(TARGETS[name].size, 1024)) for _ in range(20)]

    def play() -> int:
        for data in inputs:
            TARGETS[name].run(data)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        play()
        before = play()
        assert play() - before < 20_000
    finally:
        tracemalloc.stop()


def test_the_targets_can_fail() -> None:
    """A checksum that is off by one does not pass for right."""
    from fuzz import packets

    good = packets.VNET.pack(0, 0, 0, 0, 0, 0) + packets.icmp(4, 0, 0, b"1234")
    packets.check(good)
    with pytest.raises(AssertionError):
        packets.check(good[:-1] + b"5")
