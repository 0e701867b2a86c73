"""One line for each flow that is over.

Packed addresses and plain numbers come in; they are made into text only for a line that is written, which the level of
the component "flow" decides and its limit on repeats.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from ztun.gateway.routing import endpoint, text
from ztun.log.admission import Admission
from ztun.log.system import BoundLogger, log_system

_INFO: Final = logging.INFO
_COMPONENT: Final = "flow"


class FlowLog:
    """What the relays call. docs/logging.md lists the fields."""

    def __init__(self, log: BoundLogger) -> None:
        self._log = log
        self._threshold = log.threshold
        self._admission: Admission = log.admission

    def finished(
        self,
        protocol: str,
        client: bytes,
        client_port: int,
        host: str,
        port: int,
        rule: int,
        outbound: str,
        up: int,
        down: int,
        seconds: float,
        how: str,
        name: str | None = None,
        destinations: int | None = None,
    ) -> None:
        """A flow is over: a TCP flow that was connected, or given up by its client before; a UDP session.

        protocol: "tcp" or "udp"; client: its packed address; host, port: what was dialled, a name or an address
        literal; name: what the client asked DNS for, where that is known and `host` does not say it; rule: its place
        in the file, or a negative id of ztun.ports; up, down: payload bytes from and to the client; how: it ended;
        destinations: of a UDP session, which can have many and names the first one.
        """
        if self._threshold.value > _INFO or not self._admission.admit(_COMPONENT, "flow ended", _INFO):
            return
        values = _describe(protocol, client, client_port, host, port, name, rule, outbound)
        values["up"], values["down"], values["seconds"], values["how"] = up, down, round(seconds, 3), how
        if destinations is not None:
            values["destinations"] = destinations
        self._log.admitted(_INFO, "flow ended", values)

    def refused(
        self,
        protocol: str,
        client: bytes,
        client_port: int,
        host: str,
        port: int,
        rule: int,
        outbound: str,
        seconds: float,
        how: str,
        detail: str,
        name: str | None = None,
    ) -> None:
        """A flow was never connected. how: the `Failure`; detail: what the outbound said of it. Else as `finished`."""
        if self._threshold.value > _INFO or not self._admission.admit(_COMPONENT, "flow refused", _INFO):
            return
        values = _describe(protocol, client, client_port, host, port, name, rule, outbound)
        values["seconds"], values["how"], values["detail"] = round(seconds, 3), how, detail
        self._log.admitted(_INFO, "flow refused", values)


def _describe(
    protocol: str, client: bytes, client_port: int, host: str, port: int, name: str | None, rule: int, outbound: str
) -> dict[str, Any]:
    return {
        "protocol": protocol,
        "client": endpoint(text(client), client_port),
        "name": name or (None if _is_literal(host) else host),
        "destination": endpoint(host, port),
        "rule": rule,
        "outbound": outbound,
    }


def _is_literal(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()


flow_log = FlowLog(log_system.bound("ztun.flow"))
