"""The classifier in Python: decides about each packet that the routes brought to the utun.

It has the tables, verdicts and counters of bpf/classify.c. What it finds direct cannot go back to the kernel from a
utun, so the stack takes it too, and the outbound `direct` carries it by a bound socket.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import structlog

from ztun.platform.darwin import packets
from ztun.platform.darwin.forwarding import Forwarding
from ztun.platform.darwin.neighbours import Neighbours
from ztun.platform.darwin.routes import PrefixRoutes
from ztun.platform.darwin.table import Entry, Key, PrefixTable, halves, outermost
from ztun.platform.darwin.utun import UtunDevice
from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, RULE_DNS, RULE_FAKE_IP, Origin, Prefix, Verdict

log = structlog.get_logger("ztun.classifier")

# The names of bpf/shared.h, in its order: verdicts, reasons to drop, packets that were no verdict's business, and what
# hooks of Linux count for themselves. Those that have no place here stay at 0.
VERDICTS = ("direct", "tunnel", "drop")
COUNTERS = (
    *VERDICTS,
    "drop_rule",
    packets.TRUNCATED,
    packets.BAD_VERSION,
    packets.BAD_HEADER,
    packets.BAD_LENGTH,
    packets.BAD_EXTENSION,
    packets.SHORT_TRANSPORT,
    "drop_bad_source",
    "drop_gateway_dead",
    "drop_no_room",
    "drop_loop",
    "drop_uncarried",
    "drop_early",
    "pass_other",
    "pass_fail_open",
    "pass_replies",
    "pass_to_host",
    "pass_marked",
    "pass_uncaptured",
    "pass_uncarried",
    "pass_back",
    "pass_answers",
    "pass_up",
    "pass_down",
    "xdp_drops",
    "host_direct",
    "host_tunnel",
    "host_drop",
)
MOST_LEARNED = 65536  # MAX_LEARNED of bpf/shared.h
# A route costs a run of route(8). Beyond so many everything comes to us, and is decided here.
MOST_ROUTES = 256
_DIRECT, _TUNNEL, _DROP = Verdict
_DNS_PORT = 53
_EVERYTHING: dict[int, list[Key]] = {4: halves((bytes(4), 0)), 16: halves((bytes(16), 0))}


class Capture(NamedTuple):
    """What is to be captured: from the interfaces `lan`, and from this host itself."""

    lan: Sequence[str]
    host: bool
    hijack_dns: bool


class Decider:
    """The tables and the counters: from a packet to a verdict."""

    def __init__(self, *, hijack_dns: bool) -> None:
        self._hijack_dns = hijack_dns
        self.tables = {4: PrefixTable(4), 16: PrefixTable(16)}
        self.learned: OrderedDict[bytes, Entry] = OrderedDict()
        self.own: frozenset[bytes] = frozenset()
        self.counted = {name: [0, 0] for name in COUNTERS}  # packets, bytes
        self.rules: dict[int, list[int]] = {}

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        self.learned[address] = Entry(verdict, rule)
        self.learned.move_to_end(address)
        if len(self.learned) > MOST_LEARNED:
            self.learned.popitem(last=False)

    def lookup(self, destination: bytes) -> Entry | None:
        """What was learned of an address, else the longest prefix that covers it; its hit is counted."""
        learned = self.learned
        entry = learned.get(destination) if learned else None
        if entry is not None:
            learned.move_to_end(destination)
        else:
            table = self.tables[len(destination)]
            entry = table.owners[bisect_right(table.starts, destination) - 1]
        if entry is not None:
            entry.hits += 1
        return entry

    def decide(self, destination: bytes, port: int, is_fragment: bool) -> tuple[Verdict, int]:
        """The verdict about a packet, and the rule that gave it."""
        if destination in self.own or _is_link_local6(destination):
            return _DIRECT, RULE_BUILTIN
        if port == _DNS_PORT and self._hijack_dns and not is_fragment:
            return _TUNNEL, RULE_DNS
        entry = self.lookup(destination)
        return (_DIRECT, RULE_DEFAULT) if entry is None else (entry.verdict, entry.rule)

    def classify(self, packet: memoryview) -> Verdict:
        """Decide about a packet that begins at the IP header, and count it."""
        try:
            source, destination, port, is_fragment, length = packets.parse(packet)
        except packets.Refused as refused:
            return self._drop(refused.reason, refused.length)
        verdict, rule = self.decide(destination, port, is_fragment)
        counter = self.rules.get(rule)
        if counter is None:
            counter = self.rules[rule] = [0, 0]
        counter[0] += 1
        counter[1] += length
        if verdict is _DROP:
            return self._drop("drop_rule", length)
        if verdict is _TUNNEL and packets.is_bad_source(source):
            return self._drop("drop_bad_source", length)
        self._count(VERDICTS[verdict], length)
        return verdict

    def _drop(self, reason: str, length: int) -> Verdict:
        self._count("drop", length)
        self._count(reason, length)
        return _DROP

    def _count(self, name: str, length: int) -> None:
        counter = self.counted[name]
        counter[0] += 1
        counter[1] += length


class PythonClassifier:
    """A ztun.ports.Classifier for what the routes into `device` bring."""

    backend = "python"
    carries_direct = True  # what is direct comes to the stack as well

    def __init__(
        self,
        device: UtunDevice,
        routes: PrefixRoutes,
        forwarding: Forwarding,
        neighbours: Neighbours,
        capture: Capture,
    ) -> None:
        self.fallback_reason: str | None = None
        self._device = device
        self._routes = routes
        self._forwarding = forwarding
        self._neighbours = neighbours
        self._capture = capture
        self._prefixes: list[Prefix] = []
        self._is_attached = False
        self._exits: list[str] = []
        self.decider = Decider(hijack_dns=capture.hijack_dns)
        device.admit = self._admit

    def _admit(self, packet: memoryview) -> bool:
        return self.decider.classify(packet) is not _DROP

    def replacing_rules(self, prefixes: Iterable[Prefix]) -> Iterator[None]:
        """The same as `replace_rules`, at once."""
        self.replace_rules(prefixes)
        yield

    def replace_rules(self, prefixes: Iterable[Prefix]) -> None:
        """Make the prefix tables equal to `prefixes`, and the routes with them. Raises ZtunError."""
        self._prefixes = list(prefixes)
        for size, table in self.decider.tables.items():
            table.replace(prefix for prefix in self._prefixes if len(prefix.network) == size)
        if self._is_attached:
            self._routes.replace(self._wanted())

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        """See ztun.ports.Classifier.learn. It is no route: what is not captured by prefix is not here to be decided."""
        self.decider.learn(address, verdict, rule)

    def forget(self) -> None:
        """Forget all that was learned."""
        self.decider.learned.clear()

    def replace_own_addresses(self, addresses: Iterable[bytes]) -> None:
        """Tell which packed addresses are this host's."""
        self.decider.own = frozenset(addresses)

    def attach(self) -> None:
        """Bring what is to be decided here to the utun: routes, and forwarding where there is a LAN. Raises ZtunError.

        Without a LAN and without `capture.host`, that is the Fake-IPs alone, whose routes the device has.
        """
        if self._is_attached:
            return
        if self._capture.lan:
            self._forwarding.allow()
            if not self._capture.host:
                log.warning("routes hold for this Mac's own traffic as well as for the LAN's", lan=self._capture.lan)
        try:
            self._routes.replace(self._wanted())
        except BaseException:
            self.close()
            raise
        self._is_attached = True

    def captured(self) -> Mapping[str, str]:
        """LAN interface -> "captured" or "absent"."""
        present = {name for _, name in socket.if_nameindex()}
        return {name: "captured" if self._is_attached and name in present else "absent" for name in self._capture.lan}

    def replace_exits(self, exits: Mapping[str, Collection[int]]) -> None:
        """See ztun.ports.Classifier.replace_exits. The routes hold for all of them."""
        self._exits = sorted(exits)

    def exits(self) -> Mapping[str, str]:
        """Interface -> "captured" or "absent", with capture.host."""
        state = "captured" if self._is_attached else "absent"
        return dict.fromkeys(self._exits, state) if self._capture.host else {}

    def reinstall(self) -> None:
        """The utun is another one: install the routes into it. Raises ZtunError."""
        self._routes.forget()
        if self._is_attached:
            self._routes.replace(self._wanted())

    def heartbeat(self) -> None:
        """Nothing to do: the utun and its routes go with the process."""

    def origin(self, address: bytes) -> Origin | None:
        """See ztun.ports.Classifier.origin: by the route back to the client, as a utun does not tell."""
        return self._neighbours.origin(address)

    def counters(self) -> dict[str, dict[str, int]]:
        """Verdict, drop reason or pass reason (the names of bpf/shared.h) -> {"packets", "bytes"}."""
        return {name: _shown(counter) for name, counter in self.decider.counted.items()}

    def rule_counters(self) -> dict[int, dict[str, int]]:
        """Rule id -> {"packets", "bytes"} of the packets that were decided by it."""
        known = {RULE_DEFAULT, RULE_BUILTIN, RULE_FAKE_IP, RULE_DNS, *(prefix.rule for prefix in self._prefixes)}
        return {rule: _shown(self.decider.rules.get(rule, [0, 0])) for rule in sorted(known)}

    def snapshot(self) -> dict[str, Any]:
        """As of the classifier in BPF: {"programs": […], "maps": [{"name", "type", "entries"}]}."""
        decider, capture = self.decider, self._capture
        settings = {"tun": self._device.name, "mark": 0, "hijack_dns": capture.hijack_dns, "fail": "open"}
        tables: list[tuple[str, str, list[dict[str, Any]]]] = [
            ("settings", "array", [settings]),
            ("prefixes4", "ranges", _describe_prefixes(decider.tables[4])),
            ("prefixes6", "ranges", _describe_prefixes(decider.tables[16])),
            ("learned4", "dict", _describe_learned(decider, 4)),
            ("learned6", "dict", _describe_learned(decider, 16)),
            ("own", "set", [{"address": _text(address)} for address in sorted(decider.own)]),
            ("counters", "array", [{"counter": name, **values} for name, values in self.counters().items()]),
            ("rules", "array", [{"rule": rule, **values} for rule, values in self.rule_counters().items()]),
        ]
        programs = [{"name": "classify", "hook": "python", "ifname": self._device.name, "id": 0}]
        maps = [{"name": name, "type": kind, "entries": entries} for name, kind, entries in tables]
        return {"programs": programs, "maps": maps}

    def close(self) -> None:
        """Take the routes away, and what was changed for them. Idempotent."""
        self._is_attached = False
        self._device.admit = None
        self._routes.replace([])
        self._forwarding.restore()

    def _wanted(self) -> list[Key]:
        """The networks that have to be routed into the utun."""
        if not self._capture.lan and not self._capture.host:
            return []
        keys = outermost(prefix for prefix in self._prefixes if prefix.rule != RULE_FAKE_IP)
        if len(keys) > MOST_ROUTES:
            log.warning(
                "too many prefixes for routes: everything comes to ztun, and is decided there", prefixes=len(keys)
            )
            return [half for size in {len(network) for network, _ in keys} for half in _EVERYTHING[size]]
        return [half for key in keys for half in halves(key)]


def _is_link_local6(address: bytes) -> bool:
    return len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80


def _shown(counter: list[int]) -> dict[str, int]:
    return {"packets": counter[0], "bytes": counter[1]}


def _describe_prefixes(table: PrefixTable) -> list[dict[str, Any]]:
    return [
        {"prefix": f"{_text(network)}/{length}", **_describe(entry)}
        for (network, length), entry in sorted(table.entries.items(), key=lambda item: item[0])
    ]


def _describe_learned(decider: Decider, size: int) -> list[dict[str, Any]]:
    return [
        {"address": _text(address), **_describe(entry)}
        for address, entry in decider.learned.items()
        if len(address) == size
    ]


def _describe(entry: Entry) -> dict[str, Any]:
    return {"verdict": entry.verdict.name.lower(), "rule": entry.rule, "hits": entry.hits}


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)
