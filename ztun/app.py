"""The composition root: makes the parts, joins them, runs them until asked to stop, and undoes all of it.

The order is that of what may fail and of what may be seen. What can be wrong in the settings is found before anything
is changed; capturing comes last, when everything behind it works. Whatever fails midway, what was done is undone.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

import structlog

from ztun import __version__, machine, platform
from ztun.config import Settings, to_rules
from ztun.control.lock import InstanceLock
from ztun.control.notify import notify
from ztun.control.server import ControlServer
from ztun.describe import describe_rules
from ztun.errors import ConfigError, ZtunError
from ztun.gateway.dns import DnsOptions, DnsService
from ztun.gateway.droplog import DropLog
from ztun.gateway.gateway import Gateway, GatewayOptions
from ztun.gateway.limits import Limits
from ztun.geoip import CountryDatabase
from ztun.lifecycle import StopRequest, Undo, unless
from ztun.log.system import log_system
from ztun.names.pool import FakeIpPool
from ztun.names.store import SqliteNameStore
from ztun.network import NetworkKeeper, Parts
from ztun.outbound import OutboundSpec, Tools, make_outbounds
from ztun.placement import Listening, Placement
from ztun.ports import Classifier, NetworkMonitor, Outbound, PacketDevice, Routes, Verdict
from ztun.rules import Network, Rules

log = structlog.get_logger("ztun.app")
names_log = structlog.get_logger("ztun.names")

# Marks ztun's own sockets (SO_MARK), so that they are never captured: "zt" in ASCII.
MARK = 0x7A74
# The classifier takes the gateway for dead after a second without a sign.
HEARTBEAT_INTERVAL = 0.2
# Objects that come before a look for dead cycles, and such looks before one at older objects. A flow is some 40, nearly
# all dead when it is over, and looking again and again at those that live is what costs.
_COLLECT = (20_000, 20, 20)
# How often the TUN is made again before it is left to a person.
_MOST_REVIVALS, _REVIVAL_PERIOD = 10, 60.0
Announce = Callable[[Mapping[str, Any]], None]
# Empty sections, so that the keys of `status --json` are there from the first moment on.
_NO_STATISTICS: dict[str, Any] = {
    "tcp": {"active": 0, "total": 0},
    "udp": {"active": 0, "total": 0},
    "icmp": {},
    "dns": {},
    "pool": {},
    "outbounds": {},
    "drops": {},
    "network": {"state": "up", "egress": [], "lan": [], "events": {}},
}


async def run(settings: Settings, announce: Announce) -> int:
    """Run a gateway until a signal or `ztun down` ends it. Returns the exit code.

    announce: called once, when it works, with what was done (see Instance.summary). Raises ConfigError or ZtunError
    when it cannot start; everything is undone by then.
    """
    machine.require_supported(settings)
    machine.require_privilege()
    machine.allow_many_sockets()
    asyncio.get_running_loop().set_exception_handler(_log_loop_error)
    stop = StopRequest(log_system.reopen)
    with stop.signals():
        async with AsyncExitStack() as stack:
            log_system.attach(asyncio.get_running_loop())
            stack.callback(log_system.detach)
            undo = Undo(stack, stop.hurried)
            instance = Instance(settings, stop, undo)
            if await unless(stop.asked, instance.start()) is not None:
                announce(instance.summary())
                notify(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=running")
                gc.collect()
                gc.freeze()  # what is here now stays: later collections need not look at it
                gc.set_threshold(*_COLLECT)
                await stop.asked.wait()
            instance.state = "stopping"
            notify("STOPPING=1")
            await unless(stop.hurried, instance.drain())
    if instance.failure is not None:
        raise instance.failure
    if undo.failed:
        raise ZtunError(f"stopped, but could not undo: {', '.join(undo.failed)}; the log has the reasons")
    return 0


class Instance:
    """The parts of one running gateway."""

    def __init__(self, settings: Settings, stop: StopRequest, undo: Undo) -> None:
        self.settings = settings
        self.state = "starting"
        self.failure: ZtunError | None = None  # why it ended without being asked to
        self._stop = stop
        self._undo = undo
        self._started = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._sockets = platform.make_socket_factory(MARK)
        self._classifier: Classifier | None = None
        self._device: PacketDevice | None = None
        self._revivals: list[float] = []
        self._routes: Routes | None = None
        self._gateway: Gateway | None = None
        self._outbounds: dict[str, Outbound] = {}
        self._names: FakeIpPool | None = None
        self._countries: dict[str, list[Network]] = {}
        self._keeper: NetworkKeeper | None = None
        self._placement: Placement | None = None
        self._listening: Listening | None = None
        self._dns: DnsService | None = None
        self._listen: list[str] = []
        self._taken: list[str] = []
        self._servers: list[str] = []
        self._notes: list[str] = []

    async def start(self) -> bool:
        """Make and join everything, capturing last. Raises ConfigError or ZtunError. Returns True."""
        await self._claim()
        monitor = platform.make_monitor(MARK)  # before anything is read that it would tell of
        self._undo.push("the network monitor", monitor.close)
        addresses = [machine.InterfaceAddress(*found) for found in platform.interface_addresses()]
        await self._check(addresses)
        self._placement = await self._make_placement(addresses)
        await self._make_parts(self._placement, addresses)
        await asyncio.sleep(0)
        self._capture()
        await self._keep_up(monitor)
        self.state = "running"
        return True

    async def drain(self) -> None:
        """Let the flows come to an end, within timeouts.drain."""
        if self._gateway is not None:
            await self._gateway.drain(self.settings.timeouts.drain)

    async def _claim(self) -> None:
        path = self.settings.control.socket
        lock = InstanceLock(path)
        self._undo.push("the instance lock", lock.release)
        lock.acquire()
        control = ControlServer(path, status=self.status, routes=self.routes, flows=self.flows, stop=self._stop.ask)
        self._undo.push("the control socket", control.close)
        await control.start()

    async def _check(self, addresses: list[machine.InterfaceAddress]) -> None:
        settings = self.settings
        absent = machine.absent_interfaces(settings.capture.lan)
        for name in absent:
            log.warning("no interface of this name, waiting for it", interface=name)
            self._notes.append(f"no interface {name} yet: waiting for it")
        own = [entry.ip for entry in addresses]
        if "listen" in settings.dns.model_fields_set:
            own += self._tun_addresses()
            self._listen = await machine.check_listen(settings.dns.listen, own, waiting=bool(absent))
            return
        self._listen, taken = await machine.default_listen(settings.capture.lan, addresses)
        self._taken = [problem.partition(": ")[0] for problem in taken]
        for problem in taken:
            log.warning("not answering DNS there", at=problem, remedy="set dns.listen, or stop that program")
            self._notes.append(f"no DNS on {problem}")

    def _tun_addresses(self) -> list[machine.IpAddress]:
        tun = self.settings.tun
        return [interface.ip for interface in (tun.address, tun.address6) if interface is not None]

    async def _make_placement(self, addresses: list[machine.InterfaceAddress]) -> Placement:
        country = None
        path = self.settings.route.geoip_database
        if path is not None:
            database = CountryDatabase(path)
            self._undo.push("the country database", database.close)
            country = database.country
            codes = {code for rule in self.settings.route.rules for code in rule.geoip}
            if codes:
                self._countries = await asyncio.to_thread(database.networks_of, codes)
        fake = self.settings.dns.fake_ip
        ranges = [network for network in (fake.range, fake.range6) if network is not None]
        placement = Placement(to_rules(self.settings, country), ranges, self._countries.__getitem__)
        placement.place(addresses)
        return placement

    def _sweep(self) -> None:
        for line in platform.sweep(self.settings.tun.name):
            log.warning("removed what an earlier instance left behind", what=line)
            self._notes.append(f"removed left-over: {line}")

    async def _make_parts(self, placement: Placement, addresses: list[machine.InterfaceAddress]) -> None:
        device = self._make_device()
        rules = placement.rules
        await self._make_classifier(device, placement, addresses)
        names = self._make_names()
        sockets = self._sockets
        self._servers = self._choose_servers(addresses)
        options = DnsOptions(fake_ttl=self.settings.dns.fake_ip.ttl)
        dns = DnsService(rules, names, self._servers, sockets, self._learner(rules), options)
        self._outbounds = outbounds = self._make_outbounds(dns)
        gateway = Gateway(
            loop=self._loop,
            poller=platform.poller_of(self._loop),
            device=device,
            rules=rules,
            names=names,
            dns=dns,
            outbounds=outbounds,
            options=self._gateway_options(),
        )
        self._device = device
        gateway.engine.device_lost = self._device_lost
        self._undo.push("the flows", gateway.stop)
        gateway.start()
        self._gateway = gateway
        drops = DropLog(self._loop, lambda: gateway.statistics()["drops"])
        self._undo.push("the log of drops", drops.stop)
        drops.start()
        self._undo.push("the DNS service", dns.close)
        self._dns = dns
        wanted = list(self.settings.dns.listen) if "listen" in self.settings.dns.model_fields_set else None
        self._listening = Listening(wanted, self.settings.capture.lan, dns.start, self._taken)
        await self._listening.begin(self._listen)

    def _make_device(self) -> PacketDevice:
        tun, fake = self.settings.tun, self.settings.dns.fake_ip
        device = platform.open_device(tun.name, tun.mtu)
        self._undo.push("the TUN device", device.close)
        self._sweep()
        routes = platform.make_routes(
            device.name,
            mtu=tun.mtu,
            address=str(tun.address),
            address6=str(tun.address6) if tun.address6 is not None else None,
            ranges=[str(network) for network in (fake.range, fake.range6) if network is not None],
        )
        self._undo.push("addresses and routes", routes.down)
        routes.up()
        self._routes = routes
        return device

    async def _make_classifier(
        self, device: PacketDevice, placement: Placement, addresses: list[machine.InterfaceAddress]
    ) -> None:
        capture = self.settings.capture
        classifier: Classifier = await platform.make_classifier(
            capture.backend,
            device.name,
            capture.lan,
            mark=MARK,
            hijack_dns=self.settings.dns.hijack,
            fail=capture.fail,
            own_addresses=[entry.address for entry in addresses],
        )
        self._classifier = classifier
        self._undo.push("the classifier", self._close_classifier)
        if classifier.fallback_reason is not None:
            self._notes.append(f"{classifier.backend} instead of the first choice: {classifier.fallback_reason}")
        await placement.install(classifier)

    def _close_classifier(self) -> None:
        classifier, self._classifier = self._classifier, None  # ends the heartbeat as well
        if classifier is not None:
            classifier.close()

    def _make_names(self) -> FakeIpPool:
        fake = self.settings.dns.fake_ip
        store = None
        if fake.store is not None:
            store = SqliteNameStore(str(fake.store), _warn_of_names)
            self._undo.push("the store of Fake-IPs", store.close)
        try:
            return FakeIpPool(fake.range, fake.range6, fake.size, float(fake.ttl), store)
        except ValueError as error:
            raise ConfigError(f"dns.fake_ip.size: {error}") from None

    def _make_outbounds(self, dns: DnsService) -> dict[str, Outbound]:
        specs = [
            OutboundSpec(
                tag=outbound.tag,
                type=outbound.type,
                host=outbound.host,
                port=outbound.port,
                username=outbound.username,
                password=outbound.password.get_secret_value() if outbound.password else None,
                udp=outbound.udp,
            )
            for outbound in self.settings.outbounds
        ]
        tools = Tools(
            platform.poller_of(self._loop),
            self._sockets,
            dns.resolve,
            self.settings.timeouts.dial,
            round(self.settings.pool.keepalive_interval),
            self.settings.pool.warmup,
            self.settings.pool.size,
        )
        outbounds = make_outbounds(specs, tools)
        for outbound in outbounds.values():
            self._undo.push(f"outbound {outbound.tag}", outbound.close)
        return outbounds

    def _gateway_options(self) -> GatewayOptions:
        settings = self.settings
        return GatewayOptions(
            mtu=settings.tun.mtu,
            hijack_dns=settings.dns.hijack,
            tcp_idle=settings.timeouts.tcp_idle,
            udp_idle=settings.timeouts.udp_idle,
            buffers=settings.pool.buffers,
            keepalive_interval=round(settings.pool.keepalive_interval),
            limits=Limits(**settings.limits.model_dump()),
        )

    def _choose_servers(self, addresses: list[machine.InterfaceAddress]) -> list[str]:
        dns = self.settings.dns
        if "servers" in dns.model_fields_set:
            return list(dns.servers)
        return machine.default_servers(machine.read_resolv_conf(), self._listen, [entry.ip for entry in addresses])

    def _learner(self, rules: Rules) -> Callable[[bytes, int, int], None]:
        def learn(address: bytes, ttl: int, rule: int) -> None:
            verdict = rules.learned_verdict(address, rule)
            if verdict is Verdict.TUNNEL and self._gateway is not None:
                self._gateway.remember(address, rule)
            if self._classifier is not None:
                self._classifier.learn(address, verdict, rule)

        return learn

    def _capture(self) -> None:
        """The last step: from here on the clients' packets come to us."""
        assert self._classifier is not None
        self._beat()
        self._classifier.attach()
        for outbound in self._outbounds.values():
            outbound.warm_up()

    async def _keep_up(self, monitor: NetworkMonitor) -> None:
        """Follow the network from now on."""
        assert self._classifier is not None
        assert self._routes is not None
        assert self._gateway is not None
        parts = Parts(
            device=self.settings.tun.name,
            lan=self.settings.capture.lan,
            classifier=self._classifier,
            routes=self._routes,
            gateway=self._gateway,
            sockets=self._sockets,
            servers=self._server_addresses,
            moved=self._moved,
            changed=self._way_changed,
        )
        self._keeper = NetworkKeeper(monitor, parts)
        await self._keeper.begin()
        task = self._loop.create_task(self._keeper.run())
        self._undo.push("following the network", lambda: _cancelled(task))

    def _server_addresses(self) -> dict[str, Sequence[str]]:
        """Outbound -> the addresses of its proxy."""
        found = ((tag, outbound.server_addresses()) for tag, outbound in self._outbounds.items())
        return {tag: addresses for tag, addresses in found if addresses is not None}

    async def _moved(self, found: Sequence[tuple[str, bytes, int]]) -> None:
        """This host has other addresses."""
        assert self._placement is not None
        assert self._gateway is not None
        addresses = [machine.InterfaceAddress(*each) for each in found]
        if self._listening is not None:
            await self._listening.follow(addresses)
        self._placement.place(addresses)
        if self._classifier is not None and not self._placement.is_installed:
            await self._placement.install(self._classifier, [self._gateway])

    def _way_changed(self, is_there: bool) -> None:
        """There is another way out, or none: what waits leads nowhere, and what did not answer may do so now."""
        for outbound in self._outbounds.values():
            outbound.forget_connections()
            if is_there:
                outbound.warm_up()
        if self._dns is not None:
            self._dns.forgive()

    def _beat(self) -> None:
        """Tell the classifier that we live; from the loop, so that a loop that hangs does not say so."""
        if self._classifier is None:
            return
        self._loop.call_later(HEARTBEAT_INTERVAL, self._beat)
        self._classifier.heartbeat()

    def _device_lost(self, error: OSError) -> None:
        name, reason = self.settings.tun.name, (error.strerror or str(error)).lower()
        try:
            self._revive_device()
        except (ZtunError, OSError) as problem:
            self.failure = ZtunError(f"lost the interface {name} ({reason}), and cannot make it again: {problem}")
            log.error("the TUN device is gone, stopping", device=name, reason=reason, remedy=str(problem))
            self._stop.ask()
        else:
            log.warning("somebody removed the TUN, made it again", device=name)

    def _revive_device(self) -> None:
        """Put another TUN in the place of the one that was removed; the flows did not notice yet. Raises ZtunError."""
        assert self._device is not None
        assert self._routes is not None
        assert self._classifier is not None
        assert self._gateway is not None
        if self.state != "running":
            raise ZtunError(f"the instance is {self.state}")
        now = self._loop.time()
        self._revivals = [then for then in self._revivals if now - then < _REVIVAL_PERIOD]
        if len(self._revivals) >= _MOST_REVIVALS:
            raise ZtunError(f"it was removed {_MOST_REVIVALS} times within {_REVIVAL_PERIOD:g} s; find out by whom")
        self._revivals.append(now)
        self._device.reopen()
        self._routes.restore()
        self._classifier.reinstall()
        self._classifier.attach()
        self._gateway.engine.read_again()

    # What the control socket tells.

    def status(self) -> dict[str, Any]:
        """The body of GET /status: the keys of `ztun status --json`."""
        gateway = self._gateway.statistics() if self._gateway is not None else {}
        statistics = {**_NO_STATISTICS, **gateway}
        statistics["pool"] = {**statistics["pool"], **statistics.pop("buffers", {})}
        active = self._gateway.active() if self._gateway is not None else {}
        statistics["outbounds"] = {
            tag: {**_describe_outbound(outbound), "active": active.get(tag, 0)}
            for tag, outbound in self._outbounds.items()
        }
        return {
            "state": self.state,
            "uptime_s": round(time.monotonic() - self._started, 3),
            "pid": os.getpid(),
            "version": __version__,
            **self._describe_backend(),
            **statistics,
            "log": log_system.statistics(),
            **({"network": self._keeper.describe()} if self._keeper is not None else {}),
        }

    def flows(self) -> dict[str, Any]:
        """The body of GET /flows: the keys of `ztun status --flows --json`."""
        return {"flows": self._gateway.flows() if self._gateway is not None else []}

    def routes(self) -> dict[str, Any]:
        """The body of GET /routes: the keys of `ztun routes --json`."""
        if self._classifier is None or self._routes is None:
            raise ZtunError(f"nothing is installed, the instance is {self.state}; try again in a moment")
        return {
            **self._describe_backend(),
            **self._routes.snapshot(),
            **self._classifier.snapshot(),
            "rules": describe_rules(self.settings),
            "counters": self._classifier.counters(),
        }

    def _describe_backend(self) -> dict[str, str | None]:
        """How packets are captured, and why not by what would have been better; nothing while that is not known."""
        if self._classifier is None:
            return {"backend": None, "fallback_reason": None}
        return {"backend": self._classifier.backend, "fallback_reason": self._classifier.fallback_reason}

    def summary(self) -> dict[str, Any]:
        """What was done: the body of `ztun up --json`."""
        assert self._classifier is not None
        assert self._placement is not None
        settings = self.settings
        tag = settings.route.default
        default = next((outbound for outbound in settings.outbounds if outbound.tag == tag), None)
        return {
            "version": __version__,
            "pid": os.getpid(),
            "tun": {
                "name": settings.tun.name,
                "mtu": settings.tun.mtu,
                "addresses": [str(at) for at in (settings.tun.address, settings.tun.address6) if at is not None],
            },
            "lan": list(settings.capture.lan),
            "backend": self._classifier.backend,
            "dns": {"listen": self._listen, "hijack": settings.dns.hijack, "servers": self._servers},
            "default": {
                "tag": tag,
                "type": default.type if default else tag,
                "server": default.server if default else None,
            },
            "rules": {"rules": len(settings.route.rules), "prefixes": self._placement.prefixes},
            "control": str(settings.control.socket),
            "notes": list(self._notes),
        }


def _describe_outbound(outbound: Outbound) -> dict[str, Any]:
    statistics = getattr(outbound, "statistics", None)
    return statistics() if statistics is not None else {"type": outbound.type}


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def _warn_of_names(line: str) -> None:
    names_log.warning("trouble with the store of Fake-IPs", detail=line)


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody was waiting for. It cost one flow; the others go on."""
    error = context.get("exception")
    log.error("unexpected error", detail=context.get("message"), exc_info=error, error=repr(error))


def run_until_stopped(settings: Settings, announce: Announce) -> int:
    """`run` in an event loop of its own."""
    with asyncio.Runner(loop_factory=platform.make_event_loop) as runner:
        return runner.run(run(settings, announce))
