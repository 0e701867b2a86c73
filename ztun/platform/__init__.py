"""What differs between operating systems. Only this and ztun/defaults.py look at sys.platform."""

from __future__ import annotations

import sys

if sys.platform == "darwin":
    from ztun.platform.darwin import (
        facts,
        interface_addresses,
        make_classifier,
        make_event_loop,
        make_monitor,
        make_own_flows,
        make_resolver,
        make_routes,
        make_socket_factory,
        open_device,
        poller_of,
    )
    from ztun.platform.darwin.aftermath import close_journal, open_journal, recover, sweep
    from ztun.platform.darwin.inspection import describe_interfaces, find_leftovers, look
else:
    from ztun.platform.linux import (
        facts,
        interface_addresses,
        make_classifier,
        make_event_loop,
        make_monitor,
        make_own_flows,
        make_routes,
        make_socket_factory,
        open_device,
        poller_of,
    )
    from ztun.platform.linux.aftermath import close_journal, open_journal, recover, sweep
    from ztun.platform.linux.inspection import describe_interfaces, find_leftovers, look
    from ztun.platform.linux.resolver import make_resolver

__all__ = [
    "close_journal",
    "describe_interfaces",
    "facts",
    "find_leftovers",
    "interface_addresses",
    "look",
    "make_classifier",
    "make_event_loop",
    "make_monitor",
    "make_own_flows",
    "make_resolver",
    "make_routes",
    "make_socket_factory",
    "open_device",
    "open_journal",
    "poller_of",
    "recover",
    "sweep",
]
