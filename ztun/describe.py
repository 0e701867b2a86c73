"""Rules of the configuration in words, for `ztun check` and `ztun routes`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ztun.config import RuleSettings, Settings

_MOST = 4  # values of one condition that are written out


def describe_rules(settings: Settings) -> list[dict[str, Any]]:
    """[{"rule": index in file order, "conditions": text, "outbound": tag}]."""
    return [
        {"rule": index, "conditions": say_conditions(rule), "outbound": rule.outbound}
        for index, rule in enumerate(settings.route.rules)
    ]


def say_captured(lan: Sequence[str], host: bool, **_others: Any) -> str:
    """ "eth1, eth2 and this host": whose packets are looked at; empty for nobody's."""
    return " and ".join(filter(None, (", ".join(lan), "this host" if host else "")))


def say_conditions(rule: RuleSettings) -> str:
    """The conditions as one would say them: `domain_suffix corp.example, port 80 443`."""
    parts = []
    for name in RuleSettings.model_fields:
        values = getattr(rule, name)
        if name not in ("outbound", "priority") and values:
            parts.append(f"{name} {_say_values(values)}")
    if rule.priority:
        parts.append(f"priority {rule.priority}")
    return ", ".join(parts)


def _say_values(values: Sequence[Any]) -> str:
    words = [_say_value(value) for value in values[:_MOST]]
    if len(values) > _MOST:
        words.append(f"and {len(values) - _MOST} more")
    return " ".join(words)


def _say_value(value: Any) -> str:
    if isinstance(value, tuple):  # ports
        first, last = value
        return str(first) if first == last else f"{first}-{last}"
    return str(value)
