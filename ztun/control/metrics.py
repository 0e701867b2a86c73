"""The body of GET /status as OpenMetrics text, for GET /metrics. docs/metrics.md lists what there is.

A pure function of the status: whoever adds a figure to it adds a row here, and a line there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    StateSetMetricFamily,
)
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client.openmetrics.exposition import generate_latest

__all__ = ["CONTENT_TYPE", "ROWS", "Row", "families", "render"]

STATES = ("starting", "running", "paused", "stopping")


class Row(NamedTuple):
    """One metric.

    type: "counter", "gauge"; for a gauge of 0 or 1: "flag" while there is such a text, "up" while that text is "up".
    path: where its value stands in the status; "{label}" stands for every key there, or for the `label` of every
    object in a list, and becomes that label.
    """

    name: str
    type: str
    path: str
    help: str


ROWS = (
    Row("ztun_uptime_seconds", "gauge", "uptime_s", "Seconds since the instance was started"),
    Row("ztun_capture_fallback", "flag", "fallback_reason", "1 when packets are captured by less than the best way"),
    Row("ztun_tcp_flows_active", "gauge", "tcp.active", "TCP flows of clients that are open"),
    Row("ztun_tcp_flows_half_open", "gauge", "tcp.half_open", "TCP flows whose handshake with the client is not over"),
    Row("ztun_tcp_flows", "counter", "tcp.total", "TCP flows that clients began"),
    Row("ztun_tcp_flows_offloaded_active", "gauge", "tcp.offloaded", "TCP flows that the kernel carries"),
    Row("ztun_tcp_flows_offloaded", "counter", "tcp.offloaded_total", "TCP flows that were given to the kernel"),
    Row("ztun_tcp_packets", "counter", "tcp.families.{family}", "TCP packets from clients, of up to 64 KiB each"),
    Row(
        "ztun_keepalive_events",
        "counter",
        "tcp.keepalive.{event}",
        "Probes sent to silent clients, clients given up for want of an answer, upstreams that are probed",
    ),
    Row("ztun_tcp_flows_ended", "counter", "tcp.ended.{how}", "TCP flows that are over, by how they ended"),
    Row("ztun_tcp_flows_failed", "counter", "tcp.failed.{reason}", "TCP flows that no outbound could connect"),
    Row("ztun_udp_sessions_active", "gauge", "udp.active", "UDP sessions, one per client endpoint and outbound"),
    Row("ztun_udp_sessions", "counter", "udp.total", "UDP sessions that were opened"),
    Row("ztun_udp_packets", "counter", "udp.families.{family}", "UDP datagrams from clients, DNS among them"),
    Row("ztun_udp_datagrams_sent", "counter", "udp.sent", "Datagrams handed to outbounds"),
    Row("ztun_udp_datagrams_received", "counter", "udp.received", "Datagrams that came back"),
    Row("ztun_udp_links_rebuilt", "counter", "udp.rebuilt", "Datagram links opened for sessions whose own had died"),
    Row("ztun_icmp_packets", "counter", "icmp.families.{family}", "ICMP and ICMPv6 packets from clients"),
    Row("ztun_icmp_echoes", "counter", "icmp.echoes", "Pings that were answered for a Fake-IP"),
    Row("ztun_dns_events", "counter", "dns.{event}", "What happened to DNS queries"),
    Row("ztun_dns_server_queries", "counter", "dns.servers.{server}.queries", "Times that a DNS server was asked"),
    Row("ztun_dns_server_answers", "counter", "dns.servers.{server}.answers", "Times that it answered"),
    Row("ztun_dns_server_timeouts", "counter", "dns.servers.{server}.timeouts", "Times that it did not in time"),
    Row("ztun_dns_server_failures", "counter", "dns.servers.{server}.failures", "Times that it could not be asked"),
    Row(
        "ztun_dns_server_latency_seconds",
        "counter",
        "dns.servers.{server}.latency.sum_s",
        "Time to its answers, all together",
    ),
    Row("ztun_dns_server_latency_max_seconds", "gauge", "dns.servers.{server}.latency.max_s", "The longest of them"),
    Row("ztun_buffers_allocated", "counter", "pool.allocated", "Buffers that were made"),
    Row("ztun_buffers_reused", "counter", "pool.reused", "Buffers that were taken from the pool"),
    Row("ztun_buffers_freed", "counter", "pool.freed", "Buffers that the pool let go"),
    Row("ztun_buffers_free", "gauge", "pool.free", "Buffers in the pool"),
    Row("ztun_outbound_dials", "counter", "outbounds.{outbound}.dials", "Connections and datagram links asked for"),
    Row("ztun_outbound_dialling", "gauge", "outbounds.{outbound}.dialling", "Dials that are under way"),
    Row("ztun_outbound_connections_active", "gauge", "outbounds.{outbound}.active", "Connections that live"),
    Row("ztun_outbound_datagram_links", "gauge", "outbounds.{outbound}.datagram_links", "Datagram links that are open"),
    Row("ztun_outbound_udp_opened", "counter", "outbounds.{outbound}.udp.opened", "Datagram links that came about"),
    Row("ztun_outbound_udp_lost", "counter", "outbounds.{outbound}.udp.lost", "Datagram links that died"),
    Row("ztun_outbound_udp_refused", "counter", "outbounds.{outbound}.udp.refused", "UDP sessions refused at once"),
    Row("ztun_outbound_udp_refusing", "flag", "outbounds.{outbound}.udp.reason", "1 while it refuses datagrams"),
    Row("ztun_outbound_failures", "counter", "outbounds.{outbound}.failures.{reason}", "Dials that failed"),
    Row("ztun_pool_connections", "gauge", "outbounds.{outbound}.pool.waiting", "Proxy connections that are kept ready"),
    Row("ztun_pool_hits", "counter", "outbounds.{outbound}.pool.hits", "Dials that took one of those"),
    Row("ztun_pool_misses", "counter", "outbounds.{outbound}.pool.misses", "Dials for which none was ready"),
    Row("ztun_pool_lost", "counter", "outbounds.{outbound}.pool.lost", "Ready connections that the proxy closed"),
    Row("ztun_pool_expired", "counter", "outbounds.{outbound}.pool.expired", "Ready connections that became too old"),
    Row("ztun_outbound_drops", "counter", "outbounds.{outbound}.drops.{reason}", "Datagrams it could not carry"),
    Row("ztun_drops", "counter", "drops.{reason}", "Packets from clients that were dropped"),
    Row("ztun_network_up", "up", "network.state", "0 while there is no way out, and everything is paused"),
    Row("ztun_network_egress_up", "up", "network.egress.{to}.state", "1 for a family or proxy whose way out is up"),
    Row("ztun_network_lan_up", "up", "network.lan.{name}.state", "1 for a captured interface that is up"),
    Row("ztun_network_events", "counter", "network.events.{event}", "What the kernel told of the network"),
    Row("ztun_memory_held_bytes", "gauge", "memory.held", "Bytes that TCP flows hold: windows' content and buffers"),
    Row("ztun_memory_limit_bytes", "gauge", "memory.limit", "At most, see limits.memory"),
    Row("ztun_device_reads", "counter", "device.read", "Packets read from the TUN device"),
    Row("ztun_device_read_errors", "counter", "device.read_errors", "Errors of the TUN device that passed"),
    Row("ztun_device_writes", "counter", "device.written", "Packets written to the TUN device"),
    Row("ztun_device_writes_refused", "counter", "device.refused", "Packets that the TUN device did not take"),
    Row("ztun_log_lines_written", "counter", "log.written", "Log lines that were written"),
    Row("ztun_log_lines_suppressed", "counter", "log.suppressed", "Log lines held back because they repeat"),
    Row("ztun_log_lines_dropped", "counter", "log.dropped", "Log lines that the file or stream did not take"),
    Row("ztun_log_faulty", "flag", "log.fault", "1 when the last log line could not be written"),
)


def render(status: Mapping[str, Any]) -> bytes:
    """The text of GET /metrics. status: the body of GET /status."""
    registry = CollectorRegistry()
    registry.register(_Collector(status))
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return text


def families(status: Mapping[str, Any]) -> Iterator[Metric]:
    """The metrics of a status. What the status does not have is left out."""
    about = {key: str(status[key]) for key in ("version", "backend", "pid") if status.get(key) is not None}
    yield InfoMetricFamily("ztun", "The instance: its version, how it captures, its process", value=about)
    now = status.get("state")
    yield StateSetMetricFamily("ztun_state", "What the instance does", value={one: one == now for one in STATES})
    for row in ROWS:
        samples = [found for found in _find(status, row.path.split(".")) if found[1] is not None or row.type == "flag"]
        if samples:
            yield _family(row, samples)


def _family(row: Row, samples: Iterable[tuple[list[str], Any]]) -> Metric:
    labels = [part[1:-1] for part in row.path.split(".") if part.startswith("{")]
    kind = CounterMetricFamily if row.type == "counter" else GaugeMetricFamily
    family = kind(row.name, row.help, labels=labels)
    for values, found in samples:
        family.add_metric(values, _number(row, found))
    return family


def _number(row: Row, found: Any) -> float:
    if row.type == "up":
        return float(found == "up")
    return float(found is not None) if row.type == "flag" else float(found)


def _find(holder: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """(labels, value) of all that `path` leads to."""
    if not path:
        yield [], holder
        return
    part, rest = path[0], path[1:]
    if isinstance(holder, list):
        holder = {item.get(part[1:-1]): item for item in holder if isinstance(item, Mapping)}
    if not isinstance(holder, Mapping):
        return
    if not part.startswith("{"):
        if part in holder:
            yield from _find(holder[part], rest)
        return
    for key, inner in holder.items():
        if rest or isinstance(inner, int | float):
            for labels, value in _find(inner, rest):
                yield [str(key), *labels], value


class _Collector:
    def __init__(self, status: Mapping[str, Any]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        return families(self._status)
