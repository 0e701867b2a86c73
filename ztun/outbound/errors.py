"""What an errno means in the words a client can be told."""

from __future__ import annotations

import errno
import os

from ztun.ports import Destination, Failure, OutboundError

_FAILURES = {
    errno.ECONNREFUSED: Failure.REFUSED,
    errno.ECONNRESET: Failure.REFUSED,
    errno.ENOPROTOOPT: Failure.REFUSED,  # ICMP protocol unreachable (RFC 1122, section 3.2.2.1)
    errno.ENETUNREACH: Failure.NETWORK_UNREACHABLE,
    errno.ENETDOWN: Failure.NETWORK_UNREACHABLE,
    errno.EADDRNOTAVAIL: Failure.NETWORK_UNREACHABLE,  # no source address of that family
    errno.EAFNOSUPPORT: Failure.NETWORK_UNREACHABLE,
    errno.ETIMEDOUT: Failure.TIMED_OUT,
    errno.EACCES: Failure.PROHIBITED,  # a prohibit route, or ICMP administratively prohibited
    errno.EPERM: Failure.PROHIBITED,  # the host's own packet filter
    errno.EMFILE: Failure.EXHAUSTED,
    errno.ENFILE: Failure.EXHAUSTED,
}

# What to report of several addresses that all failed: the answer that says most about the destination itself.
_TELLING = (
    Failure.REFUSED,
    Failure.PROHIBITED,
    Failure.TIMED_OUT,
    Failure.HOST_UNREACHABLE,
    Failure.NETWORK_UNREACHABLE,
    Failure.EXHAUSTED,
)


def failure_of(error: OSError) -> Failure:
    """The Failure that an OSError of connect(2) or sendto(2) stands for; HOST_UNREACHABLE where there is no better."""
    return _FAILURES.get(error.errno or 0, Failure.HOST_UNREACHABLE)


def unreachable(destination: Destination, error: OSError) -> OutboundError:
    """What to tell about a destination for which a system call failed."""
    return OutboundError(failure_of(error), f"{destination.host} port {destination.port}: {error.strerror}")


def most_telling(errors: list[OSError]) -> OSError:
    """The error to report when every attempt failed. `errors` is not empty."""
    return min(errors, key=lambda error: _TELLING.index(failure_of(error)))


def os_error(number: int) -> OSError:
    """An OSError (of the right subclass) for an errno that was read, not raised."""
    return OSError(number, os.strerror(number))
