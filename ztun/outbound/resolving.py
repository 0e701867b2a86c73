"""From the host of a destination to addresses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

from ztun.outbound import tcp
from ztun.ports import Failure, OutboundError

Resolve = Callable[[str], Awaitable[Iterable[str]]]


async def resolved(resolve: Resolve, host: str) -> list[str]:
    """The addresses to dial for `host`, a name or a literal. Raises OutboundError where there are none."""
    if tcp.is_literal(host):
        return [host]
    addresses = list(await resolve(host))
    if not addresses:
        raise OutboundError(Failure.NAME_NOT_FOUND, f"{host} has no address")
    return addresses
