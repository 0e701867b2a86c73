"""The classifier in BPF: the Python half of bpf/classify.c."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import structlog

from ztun.errors import ZtunError
from ztun.platform.linux import host, layout, links, offload, tables, xdp
from ztun.platform.linux.capture import Capture
from ztun.platform.linux.hooks import Hook, detach
from ztun.platform.linux.host import HostCapture, MakeHook
from ztun.platform.linux.layout import CLIENT, COUNTER, DECISION, FLOW, RECENT, SETTINGS, U32, U64
from ztun.platform.linux.loader import Objects
from ztun.platform.linux.maps import Map, PerCpuCounters, possible_cpus
from ztun.platform.linux.netlink import NetlinkError, explain
from ztun.platform.linux.offload import KernelOffload
from ztun.platform.linux.xdp import XdpFilter
from ztun.ports import RULE_BUILTIN, RULE_DEFAULT, RULE_DNS, RULE_FAKE_IP, Origin, Prefix, Verdict

log = structlog.get_logger("ztun.classifier")

PROGRAMS = ("capture", "capture_l3", "reply", *host.PROGRAMS)
# Map name -> (key size, value size in bytes, kind as `bpftool map` names it).
MAPS = {
    "settings": (U32.size, SETTINGS.size, "array"),
    "heartbeat": (U32.size, U64.size, "array"),
    "prefixes4": (U32.size + 4, DECISION.size, "lpm_trie"),
    "prefixes6": (U32.size + 16, DECISION.size, "lpm_trie"),
    "learned4": (4, DECISION.size, "lru_hash"),
    "learned6": (16, DECISION.size, "lru_hash"),
    "recents": (U32.size, RECENT.size, "percpu_array"),
    "own": (16, U32.size, "hash"),
    "clients": (16, CLIENT.size, "lru_hash"),
    "answered": (FLOW.size, U32.size, "lru_hash"),
    **host.MAPS,
    "counters": (U32.size, COUNTER.size, "percpu_array"),
    "rules": (U32.size, COUNTER.size, "percpu_array"),
}
_MOST_GENERATIONS = 0xFFFFFFFF  # 0 is that of no settings
_ONLY = U32.pack(0)  # the key of an array with one element
_BUILTIN_RULES = {RULE_DEFAULT, RULE_BUILTIN, RULE_FAKE_IP, RULE_DNS}


class _Attached(NamedTuple):
    """Where a program is: an interface keeps its index when it is renamed, and has another when it is made anew."""

    ifindex: int
    hook: Hook


class BpfClassifier:
    """A ztun.ports.Classifier in the kernel. Owns `objects`.

    fallback_reason: why the backend is not the first choice, None if it is; lenient: a LAN interface that refuses the
    program is only told of by `captured`, the first time as well.
    """

    def __init__(
        self, objects: Objects, backend: str, make_hook: MakeHook, capture: Capture, lenient: bool = False
    ) -> None:
        self.backend = backend
        self.fallback_reason: str | None = None
        self._shared = layout.read_shared(layout.find_sources())
        self._objects = objects
        self._make_hook = make_hook
        self._capture = capture
        self._lenient = lenient
        self._hooks: dict[str, _Attached] = {}  # by the name of the interface, the TUN's first
        self._indices: dict[str, int] = {}  # by name, those that interfaces had last
        self._captured = dict.fromkeys(capture.lan, "absent")
        self._is_attached = False
        self._generation = 0
        self._maps = {name: _open(objects.maps[name], *MAPS[name]) for name in MAPS}
        self._prefixes4 = tables.PrefixTable(self._maps["prefixes4"])
        self._prefixes6 = tables.PrefixTable(self._maps["prefixes6"])
        self._counters = PerCpuCounters(objects.maps["counters"])
        self._rules = PerCpuCounters(objects.maps["rules"])
        self._xdp = XdpFilter(objects.programs.get(xdp.PROGRAM), objects.maps, capture.xdp)
        self._host = HostCapture(
            objects.programs, objects.maps, self._shared, make_hook, capture.device, capture.lan, capture.host
        )
        self.offload = self._make_offload(backend)
        self._own: set[bytes] = set()
        self._device_index = links.find_index(capture.device, "tun.name")
        self.replace_own_addresses(capture.own_addresses)

    def _make_offload(self, backend: str) -> KernelOffload | None:
        """Only with TCX: a filter has its interface for itself, and stays when the process that looks after it dies."""
        if not self._capture.offload:
            return None
        objects = self._objects
        reason = next((objects.refused[name] for name in offload.PROGRAMS if name in objects.refused), None)
        if backend != "tcx":
            reason = "that takes TCX (Linux 6.6, and fail: open)"
        if reason is None:
            try:
                return KernelOffload(objects.programs, objects.maps, self._shared, self._make_hook, self._capture.mark)
            except OSError as error:
                hint = "; raw sockets take CAP_NET_RAW" if error.errno == errno.EPERM else ""
                reason = f"{error.strerror}{hint}"
        log.info("the kernel carries no connections, ztun does", reason=reason)
        return None

    def replace_rules(self, prefixes: Iterable[Prefix]) -> None:
        """Make the prefix tables equal to `prefixes`, writing only what differs. Raises ZtunError if too many."""
        for _ in self.replacing_rules(prefixes):
            pass

    def replacing_rules(self, prefixes: Iterable[Prefix]) -> Iterator[None]:
        """See ztun.ports.Classifier.replacing_rules."""
        by_length: dict[int, list[Prefix]] = {4: [], 16: []}
        for prefix in prefixes:
            by_length[len(prefix.network)].append(prefix)
        yield
        try:
            yield from self._prefixes4.replacing(by_length[4])
            yield from self._prefixes6.replacing(by_length[16])
        finally:
            self._forget_recent()
        yield from self._xdp.replacing_rules(by_length)
        self._follow_xdp()

    def replace_own_addresses(self, addresses: Iterable[bytes]) -> None:
        """Tell which addresses are this host's: never captured, not even their port 53."""
        wanted = {tables.widen(address) for address in addresses}
        self._maps["own"].update_many({address: U32.pack(1) for address in wanted - self._own})
        self._maps["own"].delete_many(self._own - wanted)
        self._forget_recent()
        self._host.forget(self._own - wanted)
        self._own = wanted

    def learn(self, address: bytes, verdict: Verdict, rule: int) -> None:
        """Give one address its own verdict, ahead of the prefixes. The least recently used make room."""
        table = self._maps["learned4" if len(address) == 4 else "learned6"]
        table.update(address, DECISION.pack(verdict, rule, 0))
        self._forget_recent()

    def forget(self) -> None:
        """Forget all that was learned: the rules that gave it are no more."""
        for name in ("learned4", "learned6"):
            table = self._maps[name]
            table.delete_many([key for key, _ in table.items()])
        self._forget_recent()

    def heartbeat(self) -> None:
        """Say that the gateway is alive; bpf_ktime_get_ns() reads CLOCK_MONOTONIC too."""
        self._maps["heartbeat"].update(_ONLY, U64.pack(time.monotonic_ns()))

    def origin(self, address: bytes) -> Origin | None:
        """Where packets of this client came in last; None for who is no client. Costs some system calls."""
        value = self._maps["clients"].lookup(tables.widen(address))
        if value is None:
            return None
        index, mac = CLIENT.unpack(value)
        name = links.name_of(index)
        return Origin(name, mac if any(mac) else None) if name is not None else None

    def attach(self) -> None:
        """Start to capture where there is something to capture from; called again, follow what became of it.

        Raises ZtunError naming the interface, the first time only: then nothing is attached.
        """
        self.heartbeat()
        try:
            # The way back first, so that no reply of a captured packet takes the wrong one.
            self._follow(self._capture.device, self._reply)
            self._host.follow()
            for ifname in self._capture.lan:
                self._captured[ifname] = self._capture_from(ifname)
        except BaseException:
            self._detach()
            raise
        self._is_attached = True
        self._follow_xdp()

    def captured(self) -> Mapping[str, str]:
        """LAN interface -> "captured", "absent", or why its packets cannot be had."""
        return dict(self._captured)

    def replace_exits(self, exits: Mapping[str, Collection[int]]) -> None:
        """See ztun.ports.Classifier.replace_exits."""
        self._host.replace_exits(exits)

    def exits(self) -> Mapping[str, str]:
        """See ztun.ports.Classifier.exits."""
        return self._host.states()

    def reinstall(self) -> None:
        """Nothing to do: programs stay on an interface that is down, and `attach` follows a TUN that is another."""

    def _follow_xdp(self) -> None:
        if self._is_attached:
            hooked = {ifname: self._hooks[ifname].ifindex for ifname in self._capture.lan if ifname in self._hooks}
            self._xdp.follow(hooked)

    def _capture_from(self, ifname: str) -> str:
        """One interface's entry in `captured`."""
        try:
            is_there = self._follow(ifname, lambda index: "capture" if links.has_link_header(index) else "capture_l3")
        except ZtunError as error:
            if not (self._is_attached or self._lenient):
                raise
            return str(error)
        return "captured" if is_there else "absent"

    def _reply(self, index: int) -> str:
        if index != self._device_index:
            self._device_index = index
            self._write_settings()
        return "reply"

    def _follow(self, ifname: str, choose: Callable[[int], str]) -> bool:
        """Have a program on the interface of this name and on no other that had it. False when there is none.

        choose: index -> the name of the program. Raises ZtunError.
        """
        index = links.index_of(ifname)
        attached = self._hooks.get(ifname)
        if attached is not None and attached.ifindex != index:
            del self._hooks[ifname]
            detach([attached.hook])
            self._forget_clients(attached.ifindex)
        elif attached is not None:
            return True
        if index is None:
            return False
        try:
            name = choose(index)
            self._hooks[ifname] = _Attached(index, self._make_hook(name, self._objects.programs[name], ifname))
        except (NetlinkError, OSError) as error:
            if links.index_of(ifname) != index:  # it went meanwhile; what comes in its place is told of
                return False
            raise ZtunError(f"cannot attach to {ifname} ({self.backend}): {explain(error)}") from error
        former = self._indices.get(ifname, index)
        if former != index and self.offload is not None:
            self.offload.move_lan(former, index)
        self._indices[ifname] = index
        return True

    def _forget_clients(self, index: int) -> None:
        """Replies to clients of an interface that is gone: the kernel's routes know better, until a client is heard."""
        table = self._maps["clients"]
        table.delete_many([key for key, value in table.items() if CLIENT.unpack(value)[0] == index])

    def counters(self) -> dict[str, dict[str, int]]:
        """Verdict, drop reason or pass reason (the names of bpf/shared.h) -> {"packets", "bytes"}."""
        return {name: self._counted(self._counters, index) for index, name in self._shared.counter_names().items()}

    def rule_counters(self) -> dict[int, dict[str, int]]:
        """Rule id -> {"packets", "bytes"} of the packets that the kernel decided by it."""
        offset = self._shared.constants["RULE_OFFSET"]
        known = _BUILTIN_RULES | self._prefixes4.rules() | self._prefixes6.rules()
        highest = self._shared.constants["MAX_RULES"]
        return {rule: self._counted(self._rules, rule + offset) for rule in sorted(known) if rule < highest}

    @staticmethod
    def _counted(counters: PerCpuCounters, index: int) -> dict[str, int]:
        packets, octets = counters.read(index)
        return {"packets": packets, "bytes": octets}

    def snapshot(self) -> dict[str, Any]:
        """{"programs": [{"name", "hook", "ifname", "id"}], "maps": [{"name", "type", "entries"}], "xdp": [see xdp]}."""
        recents = tables.read_recents(self._maps["recents"])
        untold = tables.untold(recents)
        learned = {name: list(tables.describe_learned(self._maps[name], untold)) for name in ("learned4", "learned6")}
        entries = {
            "settings": [self._describe_settings()],
            "heartbeat": [self._describe_heartbeat()],
            **learned,
            "prefixes4": self._prefixes4.describe(untold),  # what is left of it
            "prefixes6": self._prefixes6.describe(untold),
            "recents": tables.describe_recents(recents, self._generation),
            "own": [{"address": tables.show_address(address)} for address in sorted(self._own)],
            "clients": self._describe_clients(),
            "answered": [host.show_flow(key) for key, _ in self._maps["answered"].items()],
            **self._host.maps(),
            "counters": [{"counter": name, **values} for name, values in self.counters().items()],
            "rules": [{"rule": rule, **values} for rule, values in self.rule_counters().items()],
        }
        maps = [{"name": name, "type": MAPS[name][2], "entries": entries[name]} for name in MAPS]
        programs = [attached.hook.describe() for attached in self._hooks.values()]
        programs += [*self._host.programs(), *self._xdp.programs()]
        if self.offload is not None:
            programs += self.offload.programs()
            kind = offload.MAPS["carried"][2]
            maps.append({"name": "carried", "type": kind, "entries": self.offload.describe()})
        return {"programs": programs, "maps": maps, "xdp": self._xdp.describe()}

    def close(self) -> None:
        """Detach and unload. Idempotent."""
        self._detach()
        self._objects.close()

    def _detach(self) -> None:
        self._is_attached = False
        self._captured = dict.fromkeys(self._captured, "absent")
        if self.offload is not None:
            self.offload.close()
        self._host.close()
        self._xdp.close()
        while self._hooks:
            detach([self._hooks.popitem()[1].hook])

    def _forget_recent(self) -> None:
        """To be called after each change of what decides: recent addresses are decided anew then."""
        self._generation = self._generation % _MOST_GENERATIONS + 1
        self._write_settings()

    def _write_settings(self) -> None:
        capture, constants = self._capture, self._shared.constants
        flags = constants["SETTING_HIJACK_DNS"] if capture.hijack_dns else 0
        flags |= constants["SETTING_FAIL_CLOSED"] if capture.fail_closed else 0
        flags |= constants["SETTING_CAPTURE_HOST"] if capture.host else 0
        flags |= constants["SETTING_OFFLOAD"] if self.offload is not None else 0
        settings = SETTINGS.pack(self._device_index, capture.mark, flags, self._generation)
        self._maps["settings"].update(_ONLY, settings)

    def _describe_settings(self) -> dict[str, Any]:
        capture = self._capture
        return {
            "tun": capture.device,
            "mark": capture.mark,
            "hijack_dns": capture.hijack_dns,
            "host": capture.host,
            "fail": "closed" if capture.fail_closed else "open",
        }

    def _describe_heartbeat(self) -> dict[str, Any]:
        beat = U64.unpack(self._maps["heartbeat"].lookup(_ONLY) or bytes(U64.size))[0]
        return {"age_ms": (time.monotonic_ns() - beat) // 1_000_000 if beat else None}

    def _describe_clients(self) -> list[dict[str, Any]]:
        names = dict(socket.if_nameindex())
        found = sorted(self._maps["clients"].items())
        return [{"address": tables.show_address(key), **_describe_client(names, value)} for key, value in found]


def _open(fd: int, key_size: int, value_size: int, kind: str) -> Map:
    """A per-CPU map has one value for each possible CPU, in one piece."""
    return Map(fd, key_size, value_size * possible_cpus() if kind.startswith("percpu") else value_size)


def _describe_client(names: Mapping[int, str], value: bytes) -> dict[str, Any]:
    index, mac = CLIENT.unpack(value)
    return {"ifname": names.get(index, ""), "mac": mac.hex(":") if any(mac) else None}
