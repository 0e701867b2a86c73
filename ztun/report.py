"""What the control socket and `ztun up` tell about a running gateway."""

from __future__ import annotations

import os
import time
from typing import Any

from ztun import __version__, privileges
from ztun.assembly import Assembly
from ztun.compiled import is_compiled
from ztun.installed import describe_installed
from ztun.log.system import log_system
from ztun.ports import Outbound

# Empty sections, so that the keys of `status --json` are there from the first moment on.
_NO_STATISTICS: dict[str, Any] = {
    "tcp": {"active": 0, "total": 0},
    "udp": {"active": 0, "total": 0},
    "icmp": {},
    "dns": {},
    "pool": {},
    "outbounds": {},
    "drops": {},
    "network": {"state": "up", "egress": [], "lan": [], "host": [], "events": {}},
}


class Report:
    """The answers of one instance, at any moment of its life."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly

    def status(self) -> dict[str, Any]:
        """The body of GET /status: the keys of `ztun status --json`."""
        parts = self._assembly
        gateway = parts.gateway.statistics() if parts.gateway is not None else {}
        statistics = {**_NO_STATISTICS, **gateway}
        statistics["pool"] = {**statistics["pool"], **statistics.pop("buffers", {})}
        active = parts.gateway.active() if parts.gateway is not None else {}
        statistics["outbounds"] = {
            tag: {**_describe_outbound(outbound), "active": active.get(tag, 0)}
            for tag, outbound in parts.outbounds.items()
        }
        return {
            "state": parts.state,
            "uptime_s": round(time.monotonic() - parts.started, 3),
            "pid": os.getpid(),
            "version": __version__,
            "compiled": is_compiled(),
            **self._describe_backend(),
            **statistics,
            "log": log_system.statistics(),
            "privileges": privileges.describe(),
            **({"network": parts.keeper.describe()} if parts.keeper is not None else {}),
        }

    def flows(self) -> dict[str, Any]:
        """The body of GET /flows: the keys of `ztun status --flows --json`."""
        gateway = self._assembly.gateway
        return {"flows": gateway.flows() if gateway is not None else []}

    def routes(self) -> dict[str, Any]:
        """The body of GET /routes: the keys of `ztun routes --json`. Raises ZtunError before anything is installed."""
        parts = self._assembly
        return describe_installed(parts.settings, parts.require_classifier(), parts.require_routes())

    def _describe_backend(self) -> dict[str, str | None]:
        """How packets are captured, and why not by what would have been better; nothing while that is not known."""
        classifier = self._assembly.classifier
        if classifier is None:
            return {"backend": None, "fallback_reason": None}
        return {"backend": classifier.backend, "fallback_reason": classifier.fallback_reason}

    def summary(self) -> dict[str, Any]:
        """What was done: the body of `ztun up --json`. To be called when everything works."""
        parts, settings = self._assembly, self._assembly.settings
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
            "host": settings.capture.host,
            "backend": parts.require_classifier().backend,
            "dns": {"listen": parts.listen, "hijack": settings.dns.hijack, "servers": parts.servers},
            "default": {
                "tag": tag,
                "type": default.type if default else tag,
                "server": default.server if default else None,
            },
            "rules": {"rules": len(settings.route.rules), "prefixes": parts.require_placement().prefixes},
            "control": str(settings.control.socket),
            "notes": list(parts.notes),
        }


def _describe_outbound(outbound: Outbound) -> dict[str, Any]:
    statistics = getattr(outbound, "statistics", None)
    return statistics() if statistics is not None else {"type": outbound.type}
