"""What the checks look at: the configuration, and this machine, read when first asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ztun import machine, platform
from ztun.config import Settings
from ztun.control.claims import sockets_in_use
from ztun.control.client import ControlClient, NotRunning
from ztun.errors import ZtunError
from ztun.machine import InterfaceAddress
from ztun.platform import facts
from ztun.platform.shapes import BpfFacts, Route, TunFacts

# Marks our sockets, so that an instance that runs here does not capture them: see ztun.making.
MARK = 0x7A74
_PATIENCE = 2.0  # seconds for an instance that should answer at once


@dataclass
class Scene:
    """timeout: seconds that somebody else's answer may take."""

    settings: Settings
    config: Path | None = None
    timeout: float = 5.0
    bpf: asyncio.Future[Any] | None = field(default=None, repr=False)

    @property
    def lan(self) -> tuple[str, ...]:
        return self.settings.capture.lan

    @property
    def backend(self) -> str:
        return self.settings.capture.backend

    @property
    def wants_bpf(self) -> bool:
        """Whether routes alone are not what was asked for."""
        return self.backend != "routes"

    @cached_property
    def addresses(self) -> list[InterfaceAddress]:
        return [InterfaceAddress(*found) for found in platform.interface_addresses()]

    @cached_property
    def links(self) -> dict[str, dict[str, Any]]:
        return facts.links()

    @cached_property
    def routes(self) -> list[Route]:
        return facts.routes()

    @cached_property
    def running(self) -> dict[str, Any] | None:
        """The status of the instance behind our control socket; {} when it does not let us ask, None without one."""
        try:
            return ControlClient(self.settings.control.socket, timeout=_PATIENCE).status()
        except NotRunning:
            return None
        except ZtunError:
            return {}

    @cached_property
    def own_programs(self) -> set[int]:
        """Ids of that instance's BPF programs."""
        try:
            answer = ControlClient(self.settings.control.socket, timeout=_PATIENCE).routes(most=0)
        except ZtunError:
            return set()
        return {program["id"] for program in answer["programs"]}

    @cached_property
    def tun(self) -> TunFacts:
        return facts.probe_tun()

    @property
    def pid(self) -> int | None:
        """Of that instance, also where it does not let us ask."""
        if self.running is None:
            return None
        path = str(self.settings.control.socket)
        return self.running.get("pid") or dict(sockets_in_use()).get(path)

    def present(self) -> list[str]:
        """The LAN interfaces that exist."""
        return [ifname for ifname in self.lan if ifname in self.links]

    def addresses_of(self, ifnames: Collection[str]) -> list[InterfaceAddress]:
        return [entry for entry in self.addresses if entry.ifname in ifnames]

    def listen(self) -> list[str]:
        """Where DNS would be answered."""
        dns = self.settings.dns
        if "listen" in dns.model_fields_set:
            return list(dns.listen)
        return [
            machine.format_endpoint(entry.ip, machine.DNS_PORT)
            for entry in self.addresses_of(self.lan)
            if not entry.ip.is_link_local
        ]

    async def load_bpf(self) -> BpfFacts:
        """What loading our programs shows; done once for all that ask."""
        if self.bpf is None:
            self.bpf = asyncio.ensure_future(facts.probe_bpf())
        loaded: BpfFacts = await asyncio.shield(self.bpf)
        return loaded
