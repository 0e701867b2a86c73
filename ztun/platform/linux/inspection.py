"""Looking at this machine without changing it, for `ztun routes` and `ztun doctor`."""

from __future__ import annotations

from ztun.platform.linux.inventory import describe_interfaces, find_leftovers, look

__all__ = ["describe_interfaces", "find_leftovers", "look"]
