"""The log: components with levels of their own, as text for a person or as one JSON object a line.

Everybody logs through `structlog.get_logger("ztun.COMPONENT")`; `system.log_system` is what carries it. docs/logging.md
is what users read about it.
"""

from __future__ import annotations
