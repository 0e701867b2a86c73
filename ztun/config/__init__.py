"""The configuration: a JSON file, ZTUN_SECTION__KEY in the environment over it, the command line over both."""

from __future__ import annotations

from ztun.config.loading import PROXY_TAG, load, settings_from_proxy, to_rules
from ztun.config.models import (
    CaptureSettings,
    ControlSettings,
    DnsSettings,
    FakeIpSettings,
    LogSettings,
    OutboundSettings,
    PoolSettings,
    RouteSettings,
    RuleSettings,
    Settings,
    TimeoutSettings,
    TunSettings,
)
from ztun.errors import ConfigError

__all__ = [
    "PROXY_TAG",
    "CaptureSettings",
    "ConfigError",
    "ControlSettings",
    "DnsSettings",
    "FakeIpSettings",
    "LogSettings",
    "OutboundSettings",
    "PoolSettings",
    "RouteSettings",
    "RuleSettings",
    "Settings",
    "TimeoutSettings",
    "TunSettings",
    "load",
    "settings_from_proxy",
    "to_rules",
]
