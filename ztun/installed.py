"""What a running gateway has installed in the kernel: the body of `ztun routes --json`."""

from __future__ import annotations

import os
from typing import Any

from ztun import __version__, platform
from ztun.config import Settings
from ztun.describe import describe_rules
from ztun.ports import Classifier, Routes

# How long the gateway may be silent before the programs in the kernel take it for dead (bpf/shared.h, STALE_NS).
HEARTBEAT_LIMIT_MS = 1000


def describe_installed(settings: Settings, classifier: Classifier, routes: Routes) -> dict[str, Any]:
    """Everything, as docs/routes.md lists it. Takes as long as the tables are large; any thread may call it.

    Raises OSError when the kernel does not answer.
    """
    ours, theirs = classifier.snapshot(), routes.snapshot()
    captured = dict(classifier.captured())
    programs = {each["id"]: each for each in ours["programs"]}
    about = platform.describe_interfaces(settings.tun.name, captured, programs)
    return {
        "state": "running",
        "pid": os.getpid(),
        "version": __version__,
        "device": settings.tun.name,
        "backend": classifier.backend,
        "fallback_reason": classifier.fallback_reason,
        **theirs,
        **ours,
        "sysctls": [*theirs.get("sysctls", ()), *ours.get("sysctls", ())],
        "heartbeat": _heartbeat(ours["maps"]),
        "rules": _count(describe_rules(settings), classifier),
        "counters": classifier.counters(),
        "waiting": [name for name, state in captured.items() if state == "absent"],
        "leftovers": platform.find_leftovers(),
        **about,
    }


def _heartbeat(maps: list[dict[str, Any]]) -> dict[str, Any] | None:
    """{"age_ms", "limit_ms", "stale"}; None where no heartbeat is needed."""
    ages = [entry["age_ms"] for table in maps if table["name"] == "heartbeat" for entry in table["entries"]]
    return describe_heartbeat(ages[0]) if ages else None


def describe_heartbeat(age_ms: int | None) -> dict[str, Any]:
    """{"age_ms", "limit_ms", "stale"}. age_ms: None when it never beat."""
    stale = age_ms is None or age_ms > HEARTBEAT_LIMIT_MS
    return {"age_ms": age_ms, "limit_ms": HEARTBEAT_LIMIT_MS, "stale": stale}


def _count(rules: list[dict[str, Any]], classifier: Classifier) -> list[dict[str, Any]]:
    """The rules with what the kernel decided by each, where it counts that."""
    counters: dict[int, dict[str, int]] = getattr(classifier, "rule_counters", dict)()
    return [{**rule, **counters.get(rule["rule"], {})} for rule in rules]
