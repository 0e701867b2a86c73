"""Looking at this machine without changing it, for `ztun routes` and `ztun doctor`."""

from __future__ import annotations

from ztun.platform.linux.inventory import describe_interfaces, look
from ztun.platform.linux.sweep import find_leftovers

__all__ = ["describe_interfaces", "find_leftovers", "look"]
