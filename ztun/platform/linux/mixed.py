"""BPF wherever it can be attached, and routes for the interfaces that refuse it.

Both keep the same rules, and an interface belongs to one of them: an ip rule names the interface it is for. What comes
in by routes goes back by the kernel's forwarding, since the program on the TUN knows nothing of those clients.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import structlog

from ztun.errors import ZtunError
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.classifier import BpfClassifier
from ztun.platform.linux.policy import MOST_LEARNED, RoutesClassifier
from ztun.ports import Origin, Prefix, Verdict

log = structlog.get_logger("ztun.classifier")


class MixedClassifier:
    """A ztun.ports.Classifier. Owns `bpf`, which has to let interfaces fail (BpfClassifier.lenient).

    fallback_reason: why BPF is not attached in the best way, and which interfaces are captured from by routes, and why.
    """

    def __init__(self, bpf: BpfClassifier, capture: Capture) -> None:
        self.backend = bpf.backend
        self.fallback_reason = bpf.fallback_reason
        self.offload = bpf.offload
        self._bpf = bpf
        self._capture = capture
        self._routes: RoutesClassifier | None = None
        self._refused: dict[str, str] = {}  # interface -> why it has no program
        self._unreachable: dict[str, str] = {}  # interface -> why there are no routes for it either
        self._prefixes: list[Prefix] = []
        self._is_attached = False
        self._learned: OrderedDict[bytes, tuple[Verdict, int]] = OrderedDict()

    def replace_rules(self, prefixes: Iterable[Prefix]) -> None:
        """See ztun.ports.Classifier, as for all that follows."""
        self._prefixes = list(prefixes)
        self._bpf.replace_rules(self._prefixes)
        if self._routes is not None:
            self._routes.replace_rules(self._prefixes)

    def replacing_rules(self, prefixes: Iterable[Prefix]) -> Iterator[None]:
        self._prefixes = list(prefixes)
        yield from self._bpf.replacing_rules(self._prefixes)
        if self._routes is not None:
            yield from self._routes.replacing_rules(self._prefixes)

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        self._learned[address] = verdict, rule
        self._learned.move_to_end(address)
        if len(self._learned) > MOST_LEARNED:
            self._learned.popitem(last=False)
        self._bpf.learn(address, verdict, rule)
        if self._routes is not None:
            self._routes.learn(address, verdict, rule)

    def forget(self) -> None:
        self._learned.clear()
        for one in self._both():
            one.forget()

    def replace_own_addresses(self, addresses: Iterable[bytes]) -> None:
        self._bpf.replace_own_addresses(addresses)

    def heartbeat(self) -> None:
        self._bpf.heartbeat()

    def origin(self, address: bytes) -> Origin | None:
        found = self._bpf.origin(address)
        return found if found is not None or self._routes is None else self._routes.origin(address)

    def attach(self) -> None:
        """Programs first; then routes for the interfaces that have none. Raises ZtunError, the first time only."""
        self._bpf.attach()
        states = self._bpf.captured()
        refused = {ifname: state for ifname, state in states.items() if state not in ("captured", "absent")}
        if refused.keys() == self._refused.keys():
            if self._routes is not None:
                self._routes.attach()
            self._is_attached = True
            return
        for ifname in refused.keys() - self._refused.keys():
            log.warning("no BPF on an interface: capturing from it by routes", interface=ifname, reason=refused[ifname])
        for ifname in self._refused.keys() - refused.keys():
            log.info("BPF on an interface again, no routes any more", interface=ifname)
        self._refused = refused
        self._remake_routes()
        self._tell()
        self._is_attached = True

    def _remake_routes(self) -> None:
        if self._routes is not None:
            self._routes.close()
            self._routes = None
        self._unreachable = {}
        if not self._refused:
            return
        made = RoutesClassifier(self._capture._replace(lan=tuple(self._refused), host=False))
        try:
            made.replace_rules(self._prefixes)
            for address, (verdict, rule) in self._learned.items():
                made.learn(address, verdict, rule)
            made.attach()
        except ZtunError as error:
            made.close()
            self._unreachable = {ifname: f"{reason}; {error}" for ifname, reason in self._refused.items()}
            log.warning("no routes either", reason=str(error))
            if not self._is_attached:
                self._bpf.close()
                raise ZtunError("; ".join(self._unreachable.values())) from error
        else:
            self._routes = made

    def _tell(self) -> None:
        by_routes = [f"{ifname} by routes, {reason}" for ifname, reason in self._refused.items()]
        reasons = [self._bpf.fallback_reason, *by_routes]
        self.fallback_reason = "; ".join(reason for reason in reasons if reason) or None

    def captured(self) -> Mapping[str, str]:
        by_routes = dict(self._routes.captured()) if self._routes is not None else {}
        return {**self._bpf.captured(), **by_routes, **self._unreachable}

    def replace_exits(self, exits: Mapping[str, Collection[int]]) -> None:
        self._bpf.replace_exits(exits)

    def exits(self) -> Mapping[str, str]:
        return self._bpf.exits()

    def reinstall(self) -> None:
        for one in self._both():
            one.reinstall()

    def counters(self) -> dict[str, dict[str, int]]:
        """Those of BPF. What is captured by routes is not in them."""
        return self._bpf.counters()

    def rule_counters(self) -> dict[int, dict[str, int]]:
        """Those of BPF, too."""
        return self._bpf.rule_counters()

    def snapshot(self) -> dict[str, Any]:
        found = self._bpf.snapshot()
        if self._routes is None:
            return found
        by_routes = self._routes.snapshot()
        return {**by_routes, **found, "maps": [*found["maps"], *by_routes["maps"]]}

    def close(self) -> None:
        for one in self._both():
            one.close()
        self._routes = None

    def _both(self) -> list[BpfClassifier | RoutesClassifier]:
        return [self._bpf] if self._routes is None else [self._bpf, self._routes]
