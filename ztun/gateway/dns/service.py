"""Answers DNS queries by the rules: with Fake-IPs, with nothing, or with what upstream says.

| the name's verdict | A, AAAA       | HTTPS, SVCB  | other types                |
|--------------------|---------------|--------------|----------------------------|
| fake (proxied)     | Fake-IP       | NODATA       | asked upstream, counted    |
| direct             | asked upstream, addresses learnt before the answer leaves | |
| block              | NXDOMAIN      | NXDOMAIN     | NXDOMAIN                   |

HTTPS and SVCB records would carry addresses and ALPNs past the Fake-IPs. MX, TXT, SRV and the like of a proxied name
are asked upstream although that shows the name to the server: an empty answer would break mail, service discovery and
certificate issuance for the name, and no rule can send such a query elsewhere. "fake_forwarded" counts them.
Names that are special to everybody are in ztun/names/special.py; ANY is answered as in RFC 8482.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import structlog
from dnslib import RR

from ztun.gateway.dns.listeners import DatagramListener, StreamListener, open_sockets
from ztun.gateway.dns.servers import is_address, parse_servers
from ztun.gateway.dns.transport import UpstreamError
from ztun.gateway.dns.upstream import DEADLINE_S, Resolver, Scope
from ztun.names.answer import Answer
from ztun.names.message import (
    Drop,
    ExtendedError,
    Query,
    Rcode,
    Type,
    address_record,
    fit,
    make_reply,
    pointer_record,
    read_query,
    refuse_any_record,
)
from ztun.names.pool import FakeIpPool, PoolExhaustedError
from ztun.names.special import Special, is_hostname, reverse_address, special
from ztun.ports import RULE_BUILTIN, Buffer, Failure, OutboundError, SocketFactory
from ztun.rules import NameDecision, NameKind, Rules

log = structlog.get_logger("ztun.dns")

# address (packed), TTL in seconds (0 is possible), and the rule that sent its name direct
Learn = Callable[[bytes, int, int], None]
Reply = bytes | Awaitable[bytes]

_LOOPBACK = {Type.A: b"\x7f\x00\x00\x01", Type.AAAA: bytes(15) + b"\x01"}
_LOOPBACK_TTL = 86400
_ADDRESS_TYPES = (Type.A, Type.AAAA, Type.HTTPS, Type.SVCB)


class DnsOptions(NamedTuple):
    """fake_ttl: of answers with Fake-IPs, in seconds; cache_size: upstream answers kept; deadline: seconds for a query.

    randomize_case: vary upper and lower case in queries by UDP (0x20). tls: for tls:// and https://, else the system's.
    """

    fake_ttl: int = 300
    cache_size: int = 4096
    deadline: float = DEADLINE_S
    randomize_case: bool = False
    tls: ssl.SSLContext | None = None


class DnsService:
    """The DNS service, for the sockets on `dns.listen` and for queries that were taken on their way elsewhere.

    servers: upstream servers as URLs, in the order in which to ask them. sockets: makes all of the service's own
    sockets. learn: told of each address of a direct name before the client is. counters: what happened, by name; those
    that begin with "malformed_", "unsupported_" or "overload_" are messages that were not served.

    Raises ConfigError when a server cannot be used. Nothing is opened before `start` or the first query.
    """

    def __init__(
        self,
        rules: Rules,
        pool: FakeIpPool,
        servers: Sequence[str],
        sockets: SocketFactory,
        learn: Learn,
        options: DnsOptions | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._rules = rules
        self._pool = pool
        self._sockets = sockets
        self._learn = learn
        self._options = options or DnsOptions()
        self._listeners: list[DatagramListener | StreamListener] = []
        self._resolver = Resolver(
            parse_servers(servers),
            sockets,
            pool.contains,
            self.counters,
            cache_size=self._options.cache_size,
            deadline=self._options.deadline,
            randomize_case=self._options.randomize_case,
            tls=self._options.tls,
        )

    async def start(self, listen: Sequence[str]) -> None:
        """Listen on these addresses ("10.0.0.1:53", "[2001:db8::1]:53"). Raises ZtunError with key and remedy."""
        for sock in open_sockets(listen, self._sockets):
            if sock.type == socket.SOCK_DGRAM:
                self._listeners.append(DatagramListener(sock, self._answer_listener, self.counters))
            else:
                stream = StreamListener(self._answer_listener, self.counters)
                await stream.start(sock)
                self._listeners.append(stream)

    def forgive(self) -> None:
        """The network is another: servers that did not answer are asked in their turn again."""
        self._resolver.forgive()

    async def replace_servers(self, servers: Sequence[str]) -> None:
        """Ask these upstream servers from now on, URLs as in `dns.servers`. Raises ConfigError."""
        await self._resolver.replace_servers(parse_servers(servers))

    async def close(self) -> None:
        """Stop listening, give up what is under way, close all sockets. Idempotent."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            await listener.close()
        await self._resolver.close()

    async def answer(self, query: Buffer, *, over_tcp: bool) -> bytes | None:
        """The reply to one message, or None when it deserves none. Malformed messages are counted by reason."""
        self.counters["queries"] += 1
        found = read_query(query)
        if isinstance(found, Drop):
            self.counters[found.reason] += 1
            return found.reply
        reply = self._respond(found)
        if not isinstance(reply, bytes):
            reply = await reply
        self.counters["answers"] += 1
        return reply if over_tcp else fit(found, reply)

    async def resolve(self, name: str) -> list[str]:
        """The real addresses of a name, IPv4 first; never Fake-IPs. An address is its own. Raises OutboundError."""
        if is_address(name):
            return [name]
        scope = Scope.PRIVATE if special(name.lower().removesuffix(".")) is Special.LOCAL else Scope.ANY
        if scope is Scope.PRIVATE and not self._resolver.has(scope):
            scope = Scope.ANY
        try:
            found = await self._resolver.addresses(name, scope)
        except ValueError:
            found = []
        except UpstreamError as error:
            raise OutboundError(Failure.TIMED_OUT, f"cannot resolve {name}: {error}") from error
        if not found:
            raise OutboundError(Failure.NAME_NOT_FOUND, f"{name} has no address")
        return found

    def statistics(self) -> dict[str, Any]:
        """For `status --json`: the counters, and servers: see `Resolver.statistics`."""
        return {**self.counters, "servers": self._resolver.statistics()}

    def _answer_listener(self, query: bytes, over_tcp: bool) -> Awaitable[bytes | None]:
        return self.answer(query, over_tcp=over_tcp)

    def _respond(self, query: Query) -> Reply:
        if query.type == Type.ANY:
            return self._say(query, "any_refused", refuse_any_record(query))
        if query.type == Type.PTR and query.name.endswith(".arpa"):
            address = reverse_address(query.name)
            if address is not None and self._pool.contains(address):
                return self._reverse(query, address)
        decision = self._rules.decide_name(query.name)
        return self._respond_special(query, decision) or self._respond_by_rule(query, decision)

    def _reverse(self, query: Query, address: bytes) -> bytes:
        name = self._pool.name_of(address)
        if name is None:
            return make_reply(query, rcode=Rcode.NXDOMAIN)
        return self._say(query, "fake_reverse", pointer_record(query, name, self._options.fake_ttl))

    def _respond_special(self, query: Query, decision: NameDecision) -> Reply | None:
        """The reply to a query for a name that the rules have no say in, or no word about."""
        kind = special(query.name)
        if kind is None:
            return None
        if kind is Special.LOOPBACK:
            address = _LOOPBACK.get(Type(query.type)) if query.type in _LOOPBACK else None
            records = [address_record(query, address, _LOOPBACK_TTL)] if address is not None else []
            return self._say(query, "special", *records)
        if kind is Special.EMPTY:
            return self._say(query, "special")
        is_named = decision.rule >= 0 and self._rules.rules[decision.rule].asks_name
        if kind is Special.ONION:
            is_absent = decision.kind is not NameKind.FAKE or query.type not in _ADDRESS_TYPES
        elif kind is Special.LOCAL:
            if is_named or ("." not in query.name and query.type not in _ADDRESS_TYPES):
                return None  # of top-level domains, validating resolvers want DS and DNSKEY
            if self._resolver.has(Scope.PRIVATE):
                self.counters["special_local"] += 1
                return self._forward(query, Scope.PRIVATE, RULE_BUILTIN)
            is_absent = True
        else:
            is_absent = kind is Special.ABSENT or not is_named
        if not is_absent:
            return None
        self.counters["special"] += 1
        return make_reply(query, rcode=Rcode.NXDOMAIN)

    def _respond_by_rule(self, query: Query, decision: NameDecision) -> Reply:
        log.debug("name asked", name=query.name, type=query.type, verdict=decision.kind.value, rule=decision.rule)
        if decision.kind is NameKind.BLOCK:
            self.counters["blocked"] += 1
            return make_reply(query, rcode=Rcode.NXDOMAIN, error=ExtendedError.BLOCKED)
        if decision.kind is NameKind.DIRECT:
            self.counters["direct"] += 1
            return self._forward(query, Scope.ANY, decision.rule)
        if query.type in (Type.A, Type.AAAA):
            return self._fake(query)
        if query.type in _ADDRESS_TYPES:
            return self._say(query, "fake_empty")
        self.counters["fake_forwarded"] += 1
        return self._forward(query, Scope.ANY, None)

    def _fake(self, query: Query) -> bytes:
        if not is_hostname(query.labels):
            return self._say(query, "not_a_hostname")
        try:
            fake = self._pool.assign(query.name, time.monotonic())
        except PoolExhaustedError as error:
            self.counters["pool_exhausted"] += 1
            log.debug("no Fake-IP left", name=query.name, reason=str(error))
            return make_reply(query, rcode=Rcode.SERVFAIL, error=ExtendedError.OTHER)
        address = fake.v4 if query.type == Type.A else fake.v6
        if address is None:
            return self._say(query, "fake_empty")
        return self._say(query, "fake", address_record(query, address, self._options.fake_ttl))

    def _say(self, query: Query, counter: str, *records: RR) -> bytes:
        self.counters[counter] += 1
        return make_reply(query, records)

    def _forward(self, query: Query, scope: Scope, rule: int | None) -> Reply:
        """What upstream says. rule: learn the addresses for this one."""
        cached = self._resolver.cached(query)
        if cached is not None:
            return self._tell(query, cached[0], cached[1], rule)
        return self._ask(query, scope, rule)

    async def _ask(self, query: Query, scope: Scope, rule: int | None) -> bytes:
        try:
            answer = await self._resolver.ask(query, scope)
        except UpstreamError as error:
            self.counters["upstream_unanswered"] += 1
            log.debug("query not answered", name=query.name, reason=str(error))
            return make_reply(query, rcode=Rcode.SERVFAIL, error=ExtendedError.NO_REACHABLE_AUTHORITY)
        return self._tell(query, answer, 0.0, rule)

    def _tell(self, query: Query, answer: Answer, age: float, rule: int | None) -> bytes:
        if rule is not None:
            for each in answer.addresses(age):
                self._learn(each.address, each.ttl, rule)
        return answer.reply(query, age)
