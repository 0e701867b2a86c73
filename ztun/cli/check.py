"""`ztun check FILE`: what a configuration would do. Nothing is changed and nobody is asked over the network."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from ztun.cli.streams import to_json
from ztun.config import Settings, load, to_rules
from ztun.config.secrets import check_file
from ztun.describe import describe_rules, say_captured
from ztun.errors import ConfigError
from ztun.geoip import CountryDatabase
from ztun.rules import Network, compile_prefixes, make_surroundings


def run_check(file: Path, *, json: bool) -> int:
    """Print what `file` would do; returns 0. Raises ConfigError with one line for each thing that is wrong.

    With `json`, the errors are printed as JSON as well.
    """
    try:
        settings = load(file, os.environ)
        report = {"ok": True, "errors": [], "warnings": check_file(file, settings), **describe(settings)}
    except ConfigError as error:
        if json:
            print(to_json({"ok": False, "errors": str(error).splitlines()}))
        raise
    if json:
        print(to_json(report))
    else:
        _show(file, report)
    return 0


def describe(settings: Settings) -> dict[str, Any]:
    """What would be done, as `ztun check --json` prints it. prefixes: entries of the tables in the kernel."""
    capture = settings.capture
    return {
        "capture": {"lan": list(capture.lan), "host": capture.host, "backend": capture.backend},
        "dns": {"listen": _listen(settings), "hijack": settings.dns.hijack, "servers": _servers(settings)},
        "outbounds": [
            {"tag": outbound.tag, "type": outbound.type, "server": outbound.server} for outbound in settings.outbounds
        ],
        "rules": describe_rules(settings),
        "default": settings.route.default,
        "prefixes": count_prefixes(settings),
    }


def count_prefixes(settings: Settings) -> int:
    """How many prefixes the rules compile to, apart from those of this machine's own addresses. Raises ConfigError."""
    fake = settings.dns.fake_ip
    around = make_surroundings([], [network for network in (fake.range, fake.range6) if network is not None])
    compiled = compile_prefixes(
        to_rules(settings),
        around.builtin_direct,
        around.own_networks,
        around.fake_ranges,
        _countries(settings).__getitem__,
    )
    return len(compiled)


def _countries(settings: Settings) -> dict[str, list[Network]]:
    path = settings.route.geoip_database
    if path is None:
        return {}
    with closing(CountryDatabase(path)) as database:
        return database.networks_of({code for rule in settings.route.rules for code in rule.geoip})


def _listen(settings: Settings) -> list[str] | None:
    return list(settings.dns.listen) if "listen" in settings.dns.model_fields_set else None


def _servers(settings: Settings) -> list[str] | None:
    return list(settings.dns.servers) if "servers" in settings.dns.model_fields_set else None


def _show(file: Path, report: dict[str, Any]) -> None:
    print(f"{file}: good")
    print(f"  captures   {say_captured(**report['capture']) or 'no interface'} ({report['capture']['backend']})")
    listen = report["dns"]["listen"]
    print(
        f"  dns        {'port 53 of the captured interfaces' if listen is None else ', '.join(listen) or 'no listener'}"
    )
    servers = report["dns"]["servers"]
    print(f"  asks       {'the name servers of this system' if servers is None else ', '.join(servers)}")
    for outbound in report["outbounds"]:
        print(f"  outbound   {outbound['tag']}: {outbound['type']} {outbound['server']}")
    for rule in report["rules"]:
        print(f"  rule {rule['rule']:<5} {rule['conditions']} -> {rule['outbound']}")
    print(f"  default    {report['default']}")
    print(f"  prefixes   {report['prefixes']}")
    for line in report["warnings"]:
        print(f"ztun: warning: {line}", file=sys.stderr)
