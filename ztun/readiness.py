"""From set-up to service: what was needed for the one and not for the other is given up, and the manager is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import structlog

from ztun import privileges
from ztun.assembly import Assembly
from ztun.control.notify import Pulse
from ztun.defaults import DEFAULTS

log = structlog.get_logger("ztun.app")

# Until the end: netlink, SO_MARK, making the TUN again, sysctls of interfaces; DNS listeners that follow addresses.
_FOR_GOOD = (privileges.NET_ADMIN, privileges.NET_BIND_SERVICE)


async def give_up_privileges(parts: Assembly) -> None:
    """To be called when everything is installed. What cannot be given up is said in the log, and no reason to stop."""
    trials = (
        (privileges.BPF, lambda: _cannot_beat(parts)),
        (privileges.DAC_OVERRIDE, lambda: privileges.cannot_write(_places(parts))),
    )
    try:
        needed = await privileges.give_up(_FOR_GOOD, trials)
    except OSError as error:
        log.warning("cannot give up capabilities, keeping them all", reason=error.strerror)
        return
    for capability, why in needed:
        log.info("a capability is needed to the end", capability=privileges.name(capability), reason=why)


def _cannot_beat(parts: Assembly) -> str | None:
    """Before Linux 5.19 every bpf(2) call asks for CAP_BPF where unprivileged BPF is off; later only loading does."""
    try:
        parts.require_classifier().heartbeat()
    except PermissionError:
        return "this kernel asks for it with every bpf(2) call"
    return None


def _places(parts: Assembly) -> Iterator[Path]:
    """What is written or removed later: root without CAP_DAC_OVERRIDE has only what is root's."""
    settings = parts.settings
    yield settings.control.socket
    yield DEFAULTS.control  # the state files are beside it, maybe in the directory of a service's own user
    for path in (settings.log.file, settings.dns.fake_ip.store):
        if path is not None:
            yield Path(path)


def make_pulse(parts: Assembly) -> Pulse:
    """The watchdog's, with a line for `systemctl status`."""
    return Pulse(asyncio.get_running_loop(), lambda: _say(parts))


def _say(parts: Assembly) -> str:
    if parts.gateway is None or parts.classifier is None:
        return parts.state
    captured = [name for name, state in parts.classifier.captured().items() if state == "captured"]
    where = f"captures {', '.join(captured) or 'from no interface'} by {parts.classifier.backend}"
    tcp, udp = (parts.gateway.statistics()[kind]["active"] for kind in ("tcp", "udp"))
    return f"{parts.state}; {where}; {tcp} connections, {udp} UDP sessions"
