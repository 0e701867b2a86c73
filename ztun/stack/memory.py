"""How many bytes all connections together hold, and how many they may."""

from __future__ import annotations

from typing import Final

PIECE: Final = 256  # what Python's objects cost for a piece of data, however short it is


class Memory:
    """used: bytes that wait for an outbound, for a gap before them to be filled, or for a client's ACK.

    A piece counts as what it keeps alive: the whole buffer that it lies in, or itself and PIECE. At the limit new
    connections are refused and out-of-order data is not kept. A quarter more is for connections that hold nothing yet,
    so that those which get their data through go on at full speed; beyond that each may hold two segments.
    """

    __slots__ = ("_most", "limit", "used")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._most = limit + limit // 4

    def set_limit(self, limit: int) -> None:
        """Have another limit from now on. Who holds more than that gets no more, and keeps what it has."""
        self.limit = limit
        self._most = limit + limit // 4

    def allowance(self, least: int) -> int:
        """How much a connection that holds nothing may take, beyond the limit; `least` in any case."""
        return max(self._most - self.used, least)
