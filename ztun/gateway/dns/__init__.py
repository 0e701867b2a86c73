"""The DNS service: names of the rules get Fake-IPs, the others are asked upstream."""

from __future__ import annotations

from ztun.gateway.dns.service import DnsOptions, DnsService

__all__ = ["DnsOptions", "DnsService"]
