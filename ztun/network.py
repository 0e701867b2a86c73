"""Keeps the parts of a running gateway in step with the network around it. docs/network-changes.md tells it all."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import structlog

from ztun.errors import ZtunError
from ztun.gateway.routing import text
from ztun.ports import Classifier, NetworkEvent, NetworkMonitor, NetworkState, Offload, Path, Routes

log = structlog.get_logger("ztun.network")

# Nothing is sent there: the kernel is asked how it would send it, which is how the rest of the world is reached.
_ANYWHERE = {"ipv4": "9.9.9.9", "ipv6": "2620:fe::9"}

Address = tuple[str, bytes, int]
"""Interface name, packed address, prefix length in bits."""


class Pausable(Protocol):
    """The gateway, as far as the network matters to it."""

    def pause(self, reason: str) -> None: ...

    def resume(self) -> None: ...


class DeadAddresses(Protocol):
    """Where sockets are made: those that were given one of the addresses `dead` lead nowhere."""

    dead: frozenset[str]


class Parts(NamedTuple):
    """What is kept in step.

    device: the TUN's name; servers: outbound -> addresses of its proxy, none where they are not known yet; moved: told
    of this host's addresses when they changed, without those of the TUN; changed: told whether there is a way out when
    it is another.
    """

    device: str
    lan: Sequence[str]
    classifier: Classifier
    routes: Routes
    gateway: Pausable
    sockets: DeadAddresses
    servers: Callable[[], Mapping[str, Sequence[str]]]
    moved: Callable[[Sequence[Address]], Awaitable[None]]
    changed: Callable[[bool], None]
    offload: Offload | None = None


class NetworkKeeper:
    """See `run`. To be made when the classifier is attached.

    Everything that cannot be done now is said in the log, and done when the network changes again.
    """

    def __init__(self, monitor: NetworkMonitor, parts: Parts) -> None:
        self._monitor = monitor
        self._parts = parts
        self._paused = False
        self._captured = dict(parts.classifier.captured())
        self._told_bridges: dict[str, str] = {}  # interfaces that are ports of one
        self._exits: dict[str, str] = {}
        self._ways: dict[str, Path] = {}  # the last way there was to each destination
        self._addresses: list[Address] | None = None
        monitor.watch(self._destinations)

    async def begin(self) -> None:
        """Look at the network for the first time. Raises OSError."""
        now = await self._monitor.read()
        await self._follow(now, now, [])

    async def run(self) -> None:
        """Follow the network from `begin` on until cancelled."""
        before = self._monitor.state
        async for events in self._monitor.events(self._glance):
            now = self._monitor.state
            log.debug(
                "the network changed", events=[f"{kind} {name} {'+' if up else '-'}" for kind, name, up in events]
            )
            await self._follow(before, now, events)
            before = now

    def _glance(self) -> None:
        """Capture from an interface that appeared before anybody sends by it: what slips by is not tunnelled, and the
        real server resets a connection that it never heard of.
        """
        try:
            self._capture()
        except (ZtunError, OSError) as error:
            log.debug("not captured at once", reason=str(error))

    async def _follow(self, before: NetworkState, now: NetworkState, events: Sequence[NetworkEvent]) -> None:
        """Quick things first, and each whether or not the one before it could be done."""
        for what, step in (
            ("the TUN", self._keep_device),
            ("capture", self._keep_capture),
            ("ways out", self._keep_ways),
            ("own addresses", self._keep_addresses),
        ):
            try:
                await step(before, now, events)
            except (ZtunError, OSError) as error:
                log.warning("cannot follow the network, until it changes again", what=what, reason=str(error))
            except Exception:
                log.exception("cannot follow the network, until it changes again", what=what)

    async def _keep_device(self, before: NetworkState, now: NetworkState, events: Sequence[NetworkEvent]) -> None:
        """With its link set down, the TUN loses routes and IPv6 addresses; who manages networks may take them too."""
        device = self._parts.device
        if device not in now.links:
            return
        if NetworkEvent("link", device, False) in events:
            log.warning("somebody set the TUN down, setting it up again", device=device)
        elif NetworkEvent("address", device, False) in events:
            log.warning("somebody took addresses from the TUN, putting them back", device=device)
        else:
            return
        self._parts.routes.restore()
        self._parts.classifier.reinstall()

    async def _keep_capture(self, before: NetworkState, now: NetworkState, events: Sequence[NetworkEvent]) -> None:
        self._parts.classifier.replace_exits({to: on for to, on in now.exits.items() if to != self._parts.device})
        self._capture()
        bridges = {name: link.bridge for name in self._parts.lan if (link := now.links.get(name)) and link.bridge}
        for name, bridge in bridges.items() - self._told_bridges.items():
            log.warning("packets of a bridge's ports come in by the bridge", interface=name, remedy=f"capture {bridge}")
        self._told_bridges = bridges

    def _capture(self) -> None:
        self._parts.classifier.attach()
        was, self._captured = self._captured, dict(self._parts.classifier.captured())
        for name, state in self._captured.items():
            if state == was.get(name):
                continue
            if state == "captured":
                log.info("capturing from an interface that appeared", interface=name)
            elif state == "absent":
                log.warning("no interface of this name, waiting for it", interface=name)
            else:
                log.warning("cannot capture from an interface", interface=name, reason=state)
        was, self._exits = self._exits, dict(self._parts.classifier.exits())
        for name in was.keys() - self._exits.keys():
            log.info("no longer a way out of this host", interface=name)
        for name, state in self._exits.items():
            if state == "captured" and state != was.get(name):
                log.info("capturing what this host sends", interface=name)
            elif state not in ("captured", "absent", was.get(name)):
                log.warning("cannot capture what this host sends", interface=name, reason=state)

    async def _keep_ways(self, before: NetworkState, now: NetworkState, events: Sequence[NetworkEvent]) -> None:
        self._parts.sockets.dead = _dead_addresses(now)
        former = {way.ifname for way in self._ways.values()}
        found = {to: path for to, path in now.paths.items() if path is not None}
        is_another = any(self._ways.get(to, path)[:3] != path[:3] for to, path in found.items())
        # A destination that nobody asked for until now is no change.
        is_altered = is_another or any(
            path != now.paths.get(to) for to, path in before.paths.items() if to in now.paths
        )
        self._ways.update(found)
        if self._parts.offload is not None:
            self._parts.offload.follow({to: path.ifname for to, path in found.items()})
        is_usable = self._is_usable(now)
        if not is_usable and not self._paused:
            self._pause(now)
        # A link without carrier keeps its connections; those that are only being made are given up.
        went = any(not up for _kind, _name, up in events)
        count = await self._monitor.reset_stranded(before, former if is_altered else ()) if went or is_altered else 0
        if count or is_altered:
            log.info("ways out changed", egress=_say_ways(found.values()), connections_reset=count)
        if is_usable and self._paused:
            self._paused = False
            self._parts.gateway.resume()
            log.info("the network is back, going on")
        if is_altered:
            self._parts.changed(is_usable)

    def _pause(self, now: NetworkState) -> None:
        self._paused = True
        down = sorted({path.ifname for path in now.paths.values() if path is not None})
        reason = f"no carrier on {', '.join(down)}" if down else "no route to anywhere"
        log.warning("the network is gone, pausing until it is back", reason=reason)
        self._parts.gateway.pause(reason)

    async def _keep_addresses(self, before: NetworkState, now: NetworkState, events: Sequence[NetworkEvent]) -> None:
        addresses = sorted(entry for entry in now.addresses if entry[0] != self._parts.device)
        if addresses != self._addresses:
            self._parts.classifier.replace_own_addresses([address for _, address, _ in addresses])
            await self._parts.moved(addresses)
            self._addresses = addresses

    def _destinations(self) -> list[str]:
        return [*_ANYWHERE.values(), *(server for servers in self._parts.servers().values() for server in servers)]

    def _is_usable(self, now: NetworkState) -> bool:
        """Whether anything can be reached; a server whose address is not known yet may be."""
        if any(path is not None and path.up for path in now.paths.values()):
            return True
        return any(not servers for servers in self._parts.servers().values())

    def describe(self) -> dict[str, Any]:
        """The section "network" of `ztun status --json`."""
        state = self._monitor.state
        return {
            "state": "paused" if self._paused else "up",
            "egress": [
                {
                    "to": label,
                    "interface": path.ifname,
                    "address": path.source,
                    "gateway": path.gateway,
                    "state": "up" if path.up else "down",
                }
                for label, path in self._best_paths(state).items()
            ],
            "lan": [self._describe_lan(name, state) for name in self._parts.lan],
            "host": [
                {"name": name, "state": captured, "versions": list(state.exits.get(name, ()))}
                for name, captured in self._parts.classifier.exits().items()
            ],
            "events": dict(self._monitor.counts),
        }

    def _best_paths(self, state: NetworkState) -> dict[str, Path]:
        """The way to each family and proxy: of a proxy with several addresses, the first that is up."""
        servers = self._parts.servers()
        labels = [*_ANYWHERE.items(), *((tag, server) for tag, some in servers.items() for server in some)]
        best: dict[str, Path] = {}
        for label, to in labels:
            path = state.paths.get(to)
            if path is not None and (label not in best or (path.up and not best[label].up)):
                best[label] = path
        return best

    def _describe_lan(self, name: str, state: NetworkState) -> dict[str, Any]:
        captured = self._parts.classifier.captured().get(name, "absent")
        if captured not in ("captured", "absent"):
            return {"name": name, "state": "failed", "reason": captured}
        if captured == "absent" or name not in state.links:
            return {"name": name, "state": "absent"}
        if bridge := state.links[name].bridge:
            return {"name": name, "state": "failed", "reason": f"a port of {bridge}: capture {bridge}"}
        return {"name": name, "state": "up" if state.links[name].up else "down"}


def _dead_addresses(now: NetworkState) -> frozenset[str]:
    """Our addresses, as text, that are on interfaces without a carrier only."""
    alive: set[bytes] = set()
    dead: set[bytes] = set()
    for ifname, packed, _length in now.addresses:
        link = now.links.get(ifname)
        (alive if link is None or link.up else dead).add(packed)
    return frozenset(text(packed) for packed in dead - alive)


def _say_ways(paths: Iterable[Path]) -> list[str]:
    return list(dict.fromkeys(f"{path.ifname} {path.source}{'' if path.up else ' (down)'}" for path in paths))
