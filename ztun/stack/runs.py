"""Runs: datagrams of one flow that are alike and travel as one.

All have one size, except that the last may be shorter. That is what the kernel can cut (VIRTIO_NET_HDR_GSO_UDP_L4 on
the device, UDP_SEGMENT on sockets), so a run costs one system call where its datagrams would cost one each.
"""

from __future__ import annotations

from collections.abc import Callable

RUN = 64  # datagrams: UDP_MAX_SEGMENTS of linux/udp.h before 6.9
_RUN_BYTES = 64000  # of payload, which leaves room for what a proxy wants in front of each

Deliver = Callable[[list[bytes], float], None]


def split(payload: memoryview, size: int) -> list[memoryview]:
    """The datagrams of a super-datagram; the payload itself when `size` is 0."""
    if not 0 < size < len(payload):
        return [payload]
    return [payload[at : at + size] for at in range(0, len(payload), size)]


class UdpFlow:
    """What one flow brought within this batch. deliver(payloads, now) gets it as runs, in order.

    waiting: where to note that there is something to flush.
    """

    __slots__ = ("_deliver", "_payloads", "_room", "_size", "_waiting")

    def __init__(self, deliver: Deliver, waiting: list[UdpFlow]) -> None:
        self._deliver = deliver
        self._waiting = waiting
        self._payloads: list[bytes] = []
        self._size = 0
        self._room = 0  # how many more the run can take

    def add(self, payload: bytes, now: float) -> None:
        size = len(payload)
        if self._room:
            if size == self._size:
                self._room -= 1
                self._payloads.append(payload)
                return
            if 0 < size < self._size:
                self._room = 0
                self._payloads.append(payload)
                return
        if self._payloads:
            self.flush(now)
        else:
            self._waiting.append(self)
        self._size = size
        # Nothing can be told from an empty datagram where the next one begins.
        self._room = min(RUN, _RUN_BYTES // size or 1) - 1 if size else 0
        self._payloads.append(payload)

    def flush(self, now: float) -> None:
        """Deliver what there is."""
        payloads, self._payloads = self._payloads, []
        self._room = 0
        if payloads:
            self._deliver(payloads, now)
