"""Capturing without BPF: policy routing sends LAN traffic into the TUN."""

from __future__ import annotations

from ztun.errors import ZtunError
from ztun.platform.linux.classifier import Capture


class RoutesClassifier:
    backend = "routes"

    def __init__(self, capture: Capture) -> None:
        self.fallback_reason: str | None = None
        raise ZtunError("routes backend: being built")
