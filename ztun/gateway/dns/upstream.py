"""Upstream resolution: several servers, each with a memory of how it fared, a cache, and one query for one question."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from ipaddress import ip_address
from typing import Any

import structlog

from ztun.gateway.dns.figures import ServerFigures
from ztun.gateway.dns.servers import Server
from ztun.gateway.dns.stream import StreamTransport
from ztun.gateway.dns.transport import Transport, UdpTransport, UpstreamError
from ztun.names.answer import Answer
from ztun.names.cache import AnswerCache, CacheKey
from ztun.names.message import Query, Rcode, Type, make_query
from ztun.ports import SocketFactory

log = structlog.get_logger("ztun.dns")

# A client waits five seconds (resolv.conf(5)) before it asks again; it should hear from us before that.
DEADLINE_S = 4.5
_ATTEMPT_S = {"udp": 1.0, "tcp": 2.0, "tls": 2.5, "https": 2.5}
_ROUNDS = 3
# A server that failed is asked last for so long; twice as long each time it fails again.
_FIRST_PENALTY_S, _MAX_PENALTY_S = 2.0, 60.0
_MAX_IN_FLIGHT = 512
_RETRIED_RCODES = (Rcode.FORMERR, Rcode.SERVFAIL, Rcode.NOTIMP, Rcode.REFUSED)


class Scope(Enum):
    """Which servers may be asked."""

    ANY = "any"
    PRIVATE = "private"  # those that are part of the network around us
    BY_ADDRESS = "by address"  # those whose own name need not be looked up


class _Upstream:
    """A server with its transport and what is remembered of it."""

    def __init__(self, server: Server, transport: Transport) -> None:
        self.server = server
        self.transport = transport
        self.retry_at = 0.0
        self.figures = ServerFigures()
        self._penalty = 0.0
        self._failed_at = 0.0

    def tried(self, now: float, patience: float) -> None:
        """Asked now, for at most `patience` seconds. One query at a time finds out whether it is back."""
        if self._penalty:
            self.retry_at = max(self.retry_at, now + patience)

    def succeeded(self) -> None:
        if self._penalty:
            log.info("DNS server answers again", server=str(self.server))
        self.retry_at = self._penalty = 0.0

    def forgive(self) -> None:
        """Forget that it failed, though not that somebody was told."""
        self.retry_at = 0.0
        self._penalty = min(self._penalty, _FIRST_PENALTY_S)

    def failed(self, error: UpstreamError, started: float, now: float) -> None:
        if started <= self._failed_at:
            return  # the same outage, seen by another query
        if not self._penalty:
            log.warning("DNS server does not answer", server=str(self.server), reason=str(error))
        self._penalty = min(max(_FIRST_PENALTY_S, 2 * self._penalty), _MAX_PENALTY_S)
        self._failed_at = now
        self.retry_at = now + self._penalty


class Resolver:
    """Asks the upstream servers, in the order given; one that failed lately comes last.

    is_fake: whether an address is a Fake-IP. An answer with one is a loop (the server asks us), and is not believed.
    counters: what happened, by name; all of ours begin with "upstream_" or "cache_".
    """

    def __init__(
        self,
        servers: Sequence[Server],
        sockets: SocketFactory,
        is_fake: Callable[[bytes], bool],
        counters: Counter[str],
        *,
        cache_size: int = 4096,
        deadline: float = DEADLINE_S,
        randomize_case: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._sockets = sockets
        self._is_fake = is_fake
        self._counters = counters
        self._deadline = deadline
        self._randomize_case = randomize_case
        self._tls = tls
        self._cache = AnswerCache(cache_size)
        self._in_flight: dict[tuple[CacheKey, Scope], asyncio.Task[Answer]] = {}
        self._upstreams = [_Upstream(server, self._make_transport(server)) for server in servers]

    def cached(self, query: Query) -> tuple[Answer, float] | None:
        """The answer from the cache with its age in seconds, if it is there."""
        found = self._cache.get(CacheKey.of(query), time.monotonic())
        self._counters["cache_misses" if found is None else "cache_hits"] += 1
        return found

    async def ask(self, query: Query, scope: Scope = Scope.ANY) -> Answer:
        """Ask upstream; the same question already under way is not asked twice. Raises UpstreamError."""
        key = (CacheKey.of(query), scope)
        task = self._in_flight.get(key)
        if task is None:
            if len(self._in_flight) >= _MAX_IN_FLIGHT:
                self._counters["overload_upstream"] += 1
                raise UpstreamError("too many queries wait for the servers")
            task = asyncio.get_running_loop().create_task(self._resolve(query, scope))
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._finished(key, done))
        # One client that goes away must not take the answer from the others.
        return await asyncio.shield(task)

    def forgive(self) -> None:
        """Servers that failed are asked in their turn again: the way to them is another."""
        for upstream in self._upstreams:
            upstream.forgive()

    def _finished(self, key: tuple[CacheKey, Scope], task: asyncio.Task[Answer]) -> None:
        del self._in_flight[key]
        if not task.cancelled():
            task.exception()  # it may be that nobody waits any more

    async def addresses(self, name: str, scope: Scope = Scope.ANY) -> list[str]:
        """The IPv4 and then the IPv6 addresses of a name; empty when it has none. Raises UpstreamError."""
        queries = [make_query(name, kind) for kind in (Type.A, Type.AAAA)]
        answers = await asyncio.gather(*(self._recall(query, scope) for query in queries), return_exceptions=True)
        found: list[str] = []
        for answer in answers:
            if isinstance(answer, Answer):
                found += [str(ip_address(each.address)) for each in answer.addresses()]
            elif not isinstance(answer, UpstreamError):
                raise answer
        if not found:
            for answer in answers:
                if isinstance(answer, UpstreamError):
                    raise answer
        return found

    def statistics(self) -> dict[str, dict[str, Any]]:
        """Server -> its figures, see `ServerFigures.describe`, in the order in which they are asked."""
        return {str(upstream.server): upstream.figures.describe() for upstream in self._upstreams}

    def has(self, scope: Scope) -> bool:
        """Whether there is a server to ask."""
        return any(_is_in(scope, each.server) for each in self._upstreams)

    async def replace_servers(self, servers: Sequence[Server]) -> None:
        """Ask these from now on. What is known of those that stay is kept, answers that were cached too."""
        former = {each.server: each for each in self._upstreams}
        self._upstreams = [
            former.pop(server) if server in former else _Upstream(server, self._make_transport(server))
            for server in dict.fromkeys(servers)
        ]
        for upstream in former.values():
            await upstream.transport.close()

    async def close(self) -> None:
        for task in list(self._in_flight.values()):
            task.cancel()
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        for upstream in self._upstreams:
            await upstream.transport.close()

    async def _recall(self, query: Query, scope: Scope) -> Answer:
        found = self.cached(query)
        return found[0] if found is not None else await self.ask(query, scope)

    def _make_transport(self, server: Server) -> Transport:
        async def lookup(name: str) -> list[str]:
            return await self.addresses(name, Scope.BY_ADDRESS)

        if server.scheme == "https":
            from ztun.gateway.dns.https import HttpsTransport  # aiohttp takes long to import

            return HttpsTransport(server, self._sockets, lookup, self._tls)
        tls = None
        if server.scheme == "tls":
            tls = self._tls or ssl.create_default_context()
        stream = StreamTransport(server, self._sockets, lookup, self._counters, tls)
        if server.scheme != "udp":
            return stream
        return UdpTransport(server, self._sockets, stream, self._counters, randomize_case=self._randomize_case)

    async def _resolve(self, query: Query, scope: Scope) -> Answer:
        self._counters["upstream_queries"] += 1
        try:
            async with asyncio.timeout(self._deadline):
                answer = await self._try_servers(query, scope)
        except TimeoutError:
            self._counters["upstream_timeouts"] += 1
            raise UpstreamError("no server answered in time") from None
        self._cache.put(CacheKey.of(query), answer, time.monotonic())
        return answer

    async def _try_servers(self, query: Query, scope: Scope) -> Answer:
        refusal: Answer | None = None
        failure = UpstreamError("no server may be asked")
        for patience in range(1, _ROUNDS + 1):
            for upstream in self._in_order(scope):
                try:
                    answer = await self._try(upstream, query, patience)
                except UpstreamError as error:
                    self._counters["upstream_failures"] += 1
                    failure = error
                    continue
                if answer.rcode not in _RETRIED_RCODES:
                    return answer
                refusal = answer
            if refusal is not None:
                return refusal
        raise failure

    async def _try(self, upstream: _Upstream, query: Query, patience: int) -> Answer:
        started, seconds = time.monotonic(), patience * _ATTEMPT_S[upstream.server.scheme]
        upstream.tried(started, seconds)
        upstream.figures.queries += 1
        try:
            async with asyncio.timeout(seconds):
                answer = await upstream.transport.exchange(query)
        except TimeoutError:
            error = UpstreamError(f"{upstream.server}: no answer")
            upstream.figures.timeouts += 1
            upstream.failed(error, started, time.monotonic())
            raise error from None
        except UpstreamError as error:
            upstream.figures.failures += 1
            upstream.failed(error, started, time.monotonic())
            raise
        upstream.figures.answered(time.monotonic() - started)
        upstream.succeeded()
        if any(self._is_fake(each.address) for each in answer.addresses()):
            self._counters["upstream_fake_ip"] += 1
            raise UpstreamError(f"{upstream.server}: answered with a Fake-IP; it must not ask this gateway")
        return answer

    def _in_order(self, scope: Scope) -> list[_Upstream]:
        allowed = [each for each in self._upstreams if _is_in(scope, each.server)]
        now = time.monotonic()
        healthy = [each for each in allowed if each.retry_at <= now]
        return healthy + sorted((each for each in allowed if each.retry_at > now), key=lambda each: each.retry_at)


def _is_in(scope: Scope, server: Server) -> bool:
    if scope is Scope.ANY:
        return True
    return server.is_private if scope is Scope.PRIVATE else server.is_address
