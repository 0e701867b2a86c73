"""What differs between operating systems. This is the only place that looks at sys.platform."""

from __future__ import annotations

import sys

if sys.platform == "darwin":
    from ztun.platform.darwin import (
        interface_addresses,
        make_classifier,
        make_event_loop,
        make_monitor,
        make_routes,
        make_socket_factory,
        open_device,
        poller_of,
        sweep,
    )
    from ztun.platform.darwin.inspection import describe_interfaces, find_leftovers, look
else:
    from ztun.platform.linux import (
        interface_addresses,
        make_classifier,
        make_event_loop,
        make_monitor,
        make_routes,
        make_socket_factory,
        open_device,
        poller_of,
        sweep,
    )
    from ztun.platform.linux.inspection import describe_interfaces, find_leftovers, look

__all__ = [
    "describe_interfaces",
    "find_leftovers",
    "interface_addresses",
    "look",
    "make_classifier",
    "make_event_loop",
    "make_monitor",
    "make_routes",
    "make_socket_factory",
    "open_device",
    "poller_of",
    "sweep",
]
