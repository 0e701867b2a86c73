"""How much state clients may make the gateway hold."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ztun.stack import StackSettings


@dataclass(frozen=True, slots=True)
class Limits:
    """Flows in all and per source (an IPv4 address, an IPv6 /64), sizes in bytes. At a bound the newest is refused."""

    tcp_flows: int = 65536
    tcp_flows_per_source: int = 16384  # a source may be a whole LAN behind one NAT address
    half_open: int = 4096  # from the SYN to the client's answer to the SYN-ACK: dials under way, above all
    half_open_per_source: int = 1024
    udp_sessions: int = 16384
    udp_sessions_per_source: int = 4096
    memory: int = 256 << 20  # held by all TCP flows together
    fragments: int = 4 << 20  # held by datagrams that are not whole yet
    fragments_per_source: int = 1 << 20

    def applied(self, settings: StackSettings) -> StackSettings:
        """The stack's settings with its part of these limits."""
        return replace(
            settings,
            max_connections=self.tcp_flows,
            max_connections_per_source=self.tcp_flows_per_source,
            max_half_open=self.half_open,
            max_half_open_per_source=self.half_open_per_source,
            max_memory=self.memory,
            max_fragments=self.fragments,
            max_fragments_per_source=self.fragments_per_source,
        )
