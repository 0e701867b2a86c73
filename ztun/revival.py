"""Making the TUN again when somebody removed it: the flows live in ztun and do not notice."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

from ztun.assembly import Assembly
from ztun.errors import ZtunError

log = structlog.get_logger("ztun.app")

# How often the TUN is made again before it is left to a person.
_MOST_REVIVALS, _REVIVAL_PERIOD = 10, 60.0


class DeviceRevival:
    """Its `device_lost` is for Engine.device_lost.

    give_up: called with the reason when the device cannot be made again.
    """

    def __init__(self, assembly: Assembly, give_up: Callable[[ZtunError], None]) -> None:
        self._assembly = assembly
        self._give_up = give_up
        self._revivals: list[float] = []
        self._loop = asyncio.get_running_loop()

    def device_lost(self, error: OSError) -> None:
        """Reading the device failed with `error`: make another one, or give up."""
        name, reason = self._assembly.settings.tun.name, (error.strerror or str(error)).lower()
        try:
            while not self._revive():
                pass  # as often as _count lets it
        except (ZtunError, OSError) as problem:
            log.error("the TUN device is gone, stopping", device=name, reason=reason, remedy=str(problem))
            self._give_up(ZtunError(f"lost the interface {name} ({reason}), and cannot make it again: {problem}"))
        else:
            log.warning("somebody removed the TUN, made it again", device=name)

    def _revive(self) -> bool:
        """Put another TUN in the place of the one that was removed. False when that was removed meanwhile, too.

        Raises ZtunError.
        """
        parts = self._assembly
        if parts.state != "running":
            raise ZtunError(f"the instance is {parts.state}")
        self._count()
        try:
            parts.require_device().reopen()
            parts.require_routes().restore()
            parts.require_classifier().reinstall()
            parts.require_classifier().attach()
        except (ZtunError, OSError):
            if self._is_there():
                raise
            return False
        parts.require_gateway().engine.read_again()
        return True

    def _is_there(self) -> bool:
        name = self._assembly.require_device().name
        return any(name == each for _, each in socket.if_nameindex())

    def _count(self) -> None:
        now = self._loop.time()
        self._revivals = [then for then in self._revivals if now - then < _REVIVAL_PERIOD]
        if len(self._revivals) >= _MOST_REVIVALS:
            raise ZtunError(f"it was removed {_MOST_REVIVALS} times within {_REVIVAL_PERIOD:g} s; find out by whom")
        self._revivals.append(now)
