"""The composition root: makes the parts, joins them, runs them until asked to stop, and undoes all of it.

The order is that of what may fail and of what may be seen. What can be wrong in the settings is found before anything
is changed; capturing comes last, when everything behind it works. Whatever fails midway, what was done is undone.
"""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any

import structlog

from ztun import machine, making, platform, privileges, readiness
from ztun.assembly import Assembly
from ztun.config import Settings
from ztun.control.claims import claims_of
from ztun.control.lock import InstanceLock
from ztun.control.notify import notify, reload
from ztun.control.server import ControlServer
from ztun.errors import ZtunError
from ztun.gateway.dns import DnsOptions, DnsService
from ztun.gateway.droplog import DropLog
from ztun.gateway.gateway import Gateway
from ztun.lifecycle import StopRequest, Undo, unless
from ztun.log.system import log_system
from ztun.loops import LoopWatch
from ztun.network import NetworkKeeper, Parts
from ztun.placement import Listening
from ztun.ports import NetworkMonitor, Offload, PacketDevice, Verdict
from ztun.report import Report
from ztun.resolvers import SystemServers
from ztun.revival import DeviceRevival
from ztun.rules import Rules

log = structlog.get_logger("ztun.app")

# Marks ztun's own sockets (SO_MARK), so that they are never captured: "zt" in ASCII.
MARK = 0x7A74
# The classifier takes the gateway for dead after a second without a sign.
HEARTBEAT_INTERVAL = 0.2
# Objects that come before a look for dead cycles, and such looks before one at older objects. A flow is some 40, nearly
# all dead when it is over, and looking again and again at those that live is what costs.
COLLECT = (20_000, 20, 20)
Announce = Callable[[Mapping[str, Any]], None]


async def run(settings: Settings, announce: Announce) -> int:
    """Run a gateway until a signal or `ztun down` ends it. Returns the exit code.

    announce: called once, when it works, with what was done (see Report.summary). Raises ConfigError or ZtunError
    when it cannot start; everything is undone by then.
    """
    machine.require_privilege()
    privileges.forbid_new()
    machine.allow_many_sockets()
    asyncio.get_running_loop().set_exception_handler(_log_loop_error)
    stop = StopRequest(lambda: reload(log_system.reopen))
    with stop.signals():
        async with AsyncExitStack() as stack:
            log_system.attach(asyncio.get_running_loop())
            stack.callback(log_system.detach)
            undo = Undo(stack, stop.hurried)
            instance = Instance(settings, stop, undo)
            if await unless(stop.asked, instance.start()) is not None:
                announce(instance.report.summary())
                notify(f"READY=1\nMAINPID={os.getpid()}")
                pulse = readiness.make_pulse(instance.parts)
                undo.push("the pulse", pulse.stop)
                pulse.start()
                gc.collect()
                gc.freeze()  # what is here now stays: later collections need not look at it
                gc.set_threshold(*COLLECT)
                await stop.asked.wait()
            instance.parts.state = "stopping"
            notify("STOPPING=1")
            await unless(stop.hurried, instance.drain())
    if instance.failure is not None:
        raise instance.failure
    if undo.failed:
        raise ZtunError(f"stopped, but could not undo: {', '.join(undo.failed)}; the log has the reasons")
    return 0


class Instance:
    """One running gateway: makes its parts and joins them."""

    def __init__(self, settings: Settings, stop: StopRequest, undo: Undo) -> None:
        self.settings = settings
        self.failure: ZtunError | None = None  # why it ended without being asked to
        self.parts = Assembly(settings)
        self.report = Report(self.parts)
        self._stop = stop
        self._undo = undo
        self._loop = asyncio.get_running_loop()
        self._sockets = platform.make_socket_factory(MARK)
        self._loops = LoopWatch(self._loop, self.parts, platform.make_own_flows(MARK))
        self._system_servers = SystemServers(self.parts)
        self._next_beat = 0.0
        self._carries_direct = False  # what the classifier finds direct does not pass us by
        self._offload: Offload | None = None

    async def start(self) -> bool:
        """Make and join everything, capturing last. Raises ConfigError or ZtunError. Returns True."""
        await self._claim()
        monitor = platform.make_monitor(MARK)  # before anything is read that it would tell of
        self._undo.push("the network monitor", monitor.close)
        addresses = [machine.InterfaceAddress(*found) for found in platform.interface_addresses()]
        await self._check(addresses)
        self.parts.placement = await making.make_placement(self.settings, addresses, self._undo)
        device = self._make_device()
        await self._make_classifier(device, addresses)
        dns = self._make_dns(addresses)
        self._make_gateway(device, dns)
        await self._listen(dns)
        await asyncio.sleep(0)
        self._capture()
        await self._keep_up(monitor)
        machine.take_precedence()
        await readiness.give_up_privileges(self.parts)
        self.parts.state = "running"
        return True

    async def drain(self) -> None:
        """Let the flows come to an end, within timeouts.drain."""
        if self.parts.gateway is not None:
            await self.parts.gateway.drain(self.settings.timeouts.drain)

    async def _claim(self) -> None:
        path, report = self.settings.control.socket, self.report
        lock = InstanceLock(path, self.settings.dns.fake_ip.store, claims_of(self.settings))
        self._undo.push("the instance lock", lock.release)
        lock.acquire()
        name = self.settings.tun.name
        self._undo.push("the state file", lambda: platform.close_journal(name))
        platform.open_journal(name, [path, *lock.paths()])
        control = ControlServer(
            path, status=report.status, routes=report.routes, flows=report.flows, stop=self._stop.ask
        )
        self._undo.push("the control socket", control.close)
        await control.start()

    async def _check(self, addresses: list[machine.InterfaceAddress]) -> None:
        settings, parts = self.settings, self.parts
        absent = machine.absent_interfaces(settings.capture.lan)
        for name in absent:
            log.warning("no interface of this name, waiting for it", interface=name)
            parts.notes.append(f"no interface {name} yet: waiting for it")
        own = [entry.ip for entry in addresses]
        if "listen" in settings.dns.model_fields_set:
            own += making.tun_addresses(settings)
            parts.listen = await machine.check_listen(settings.dns.listen, own, waiting=bool(absent))
            return
        parts.listen, taken = await machine.default_listen(settings.capture.lan, addresses)
        parts.taken = [problem.partition(": ")[0] for problem in taken]
        for problem in taken:
            log.warning("not answering DNS there", at=problem, remedy="set dns.listen, or stop that program")
            parts.notes.append(f"no DNS on {problem}")

    def _make_device(self) -> PacketDevice:
        device = platform.open_device(self.settings.tun.name, self.settings.tun.mtu)
        self.parts.device = device
        self._undo.push("the TUN device", device.close)
        if device.name != self.settings.tun.name:
            self.settings = self.parts.settings = making.with_device(self.settings, device.name)
        self._tidy(platform.recover)
        routes = making.make_tun_routes(self.settings, device.name)
        self._undo.push("addresses and routes", routes.down)
        routes.up()
        self.parts.routes = routes
        return device

    def _tidy(self, remove: Callable[[str], list[str]]) -> None:
        """Remove what dead instances left, and tell of it. What resists is no reason not to start."""
        try:
            lines = remove(self.settings.tun.name)
        except OSError as error:
            log.warning("cannot remove what an earlier instance left behind", reason=str(error))
            return
        for line in lines:
            log.warning("removed what an earlier instance left behind", what=line)
            self.parts.notes.append(f"removed left-over: {line}")

    async def _make_classifier(self, device: PacketDevice, addresses: list[machine.InterfaceAddress]) -> None:
        classifier = await making.make_classifier(self.settings, device.name, MARK, addresses)
        self.parts.classifier = classifier
        self._carries_direct = getattr(classifier, "carries_direct", False)
        self._offload = getattr(classifier, "offload", None)
        if self._offload is not None:
            self._offload.spares = getattr(self._sockets, "spares", None)
        self._undo.push("the classifier", self._close_classifier)
        if classifier.fallback_reason is not None:
            self.parts.notes.append(f"{classifier.backend} instead of the first choice: {classifier.fallback_reason}")
        await self.parts.require_placement().install(classifier)

    def _close_classifier(self) -> None:
        classifier, self.parts.classifier = self.parts.classifier, None  # ends the heartbeat as well
        if classifier is not None:
            classifier.close()

    def _make_dns(self, addresses: list[machine.InterfaceAddress]) -> DnsService:
        """The DNS service, and the outbounds, which resolve the names of their proxies by it."""
        parts, rules = self.parts, self.parts.require_placement().rules
        parts.names = making.make_names(self.settings, self._undo)
        parts.servers = making.choose_servers(self.settings, parts.listen, addresses)
        options = DnsOptions(fake_ttl=self.settings.dns.fake_ip.ttl)
        dns = DnsService(rules, parts.names, parts.servers, self._sockets, self._learner(rules), options)
        parts.outbounds = making.make_proxies(self.settings, dns, self._sockets, self._undo)
        return dns

    def _make_gateway(self, device: PacketDevice, dns: DnsService) -> None:
        parts = self.parts
        assert parts.names is not None
        self._undo.push("the watch for loops", self._loops.stop)
        gateway = Gateway(
            loop=self._loop,
            poller=platform.poller_of(self._loop),
            device=device,
            rules=parts.require_placement().rules,
            names=parts.names,
            dns=dns,
            outbounds=parts.outbounds,
            options=making.gateway_options(self.settings),
            origins=parts.origin,
            is_own=self._loops.is_own,
            offload=self._offload,
        )
        gateway.engine.device_lost = DeviceRevival(parts, self._give_up).device_lost
        self._undo.push("the flows", gateway.stop)
        gateway.start()
        parts.gateway = gateway
        drops = DropLog(self._loop, lambda: gateway.statistics()["drops"])
        self._undo.push("the log of drops", drops.stop)
        drops.start()
        self._loops.start()

    async def _listen(self, dns: DnsService) -> None:
        parts = self.parts
        self._undo.push("the DNS service", dns.close)
        self._undo.push("the watch for DNS servers", self._system_servers.close)
        parts.dns = dns
        parts.listening = Listening(
            making.wanted_listeners(self.settings), self.settings.capture.lan, dns.start, parts.taken
        )
        await parts.listening.begin(parts.listen)

    def _learner(self, rules: Rules) -> Callable[[bytes, int, int], None]:
        def learn(address: bytes, ttl: int, rule: int) -> None:
            verdict = rules.learned_verdict(address, rule)
            comes_to_us = verdict is Verdict.TUNNEL or self._carries_direct
            if comes_to_us and self.parts.gateway is not None:
                self.parts.gateway.remember(address, rule)
            if self.parts.classifier is not None:
                self.parts.classifier.learn(address, verdict, rule)

        return learn

    def _capture(self) -> None:
        """The last step: from here on the clients' packets come to us."""
        self._beat()
        platform.poller_of(self._loop).pulse = self._beat_in_time
        self.parts.require_classifier().attach()
        # Only now: what a dead instance keeps shut stays so until this one is there (capture.fail).
        self._tidy(platform.sweep)
        resolver = making.make_resolver(self.settings, self.parts.require_device().name)
        if resolver is not None:
            self._undo.push("this host's resolver", resolver.down)
            resolver.up()
        for outbound in self.parts.outbounds.values():
            outbound.warm_up()

    def _beat(self) -> None:
        """Tell the classifier that we live; from the loop, so that a loop that hangs does not say so."""
        if self.parts.classifier is None:
            return
        self._loop.call_later(HEARTBEAT_INTERVAL, self._beat)
        self._next_beat = self._loop.time() + HEARTBEAT_INTERVAL
        self.parts.classifier.heartbeat()

    def _beat_in_time(self) -> None:
        """After standing still, before a word to a client: its answer would pass us by, to a server that resets it."""
        now = self._loop.time()
        if now >= self._next_beat and self.parts.classifier is not None:
            self._next_beat = now + HEARTBEAT_INTERVAL
            with suppress(OSError):  # the next beat in time says so
                self.parts.classifier.heartbeat()

    async def _keep_up(self, monitor: NetworkMonitor) -> None:
        """Follow the network from now on."""
        parts = Parts(
            device=self.settings.tun.name,
            lan=self.settings.capture.lan,
            classifier=self.parts.require_classifier(),
            routes=self.parts.require_routes(),
            gateway=self.parts.require_gateway(),
            sockets=self._sockets,
            servers=self._server_addresses,
            moved=self._moved,
            changed=self._way_changed,
            offload=self._offload,
        )
        self.parts.keeper = keeper = NetworkKeeper(monitor, parts)
        await keeper.begin()
        task = self._loop.create_task(keeper.run())
        self._undo.push("following the network", lambda: _cancelled(task))

    def _server_addresses(self) -> dict[str, Sequence[str]]:
        """Outbound -> the addresses of its proxy."""
        found = ((tag, outbound.server_addresses()) for tag, outbound in self.parts.outbounds.items())
        return {tag: addresses for tag, addresses in found if addresses is not None}

    async def _moved(self, found: Sequence[tuple[str, bytes, int]]) -> None:
        """This host has other addresses."""
        parts, placement = self.parts, self.parts.require_placement()
        addresses = [machine.InterfaceAddress(*each) for each in found]
        self._loops.follow(entry.address for entry in addresses)
        self._system_servers.network_changed(addresses)
        if parts.listening is not None:
            await parts.listening.follow(addresses)
        placement.place(addresses)
        if parts.classifier is not None and not placement.is_installed:
            await placement.install(parts.classifier, [parts.require_gateway()])

    def _way_changed(self, is_there: bool) -> None:
        """There is another way out, or none: what waits leads nowhere, and what did not answer may do so now."""
        for outbound in self.parts.outbounds.values():
            outbound.forget_connections()
            if is_there:
                outbound.warm_up()
        if self.parts.dns is not None:
            self.parts.dns.forgive()
        self._system_servers.network_changed()

    def _give_up(self, reason: ZtunError) -> None:
        self.failure = reason
        self._stop.ask()


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody was waiting for. It cost one flow; the others go on."""
    error = context.get("exception")
    log.error("unexpected error", detail=context.get("message"), exc_info=error, error=repr(error))


def run_until_stopped(settings: Settings, announce: Announce) -> int:
    """`run` in an event loop of its own."""
    with asyncio.Runner(loop_factory=platform.make_event_loop) as runner:
        return runner.run(run(settings, announce))
