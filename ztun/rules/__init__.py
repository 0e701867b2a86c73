"""Rules: which outbound takes a flow, how a name is answered, and the prefix table for the kernel. Pure."""

from __future__ import annotations

from ztun.rules.compilation import CountryPrefixes, compile_prefixes
from ztun.rules.matching import CountryLookup, Rules
from ztun.rules.model import (
    BLOCK,
    BUILTIN_DIRECT,
    DIRECT,
    DNS,
    Decision,
    FlowInfo,
    NameDecision,
    NameKind,
    Network,
    Rule,
    Surroundings,
    canonical_name,
    make_surroundings,
    verdict_of,
)

__all__ = [
    "BLOCK",
    "BUILTIN_DIRECT",
    "DIRECT",
    "DNS",
    "CountryLookup",
    "CountryPrefixes",
    "Decision",
    "FlowInfo",
    "NameDecision",
    "NameKind",
    "Network",
    "Rule",
    "Rules",
    "Surroundings",
    "canonical_name",
    "compile_prefixes",
    "make_surroundings",
    "verdict_of",
]
