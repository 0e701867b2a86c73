"""A small internet in three network namespaces, with real servers: what `ztun demo`, tests/e2e and bench run on.

    client 10.10.0.2 ── lan0 gateway wan0 ── upstream 10.20.0.2, which is also 203.0.113.10, 198.51.100.10, …

Without ztun the gateway is a plain router, so everything is reachable directly; that is the base line.
"""

from __future__ import annotations

from ztun.lab.lab import Lab
from ztun.lab.namespace import Namespace
from ztun.lab.ztun import Ztun

__all__ = ["Lab", "Namespace", "Ztun"]
