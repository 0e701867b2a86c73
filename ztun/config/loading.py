"""From file, environment and command line to checked settings, or to all that is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ztun.config import values
from ztun.config.checks import check_document
from ztun.config.models import RuleSettings, Settings
from ztun.config.problems import Location, Problem, translate, unknown_key, write_location
from ztun.config.sources import Overlay, read_file
from ztun.errors import ConfigError
from ztun.rules import Rule, Rules
from ztun.rules.matching import CountryLookup

PROXY_TAG = "proxy"


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    proxy: str | None = None,
    lan: Sequence[str] = (),
    host: bool = False,
) -> Settings:
    """Settings from a JSON file (None: no file), the environment over it, and the command line over both.

    proxy: URL of a proxy that becomes the outbound "proxy" and the default; lan: interfaces instead of `capture.lan`;
    host: `capture.host` as well.
    Raises ConfigError, its message one line for each thing that is wrong.
    """
    document, problems = read_file(path) if path is not None else ({}, [])
    overlay = Overlay(Settings, document)
    overlay.read_environment(environ)
    lines = _read_command_line(overlay, proxy, lan, host)
    settings, found = _validate(overlay.document)
    source = str(path) if path is not None else "settings"
    lines += overlay.problems
    lines += [_write(problem, source, overlay.origins) for problem in _in_order([*problems, *found])]
    if settings is None or lines:
        raise ConfigError("\n".join(dict.fromkeys(lines)))
    return settings


def settings_from_proxy(url: str, lan: Sequence[str], environ: Mapping[str, str] | None = None) -> Settings:
    """Settings for `--proxy URL --lan IFACE` without a file: everything goes to the one outbound, "proxy"."""
    return load(None, environ or {}, proxy=url, lan=lan)


def to_rules(settings: Settings, country: CountryLookup | None = None) -> Rules:
    """The rules of the file for ztun.rules. country: the country code of a packed address, for `geoip`."""
    rules = [_to_rule(rule) for rule in settings.route.rules]
    return Rules(rules, settings.route.default, country) if country else Rules(rules, settings.route.default)


def _to_rule(rule: RuleSettings) -> Rule:
    return Rule(
        outbound=rule.outbound,
        ip_cidr=rule.ip_cidr,
        domain=rule.domain,
        domain_suffix=rule.domain_suffix,
        domain_keyword=rule.domain_keyword,
        geoip=rule.geoip,
        ports=rule.port,
        protocols=rule.protocol,
        source_cidr=rule.source_cidr,
        source_mac=tuple(bytes.fromhex(address.replace(":", "")) for address in rule.source_mac),
        interface=rule.interface,
        priority=rule.priority,
    )


def _read_command_line(overlay: Overlay, proxy: str | None, lan: Sequence[str], host: bool) -> list[str]:
    if lan:
        overlay.lay(("capture", "lan"), list(lan), "--lan")
    if host:
        overlay.lay(("capture", "host"), True, "--host")
    if proxy is None:
        return []
    try:
        outbound = {"tag": PROXY_TAG, **values.parse_proxy_url(proxy)}
    except ValueError as error:
        return [f"--proxy: {error}"]
    listed = overlay.document.get("outbounds", [])
    outbounds = listed if isinstance(listed, list) else []
    overlay.document = {**overlay.document, "outbounds": [*outbounds, outbound]}
    overlay.origins["outbounds", len(outbounds)] = "--proxy"
    overlay.lay(("route", "default"), PROXY_TAG, "--proxy")
    return []


def _validate(document: dict[str, Any]) -> tuple[Settings | None, list[Problem]]:
    """The settings, if the models take them, and what is wrong with them."""
    known = list(Settings.model_fields)
    problems = [Problem((key,), unknown_key(key, known)) for key in document if key not in known]
    problems += check_document(document)
    try:
        # Only our keys: BaseSettings has parameters of its own, as _env_file, that a file must not reach.
        return Settings(**{key: value for key, value in document.items() if key in known}), problems
    except ValidationError as error:
        # Elements that are wrong are not counted, so that a list may be called too short as well.
        found = [detail for detail in error.errors() if detail["type"] != "too_short" or not detail["input"]]
    return None, [*(translate(Settings, detail) for detail in found), *problems]


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    """By place, the sections in the order in which the design lists them."""
    sections = list(Settings.model_fields)

    def place(problem: Problem) -> tuple[int, list[tuple[int, str]]]:
        first = problem.location[0] if problem.location else ""
        parts = [(part, "") if isinstance(part, int) else (-1, part) for part in problem.location]
        return sections.index(str(first)) if first in sections else -1, parts

    return sorted(problems, key=place)


def _write(problem: Problem, source: str, origins: Mapping[Location, str]) -> str:
    """One line; what came from the environment or the command line names that instead of the file."""
    for length in range(len(problem.location), 0, -1):
        origin = origins.get(problem.location[:length])
        if origin is not None:
            rest = write_location(problem.location[length:])
            if not rest or (origin.startswith("--") and rest.startswith("[")):
                return f"{origin}: {problem.message}"  # an option is given once for each element
            between = ": " if origin.startswith("--") else "" if rest.startswith("[") else "."
            return f"{origin}{between}{rest}: {problem.message}"
    place = write_location(problem.location)
    return f"{source}: {place}: {problem.message}" if place else f"{source}: {problem.message}"
