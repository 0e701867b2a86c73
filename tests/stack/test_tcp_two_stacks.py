"""Two of our stacks over a bad link, in virtual time: 10 MiB each way at once, whole, and no slower than TCP should be.

Loss, reordering and duplication fall on single segments, on ACKs as on data, in both directions.
"""

from __future__ import annotations

import random
from functools import cache
from math import sqrt

import pytest
from simulated import Weather
from two_stacks import Terms, World

_SIZE = 10 << 20  # bytes, each way at once
_DELAY = 0.01  # seconds one way
_MIN_RTO = 0.2
_SLACK = 2.0  # seconds for the beginning, the end, and the bytes themselves at 50 MB/s

_EARLY_END = 4.0  # seconds that it costs when slow start ends with the first ten segments

_LOSS = [0.0, 0.01, 0.03, 0.1, 0.2, 0.3]
_REORDER = [0.0, 0.3]  # of the packets, each held back by up to the delay: a hundred others may overtake it
_DUPLICATE = [0.0, 0.05]
_BUFFER = [16 << 10, 64 << 10, 1 << 20]


def bound(terms: Terms, weather: Weather) -> float:
    """Seconds that the transfer may take.

    Of TCP Reno with time-outs, Padhye, Firoiu, Towsley and Kurose say (Modeling TCP Throughput, SIGCOMM 1998, equation
    30, every segment acknowledged) that a segment takes

        rtt * sqrt(2p / 3) + rto * min(1, 3 * sqrt(3p / 8)) * p * (1 + 32 * p ** 2)

    seconds with a loss of p and no other limit. That a window of one buffer goes around once in a round trip comes on
    top of it, though it is no addition in truth. Reno's model loses data, not ACKs, and has neither SACK nor probes;
    so this stack must be faster than that over a link that is worse. Packets that are held back make the round trip
    longer, by half at the most in the mean of both ways, and must not be taken for lost. Without timestamps it is found
    out only afterwards that some were, when slow start has ended for good.
    """
    loss = weather.loss
    rtt = 2 * weather.delay * (1.5 if weather.reorder else 1.0)
    mss = terms.mtu - (60 if terms.family == 6 else 40) - (12 if terms.stamps else 0)
    reno = rtt * sqrt(2 * loss / 3) + _MIN_RTO * min(1.0, 3 * sqrt(3 * loss / 8)) * loss * (1 + 32 * loss**2)
    begin = _SLACK + (_EARLY_END if weather.reorder and not terms.stamps else 0.0)
    return begin + _SIZE / terms.buffer * rtt + _SIZE / mss * reno


@cache
def text(seed: int) -> bytes:
    return random.Random(seed).randbytes(_SIZE)


def carry(terms: Terms, weather: Weather) -> World:
    """Transfer, and check what must be true of every transfer."""
    down, up = text(1), text(2)
    world = World(terms, weather, f"{terms} {weather}", down, up)
    limit = bound(terms, weather)
    took = world.run(limit)
    ours, theirs = world.ends
    assert took < limit, f"{len(theirs.received)} and {len(ours.received)} bytes in {limit:.0f} s"
    assert theirs.received == down
    assert ours.received == up
    assert all((path.lost > 0) == (weather.loss > 0) for path in world.paths)
    return world


@pytest.mark.parametrize("buffer", _BUFFER)
@pytest.mark.parametrize("duplicate", _DUPLICATE)
@pytest.mark.parametrize("reorder", _REORDER)
@pytest.mark.parametrize("loss", _LOSS)
def test_ten_megabytes_each_way(loss: float, reorder: float, duplicate: float, buffer: int) -> None:
    world = carry(Terms(buffer), Weather(loss, duplicate, reorder, _DELAY))
    if not loss and not reorder:
        assert not any(end.conn.tx.retransmits for end in world.ends), "nothing was lost, nor late"


_OTHERS = {
    "ipv6": Terms(family=6),
    "jumbo": Terms(mtu=9000),
    "smallest": Terms(mtu=576),
    "no-timestamps": Terms(stamps=False),
    "no-sack": Terms(sack=False),
    "bare": Terms(sack=False, stamps=False),
}


@pytest.mark.parametrize("kind", _OTHERS)
@pytest.mark.parametrize("loss", [0.0, 0.01, 0.03, 0.1])
def test_other_terms(kind: str, loss: float) -> None:
    """Without SACK neither what overtakes nor a repeated ACK is to be told from a loss (RFC 5681), so there is neither.
    Without timestamps as well, only an ACK of new data ends a back-off (Karn), so half of the loss is enough for it.
    """
    terms = _OTHERS[kind]
    disorder = (0.05, 0.3) if terms.sack else (0.0, 0.0)
    carry(terms, Weather(loss if terms.sack or terms.stamps else loss / 2, *disorder, _DELAY))


@pytest.mark.parametrize("reorder", [0.1, 0.3, 0.6])
def test_packets_that_overtake_each_other_are_not_taken_for_lost(reorder: float) -> None:
    """RFC 8985 section 6.2: patience grows until it is enough. 10 MiB are 7240 segments."""
    world = carry(Terms(), Weather(reorder=reorder, delay=_DELAY))
    assert all(end.conn.tx.retransmits < 20 for end in world.ends)
