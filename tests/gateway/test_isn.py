"""Initial sequence numbers (RFC 6528): a clock, and a hash that nobody outside can compute."""

from __future__ import annotations

import pytest

from ztun.gateway.isn import has_keyed_hash, make_isn

_FLOW, _OTHER = bytes(12), bytes(11) + b"\1"
_KEY = bytes(range(32))


@pytest.fixture(params=[True, False], ids=["SipHash", "BLAKE2"], autouse=True)
def keyed_hash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.param:
        monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert has_keyed_hash() is request.param


def test_the_clock_ticks_every_four_microseconds() -> None:
    isn = make_isn(_KEY)
    assert (isn(_FLOW, 10.000004) - isn(_FLOW, 10.0)) % 2**32 == 1
    assert (isn(_FLOW, 11.0) - isn(_FLOW, 10.0)) % 2**32 == 250_000


def test_it_wraps_after_about_four_and_three_quarter_hours() -> None:
    isn = make_isn(_KEY)
    assert isn(_FLOW, 2**32 / 250_000) == isn(_FLOW, 0.0)


def test_each_flow_and_each_secret_has_its_own_offset() -> None:
    numbers = {make_isn(key)(flow, 0.0) for key in (_KEY, bytes(32)) for flow in (_FLOW, _OTHER)}
    assert len(numbers) == 4


def test_the_secret_is_new_in_each_process() -> None:
    assert make_isn()(_FLOW, 0.0) != make_isn()(_FLOW, 0.0) or make_isn()(_OTHER, 0.0) != make_isn()(_OTHER, 0.0)


def test_a_number_has_64_bits() -> None:
    numbers = [make_isn()(bytes((n,)) * 12, 1e6) for n in range(256)]
    assert all(0 <= number < 2**64 for number in numbers)
    assert max(numbers) > 2**63
    assert min(number & 0xFFFFFFFF for number in numbers) < 2**30
