"""rtnetlink through pyroute2, callable from anywhere.

pyroute2's synchronous IPRoute runs an event loop of its own and refuses to do so where one is running already, so each
use gets a thread of its own. A new thread is in the network namespace of the one that made it.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError

T = TypeVar("T")

__all__ = ["NetlinkDumpInterrupted", "NetlinkError", "attribute", "ignoring", "run"]


def run(action: Callable[[Any], T]) -> T:
    """Call `action(ip)` with an open IPRoute of this network namespace and return what it returns."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with IPRoute() as ip:
                outcome.append(action(ip))
        except BaseException as error:  # handed to the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name="ztun-netlink")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def ignoring(codes: Iterable[int], call: Callable[..., Any], *arguments: Any, **keywords: Any) -> bool:
    """Make one netlink request; False when the kernel answered with one of `codes` (errno values)."""
    try:
        call(*arguments, **keywords)
    except NetlinkError as error:
        if error.code in codes:
            return False
        raise
    return True


def attribute(message: Any, name: str) -> Any:
    """The value of a netlink attribute, None when it is absent."""
    return message.get_attr(name)


def explain(error: NetlinkError | OSError) -> str:
    """The errno of a refused request, or of another system call, in words."""
    if not isinstance(error, NetlinkError):
        return error.strerror or str(error)
    return f"{errno.errorcode.get(error.code, error.code)}: {error.args[1] if len(error.args) > 1 else error}"
