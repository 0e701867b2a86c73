"""What lets a person talk to a running instance: its lock, its control socket, and the service manager's socket."""

from __future__ import annotations

from ztun.defaults import DEFAULTS

DEFAULT_SOCKET = str(DEFAULTS.control)
