"""From a packet's addresses to an outbound and a destination: Fake-IPs back to names, then the rules."""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple, Protocol

from ztun.ports import Destination, Origin, Outbound
from ztun.rules import DNS, Decision, FlowInfo

_MAX_KNOWN: Final = 8192  # decisions that are kept; then all are made anew
_MAX_LEARNED: Final = 65536  # as many as bpf/shared.h keeps


class NamePool(Protocol):
    def contains(self, address: bytes) -> bool: ...

    def name_of(self, address: bytes) -> str | None: ...

    def acquire(self, address: bytes) -> None: ...

    def release(self, address: bytes) -> None: ...


Origins = Callable[[bytes], Origin | None]
"""Where packets of a client (packed address) come in: ztun.ports.Classifier.origin."""


OwnFlow = Callable[[str, bytes, int, bytes, int], bool]
"""Whether a flow (protocol, source, its port, destination, its port) was begun by a socket of ztun's own."""


class Decider(Protocol):
    asks_origin: bool

    def decide(self, flow: FlowInfo) -> Decision: ...

    def decide_learned(self, flow: FlowInfo, rule: int) -> Decision: ...


class Route(NamedTuple):
    """outbound is None for what the DNS service answers. fake: the destination address was a Fake-IP."""

    outbound: Outbound | None
    destination: Destination
    rule: int
    fake: bool


class UnmappedError(Exception):
    """A packet went to a Fake-IP that stands for no name."""


class Routing(Protocol):
    """What relays ask of a `Router`."""

    @property
    def tags(self) -> Iterable[str]: ...

    def route(self, protocol: str, source: bytes, address: bytes, port: int) -> Route: ...


class Router:
    def __init__(
        self,
        rules: Decider,
        names: NamePool,
        outbounds: Mapping[str, Outbound],
        hijack_dns: bool,
        origins: Origins | None = None,
    ) -> None:
        self._rules = rules
        self._origins = origins
        self._asked_origins = origins if rules.asks_origin else None
        self._names = names
        self._outbounds = outbounds
        self._hijack_dns = hijack_dns
        self._learned: OrderedDict[bytes, int] = OrderedDict()
        self._known: dict[tuple[object, ...], Route] = {}

    @property
    def tags(self) -> Iterable[str]:
        """Of all outbounds."""
        return self._outbounds.keys()

    def remember(self, address: bytes, rule: int) -> None:
        """A client was told this real address of a name that `rule` sent direct; flows to it may still come here."""
        self._learned[address] = rule
        self._learned.move_to_end(address)
        if len(self._learned) > _MAX_LEARNED:
            self._learned.popitem(last=False)

    def replace_rules(self, rules: Decider) -> None:
        """Decide about new flows by these."""
        self._rules = rules
        self._asked_origins = self._origins if rules.asks_origin else None
        self._known.clear()

    def route(self, protocol: str, source: bytes, address: bytes, port: int) -> Route:
        """Decide about a new flow. Addresses are packed. Raises UnmappedError."""
        if port == 53 and self._hijack_dns:
            return Route(None, Destination("", port), 0, False)
        name = None
        fake = self._names.contains(address)
        if fake:
            name = self._names.name_of(address)
            if name is None:
                raise UnmappedError
        rule = self._learned.get(address) if self._learned else None
        # A system call, which is only made for rules that need it.
        origin = self._asked_origins(source) if self._asked_origins is not None else None
        key = (protocol, source, address, port, name, rule, origin)
        route = self._known.get(key)
        if route is None:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            route = self._known[key] = self._decide(FlowInfo(protocol, source, address, name, port, origin), rule)
        return route

    def _decide(self, flow: FlowInfo, rule: int | None) -> Route:
        """The same for the same arguments, so that it is asked once."""
        decision = self._rules.decide(flow) if rule is None else self._rules.decide_learned(flow, rule)
        if decision.outbound == DNS:
            return Route(None, Destination("", flow.port), decision.rule, flow.name is not None)
        assert flow.address is not None
        destination = Destination(flow.name or text(flow.address), flow.port)
        return Route(self._outbounds[decision.outbound], destination, decision.rule, flow.name is not None)


def text(address: bytes) -> str:
    """A packed address as people write it."""
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def endpoint(host: str, port: int) -> str:
    """HOST:PORT, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def packed(address: str) -> bytes | None:
    """The packed form of an address literal, None for a name."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except OSError:
        return None
