"""Maps that are memory: what is entered is found by its hash, and a full bucket is said to be full."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ztun.platform.linux.mapped import Carried, News, flow_hash

BUCKETS, SLOTS = 4, 2
KEYS = st.binary(min_size=36, max_size=36)


@pytest.fixture
def carried() -> Iterator[Carried]:
    """In a file without a name: a map is nothing else to this side of it."""
    fd = os.memfd_create("carried")
    os.truncate(fd, BUCKETS * SLOTS * 4)
    table = Carried(fd, BUCKETS, SLOTS)
    os.close(fd)
    yield table
    table.close()


@given(key=KEYS)
def test_a_hash_is_that_of_the_program(key: bytes) -> None:
    """Digit by digit, as C has it."""
    total = sum(word << place for place, word in enumerate(struct.unpack("=9I", key)))
    assert flow_hash(key) == total % (2**31 - 1) * 1640531527 % (2**31 - 1)


def test_neighbours_have_buckets_of_their_own() -> None:
    """One client's ports, one after the other, as a kernel gives them."""
    keys = [bytes(32) + struct.pack("!HH", port, 443) for port in range(32768, 61000)]
    buckets: dict[int, int] = {}
    for key in keys:
        bucket = flow_hash(key) % 32768
        buckets[bucket] = buckets.get(bucket, 0) + 1
    assert max(buckets.values()) <= 4


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("enter"), KEYS, st.integers(0, 32767), st.booleans()),
            st.tuples(st.just("leave"), st.integers(0, BUCKETS * SLOTS)),
        ),
        max_size=40,
    )
)
def test_it_holds_what_was_entered_and_did_not_leave(carried: Carried, steps: list[tuple[object, ...]]) -> None:
    """Against a list for each bucket."""
    carried.forget_all()
    entered: dict[int, tuple[int, int, bool]] = {}  # slot -> hash, place, way
    for step in steps:
        if step[0] == "enter":
            _, key, place, down = step
            assert isinstance(key, bytes)
            assert isinstance(place, int)
            hashed = flow_hash(key)
            slot = carried.enter(key, place, down=bool(down))
            crowd = [one for one in entered if one // SLOTS == hashed % BUCKETS]
            assert (slot == -1) == (len(crowd) == SLOTS)
            if slot >= 0:
                assert slot not in entered
                assert slot // SLOTS == hashed % BUCKETS
                entered[slot] = hashed, place, bool(down)
        elif entered:
            index = step[1]
            assert isinstance(index, int)
            slot = sorted(entered)[index % len(entered)]
            carried.leave(slot)
            del entered[slot]
        for slot, word in enumerate(carried._slots):
            assert (word != 0) == (slot in entered)
            if word:
                hashed, place, way = entered[slot]
                assert (word >> 1 & 0x7FFF, bool(word & 1), word >> 16) == (place, way, hashed >> 15 | 1)


def test_places_of_the_same_hash_are_likely(carried: Carried) -> None:
    key = bytes(36)
    carried.enter(key, 7, down=True)
    carried.enter(key, 8, down=False)
    assert carried.likely(key, down=True) == [7]
    assert carried.likely(key, down=False) == [8]
    assert carried.likely(b"\1" + bytes(35), down=True) == []


def test_leaving_what_found_no_room_is_nothing(carried: Carried) -> None:
    carried.leave(-1)
    assert not any(carried._slots)


def test_news_is_told_once() -> None:
    fd = os.memfd_create("news")
    os.truncate(fd, 64)
    news = News(fd, 64)
    for place in (63, 0, 17):
        os.pwrite(fd, b"\1", place)
    assert news.take() == [0, 17, 63]
    assert news.take() == []
    os.pwrite(fd, b"\1", 17)
    assert news.take() == [17]
    news.close()
    os.close(fd)
