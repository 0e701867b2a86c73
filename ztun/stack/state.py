"""States of a connection (RFC 9293 section 3.3.2) and how it can end."""

from __future__ import annotations

from enum import Enum
from typing import Final


class State(Enum):
    """ztun only opens passively. Two are its own. DIALING: the SYN is here, the outbound has not answered yet.
    OFFLOADED: the SYN was answered, and all that follows is carried by somebody else."""

    DIALING = "dialing"
    SYN_RECEIVED = "syn-received"
    ESTABLISHED = "established"
    FIN_WAIT_1 = "fin-wait-1"
    FIN_WAIT_2 = "fin-wait-2"
    CLOSE_WAIT = "close-wait"
    CLOSING = "closing"
    LAST_ACK = "last-ack"
    TIME_WAIT = "time-wait"
    CLOSED = "closed"
    OFFLOADED = "offloaded"


# An attribute of an enum costs three times as much as a name, and every segment asks. Final[State], and not Final: a
# state that was seen is no promise after the next call, as mypy would take it to be.
DIALING: Final[State] = State.DIALING
SYN_RECEIVED: Final[State] = State.SYN_RECEIVED
ESTABLISHED: Final[State] = State.ESTABLISHED
FIN_WAIT_1: Final[State] = State.FIN_WAIT_1
FIN_WAIT_2: Final[State] = State.FIN_WAIT_2
CLOSE_WAIT: Final[State] = State.CLOSE_WAIT
CLOSING: Final[State] = State.CLOSING
LAST_ACK: Final[State] = State.LAST_ACK
TIME_WAIT: Final[State] = State.TIME_WAIT
CLOSED: Final[State] = State.CLOSED
OFFLOADED: Final[State] = State.OFFLOADED


class Closed(Enum):
    """How a connection ended."""

    FINISHED = "finished"  # FIN both ways, all data acknowledged
    RESET_BY_CLIENT = "reset by client"
    ABORTED = "aborted"  # by us: the outbound reset it, or the gateway stops
    TIMED_OUT = "timed out"  # retransmissions, keep-alive or idle time
    REFUSED = "refused"  # never established
    UNREACHABLE = "unreachable"
