"""The Fake-IP pool against a naive model, and its rules one by one."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ztun.names.pool import FakeIp, FakeIpPool, PoolExhaustedError

RANGE4 = IPv4Network("198.18.0.0/24")
RANGE6 = IPv6Network("2001:2::/112")
SIZE, REST = 4, 10.0


def make_pool(size: int = SIZE, rest: float = REST, store: FakeStore | None = None) -> FakeIpPool:
    return FakeIpPool(RANGE4, RANGE6, size, rest, store)


def shown(fake: FakeIp) -> tuple[str, str]:
    assert fake.v6 is not None
    return str(ip_address(fake.v4)), str(ip_address(fake.v6))


class FakeStore:
    """A NameStore in memory that notes what it was told, oldest first."""

    def __init__(self, kept: dict[int, str] | None = None) -> None:
        self.kept = kept or {}

    def load(self) -> dict[int, str]:
        return dict(self.kept)

    def save(self, slot: int, name: str) -> None:
        self.kept.pop(slot, None)
        self.kept[slot] = name

    def close(self) -> None:
        pass


def test_first_addresses_follow_the_networks_and_the_tuns_own() -> None:
    pool = make_pool()
    assert shown(pool.assign("a.example", 0)) == ("198.18.0.2", "2001:2::2")
    assert shown(pool.assign("b.example", 0)) == ("198.18.0.3", "2001:2::3")


def test_last_slot_of_a_full_range_stops_short_of_the_broadcast_address() -> None:
    room = FakeIpPool.capacity(RANGE4, RANGE6)
    pool = make_pool(room)
    last = [pool.assign(f"n{number}", 0) for number in range(room)][-1]
    assert shown(last) == ("198.18.0.254", "2001:2::fe")


@pytest.mark.parametrize("size", [0, -1, 254])
def test_size_that_does_not_fit_the_ranges_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="room for 1 to 253"):
        make_pool(size)


def test_names_differ_neither_by_case_nor_by_the_final_dot() -> None:
    pool = make_pool()
    assert pool.assign("WWW.Example.", 0) == pool.assign("www.example", 1)
    assert pool.name_of(pool.assign("WWW.example", 2).v4) == "www.example"


def test_without_an_ipv6_range_there_are_no_ipv6_addresses() -> None:
    pool = FakeIpPool(RANGE4, None, SIZE, REST)
    assert pool.assign("a", 0).v6 is None
    assert not pool.contains(ip_address("2001:2::2").packed)
    assert pool.name_of(ip_address("2001:2::2").packed) is None


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("198.18.0.0", True),
        ("198.18.0.1", True),
        ("198.18.0.255", True),
        ("198.17.255.255", False),
        ("198.18.1.0", False),
        ("2001:2::", True),
        ("2001:2::ffff", True),
        ("2001:2::1:0", False),
        ("::c612:2", False),
    ],
)
def test_range_contains_all_its_addresses_assigned_or_not(address: str, inside: bool) -> None:
    pool = make_pool()
    assert pool.contains(ip_address(address).packed) is inside
    assert pool.name_of(ip_address(address).packed) is None


def test_least_recently_used_name_gives_way_once_it_has_rested() -> None:
    pool = make_pool(2)
    first, second = pool.assign("a", 0), pool.assign("b", 1)
    pool.assign("a", 2)  # now b is the oldest
    with pytest.raises(PoolExhaustedError):
        pool.assign("c", 10.5)
    assert pool.name_of(second.v4) == "b"  # a failed attempt takes nothing away
    assert pool.assign("c", 11) == second
    assert pool.name_of(second.v4) == "c"
    assert pool.name_of(first.v4) == "a"


def test_live_address_is_never_given_away_and_rests_after_its_last_flow() -> None:
    pool = make_pool(1)
    fake = pool.assign("a", 0)
    assert fake.v6 is not None
    pool.acquire(fake.v4)
    pool.acquire(fake.v6)  # the same slot, by its other address
    pool.release(fake.v4)
    with pytest.raises(PoolExhaustedError, match="live flows"):
        pool.assign("b", 1000)
    pool.release(fake.v6)
    with pytest.raises(PoolExhaustedError, match="rest"):
        pool.assign("b", 1001)
    with pytest.raises(PoolExhaustedError):
        pool.assign("b", 1010.9)
    assert pool.assign("b", 1011) == fake


def test_release_without_acquire_and_acquire_of_nothing_are_mistakes_of_the_caller() -> None:
    pool = make_pool()
    fake = pool.assign("a", 0)
    with pytest.raises(ValueError, match="no live flow"):
        pool.release(fake.v4)
    with pytest.raises(ValueError, match="no name"):
        pool.acquire(ip_address("198.18.0.3").packed)


def test_statistics_count_slots() -> None:
    pool = make_pool()
    pool.acquire(pool.assign("a", 0).v4)
    pool.acquire(pool.assign("a", 0).v4)
    pool.assign("b", 0)
    assert pool.statistics() == {"size": SIZE, "assigned": 2, "live": 1}


def test_restart_keeps_addresses_and_their_order_and_lets_them_rest() -> None:
    store = FakeStore()
    before = make_pool(2, store=store)
    fakes = {name: before.assign(name, 0) for name in ("a", "b")}
    before.assign("a", 1000)  # so long after that it is written down again: b is now the oldest

    after = make_pool(2, store=store)
    assert {after.name_of(fake.v4): fake for fake in fakes.values()} == fakes
    with pytest.raises(PoolExhaustedError):
        after.assign("c", 5)  # a client may have got either address a second before the restart
    assert after.assign("c", 15) == fakes["b"]


def test_new_name_of_a_recycled_address_is_written_down_at_once() -> None:
    store = FakeStore()
    pool = make_pool(1, store=store)
    pool.assign("a", 0)
    pool.assign("b", REST)
    assert store.kept == {0: "b"}


def test_stored_rows_that_make_no_sense_are_passed_over() -> None:
    # Slot 9 is from a time with more slots, and `a` moved from slot 0 to 2.
    pool = make_pool(store=FakeStore({9: "z", 0: "a", -1: "y", 1: "b", 2: "A."}))
    assert shown(pool.assign("a", 0)) == ("198.18.0.4", "2001:2::4")
    assert shown(pool.assign("b", 0)) == ("198.18.0.3", "2001:2::3")
    assert pool.name_of(ip_address("198.18.0.2").packed) is None
    assert shown(pool.assign("z", 0)) == ("198.18.0.2", "2001:2::2")


class PoolAgainstModel(RuleBasedStateMachine):
    """The model: a list of slots, each with all that is known of it, searched from end to end every time."""

    names = st.sampled_from([f"name{number}.example" for number in range(SIZE + 3)])

    def __init__(self) -> None:
        super().__init__()
        self.store = FakeStore()
        self.pool = make_pool(store=self.store)
        self.now = 0.0
        self.uses = 0
        self.model: list[dict] = []  # name, address, flows, used (time, None if not known yet), order of last use

    def use(self, slot: dict, used: float | None) -> None:
        self.uses += 1
        slot.update(used=used, order=self.uses)

    def find(self, name: str) -> dict | None:
        return next((slot for slot in self.model if slot["name"] == name), None)

    @rule(seconds=st.sampled_from([0.5, 3.0, REST, 4 * REST]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=names, spell=st.sampled_from([str, str.upper, lambda name: name.title() + "."]))
    def assign(self, name: str, spell) -> None:
        for slot in self.model:
            if slot["used"] is None:
                slot["used"] = self.now
        slot = self.find(name)
        idle = [slot for slot in self.model if not slot["flows"]]
        if slot is None and len(self.model) == SIZE:
            slot = min(idle, key=lambda each: each["order"], default=None)
            if slot is None or self.now - slot["used"] < REST:
                with pytest.raises(PoolExhaustedError):
                    self.pool.assign(spell(name), self.now)
                return
            slot["name"] = name
        fake = self.pool.assign(spell(name), self.now)
        if slot is None:
            assert fake not in [each["fake"] for each in self.model]
            slot = {"name": name, "fake": fake, "flows": 0}
            self.model.append(slot)
        assert fake == slot["fake"]
        self.use(slot, self.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), family=st.integers(0, 1))
    def flow_begins(self, data: st.DataObject, family: int) -> None:
        slot = data.draw(st.sampled_from(self.model))
        self.pool.acquire(slot["fake"][family])
        slot["flows"] += 1

    @precondition(lambda self: any(slot["flows"] for slot in self.model))
    @rule(data=st.data(), family=st.integers(0, 1))
    def flow_ends(self, data: st.DataObject, family: int) -> None:
        slot = data.draw(st.sampled_from([slot for slot in self.model if slot["flows"]]))
        self.pool.release(slot["fake"][family])
        slot["flows"] -= 1
        if not slot["flows"]:
            self.use(slot, None)

    @precondition(lambda self: not any(slot["flows"] for slot in self.model))
    @rule()
    def restart(self) -> None:
        """A name's address survives; the order may lag, so it is taken from what was written down."""
        self.pool = make_pool(store=self.store)
        order = list(self.store.kept.values())
        for slot in sorted(self.model, key=lambda each: order.index(each["name"])):
            self.use(slot, None)

    @invariant()
    def names_and_addresses_are_one_to_one(self) -> None:
        for slot in self.model:
            for address in slot["fake"]:
                assert self.pool.name_of(address) == slot["name"]
                assert self.pool.contains(address)
            assert slot["fake"].v4[-1] == slot["fake"].v6[-1] >= 2
        assert len({slot["fake"] for slot in self.model}) == len(self.model) <= SIZE

    @invariant()
    def statistics_agree(self) -> None:
        live = sum(1 for slot in self.model if slot["flows"])
        assert self.pool.statistics() == {"size": SIZE, "assigned": len(self.model), "live": live}


PoolAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
