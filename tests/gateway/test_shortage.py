"""No more memory: flows may hold less than they do, and by and by as much as before."""

from __future__ import annotations

import asyncio

import pytest

from ztun.gateway import shortage
from ztun.gateway.shortage import Shortage
from ztun.stack.memory import Memory

_MIB = 1 << 20


async def test_what_flows_may_hold_becomes_less_and_more_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortage, "_LASTS", 0.01)
    memory = Memory(64 * _MIB)
    memory.used = 40 * _MIB
    short = Shortage(asyncio.get_running_loop(), memory)
    short.came()
    assert memory.limit == 30 * _MIB
    short.came()
    assert memory.limit == 30 * _MIB * 3 // 4
    assert memory.allowance(0) == 0
    for _ in range(1000):
        await asyncio.sleep(0.01)
        if memory.limit == 64 * _MIB:
            break
    assert memory.limit == 64 * _MIB
    assert memory.allowance(0) == 40 * _MIB
    short.stop()


async def test_there_is_always_some(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(64 * _MIB)
    short = Shortage(asyncio.get_running_loop(), memory)
    for _ in range(10):
        short.came()
    assert (short.times, memory.limit) == (10, _MIB)
    short.stop()
    short.stop()
