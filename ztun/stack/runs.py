"""Runs: datagrams of one flow that are alike and travel as one.

All have one size, except that the last may be shorter. That is what the kernel can cut (VIRTIO_NET_HDR_GSO_UDP_L4 on
the device, UDP_SEGMENT on sockets), so a run costs one system call where its datagrams would cost one each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ztun.wire import udp

RUN: Final = 64  # datagrams: UDP_MAX_SEGMENTS of linux/udp.h before 6.9
_RUN_BYTES: Final = 64000  # of payload, which leaves room for what a proxy wants in front of each

Deliver = Callable[[list[bytes], float], None]


def split(payload: memoryview, size: int) -> list[memoryview]:
    """The datagrams of a super-datagram; the payload itself when `size` is 0."""
    if not 0 < size < len(payload):
        return [payload]
    return [payload[at : at + size] for at in range(0, len(payload), size)]


class UdpFlow:
    """What one flow brought within this batch. deliver(payloads, now) gets it as runs, in order.

    waiting: where to note that there is something to flush. payloads is the run so far; it can take `room` more
    datagrams whose length, the UDP header's 8 bytes included, is `length`, which the stack appends by itself.
    """

    __slots__ = ("_deliver", "_waiting", "length", "payloads", "room")

    def __init__(self, deliver: Deliver, waiting: list[UdpFlow]) -> None:
        self._deliver = deliver
        self._waiting = waiting
        self.payloads: list[bytes] = []
        self.length = 0
        self.room = 0

    def add(self, payload: bytes, now: float) -> None:
        """Take a datagram into the run, if it fits there, or deliver that and begin another one."""
        size = len(payload)
        length = size + udp.LENGTH
        if self.room and size and length <= self.length:
            self.room = self.room - 1 if length == self.length else 0
            self.payloads.append(payload)
            return
        if self.payloads:
            self.flush(now)
        else:
            self._waiting.append(self)
        self.length = length
        # Nothing can be told from an empty datagram where the next one begins.
        self.room = min(RUN, _RUN_BYTES // size or 1) - 1 if size else 0
        self.payloads.append(payload)

    def flush(self, now: float) -> None:
        """Deliver what there is."""
        payloads, self.payloads = self.payloads, []
        self.room = 0
        if payloads:
            self._deliver(payloads, now)
