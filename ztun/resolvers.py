"""Follows whom this host asks for names where `dns.servers` is left out: a laptop has others in each network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from ztun import machine, making
from ztun.assembly import Assembly
from ztun.errors import ZtunError

log = structlog.get_logger("ztun.dns")

# Seconds after a change of the network: whoever writes resolv.conf hears of it when we do, and may have to ask DHCP.
_LOOKS = (0.0, 1.0, 3.0, 10.0)


class SystemServers:
    """Reads again what the host knows when the network changed. Without effect where `dns.servers` is set."""

    def __init__(self, parts: Assembly) -> None:
        self._parts = parts
        self._is_wanted = "servers" not in parts.settings.dns.model_fields_set
        self._addresses: list[machine.InterfaceAddress] = []
        self._task: asyncio.Task[None] | None = None

    def network_changed(self, addresses: Iterable[machine.InterfaceAddress] | None = None) -> None:
        """addresses: of this host, where it is they that changed."""
        if addresses is not None:
            self._addresses = list(addresses)
        if not self._is_wanted:
            return
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.get_running_loop().create_task(self._look_for_a_while())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _look_for_a_while(self) -> None:
        before = 0.0
        for when in _LOOKS:
            await asyncio.sleep(when - before)
            before = when
            await self._look()

    async def _look(self) -> None:
        parts = self._parts
        servers = making.choose_servers(parts.settings, parts.listen, self._addresses)
        # There is none in a network that is about to change: the former ones are as good as any.
        if parts.dns is None or servers in (parts.servers, [machine.FALLBACK_SERVER]):
            return
        try:
            await parts.dns.replace_servers(servers)
        except ZtunError as error:
            log.warning("cannot ask the servers of this host", servers=servers, reason=str(error))
            return
        log.info("asking other DNS servers, as this host does", servers=servers)
        parts.servers = servers
