"""What a client is told when an outbound could not serve its flow."""

from __future__ import annotations

from ztun.ports import Failure
from ztun.wire.icmp import Reason

# None: a TCP client gets a RST.
TCP_ANSWER: dict[Failure, Reason | None] = {
    Failure.REFUSED: None,
    Failure.PROHIBITED: None,
    Failure.UNSUPPORTED: None,
    Failure.EXHAUSTED: None,
    Failure.HOST_UNREACHABLE: Reason.HOST,
    Failure.NETWORK_UNREACHABLE: Reason.NETWORK,
    Failure.TIMED_OUT: Reason.HOST,
    Failure.NAME_NOT_FOUND: Reason.HOST,
    Failure.PROXY_UNREACHABLE: Reason.HOST,
    Failure.PROXY_AUTHENTICATION: Reason.HOST,
    Failure.PROXY_FAILED: Reason.HOST,
}

UDP_ANSWER: dict[Failure, Reason] = {failure: reason or Reason.PORT for failure, reason in TCP_ANSWER.items()} | {
    Failure.PROHIBITED: Reason.PROHIBITED
}
