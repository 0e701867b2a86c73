"""Limits and times of the stack, in bytes and seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StackSettings:
    """Every default is what a desktop kernel would do, except where a comment says why not."""

    mtu: int = 1500
    hop_limit: int = 64
    traffic_class: int = 0  # of TCP segments: DSCP in the six upper bits, the two lower ones are ECN's
    receive_buffer: int = 1 << 20  # what a connection may hold for an outbound that is slower than its client
    send_buffer: int = 4194304  # unacknowledged bytes towards one client
    max_connections: int = 65536
    max_connections_per_source: int = 16384  # a source may be a whole LAN behind one NAT address
    max_half_open: int = 4096
    max_half_open_per_source: int = 1024
    max_memory: int = 256 << 20  # bytes that all connections together hold
    max_fragments: int = 4 << 20  # bytes of datagrams that are not whole yet
    max_fragments_per_source: int = 1 << 20
    max_time_wait: int = 16384

    initial_rto: float = 1.0  # RFC 6298 (2.1)
    min_rto: float = 0.2  # RFC 6298 (2.4) says 1 s; clients are a LAN away, so the kernel's 0.2 s serves them better
    max_rto: float = 60.0
    syn_retries: int = 5
    data_retries: int = 10  # R2 as a count (RFC 9293 section 3.8.3); about 220 s with these times
    user_timeout: float = 300.0  # R2 in seconds without any progress (RFC 9293 section 3.9.1.1: five minutes)
    delayed_ack: float = 0.04
    time_wait: float = 60.0
    fin_wait_2: float = 240.0  # without data from a client that we sent FIN (RFC 5382 REQ-5: at least 4 minutes)
    tcp_idle: float = 7440.0
    keepalive_idle: float = 600.0  # RFC 9293 3.8.4 wants two hours by default; a gateway holds state for strangers
    keepalive_interval: float = 75.0
    keepalive_probes: int = 6

    icmp_rate: float = 400.0  # errors a second (RFC 4443 section 2.4 (f))
    icmp_burst: int = 200
    icmp_rate_per_source: float = 50.0  # so that one that asks for them leaves some to the others
    icmp_burst_per_source: int = 50
