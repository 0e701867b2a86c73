"""`ztun up`: settings from file, environment and options, then a gateway in the foreground until it is told to stop."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztun.cli.streams import forget_stdout, to_json
from ztun.config import Settings, load
from ztun.config.secrets import check_file
from ztun.describe import say_captured
from ztun.errors import ConfigError

if TYPE_CHECKING:
    from ztun.log.system import LogOptions


def run_up(
    config: Path | None,
    *,
    proxy: str | None,
    lan: Sequence[str],
    host: bool,
    socket: Path | None,
    log_level: str | None,
    json: bool,
) -> int:
    """Run a gateway. Returns the exit code; raises ConfigError or ZtunError when it cannot start."""
    settings = read_settings(config, proxy=proxy, lan=lan, host=host, socket=socket, log_level=log_level)
    from ztun.log.system import log_system

    log_system.configure(log_options(settings))
    warn_of_file(config, settings)
    from ztun import app

    def announce(summary: Mapping[str, Any]) -> None:
        try:
            print(to_json(dict(summary)) if json else _say(summary), flush=True)
        except OSError:  # nobody reads it: the traffic does not care
            forget_stdout()

    return app.run_until_stopped(settings, announce)


def read_settings(
    config: Path | None,
    *,
    proxy: str | None,
    lan: Sequence[str],
    socket: Path | None,
    log_level: str | None,
    host: bool = False,
) -> Settings:
    """The settings with the options over them. Raises ConfigError, also when there is nothing to do."""
    settings = load(config, option_environment(socket, log_level), proxy=proxy, lan=lan, host=host)
    if config is None and not settings.outbounds and not settings.route.rules:
        raise ConfigError("nothing to do: give --config FILE or --proxy URL; see `ztun up --help`")
    return settings


def option_environment(socket: Path | None, log_level: str | None = None) -> dict[str, str]:
    """The environment with these options over it."""
    environment = dict(os.environ)
    if socket is not None:
        environment["ZTUN_CONTROL__SOCKET"] = str(socket.absolute())
    if log_level is not None:
        environment["ZTUN_LOG__LEVEL"] = log_level
    return environment


def warn_of_file(config: Path | None, settings: Settings) -> None:
    """Say in the log who else can read the file. Raises ConfigError when everybody can write it."""
    import structlog

    for line in check_file(config, settings) if config is not None else ():
        structlog.get_logger("ztun.app").warning("the configuration file is not private", detail=line)


def log_options(settings: Settings) -> LogOptions:
    """Section "log", and what no line may show."""
    from ztun.log.repeats import Limit
    from ztun.log.system import LogOptions

    log = settings.log
    return LogOptions(
        level=log.level,
        levels=log.levels.model_dump(exclude_none=True),
        format=log.format,
        file=log.file,
        rotate=(log.rotate.size, log.rotate.keep) if log.rotate is not None else None,
        repeats=Limit(log.repeats.burst, log.repeats.per_second) if log.repeats is not None else None,
        flows=Limit(log.flows.burst, log.flows.per_second) if log.flows is not None else None,
        credentials=[
            (outbound.username or "", outbound.password.get_secret_value())
            for outbound in settings.outbounds
            if outbound.password is not None
        ],
    )


def _say(summary: Mapping[str, Any]) -> str:
    tun, rules = summary["tun"], summary["rules"]
    captured = say_captured(summary["lan"], summary["host"]) or "no interface (give --lan IFACE or --host)"
    lines = [
        ("ztun", f"{summary['version']} is up, pid {summary['pid']}"),
        ("tun", f"{tun['name']}, {', '.join(tun['addresses'])}, MTU {tun['mtu']}"),
        ("captures", f"{captured}, by {summary['backend']}"),
        ("dns", f"{', '.join(summary['dns']['listen']) or 'no listener'}{_say_hijack(summary)}"),
        ("asks", ", ".join(summary["dns"]["servers"])),
        ("default", f"{_say_outbound(summary)}, after {_say_rules(rules)}"),
        ("control", summary["control"]),
    ]
    lines += [("note", note) for note in summary["notes"]]
    return "\n".join(f"{name:<9} {value}" for name, value in lines)


def _say_rules(rules: Mapping[str, int]) -> str:
    count = rules["rules"]
    return f"{count} {'rule' if count == 1 else 'rules'} in {rules['prefixes']} prefixes"


def _say_hijack(summary: Mapping[str, Any]) -> str:
    return "; queries to other servers are answered too" if summary["dns"]["hijack"] else ""


def _say_outbound(summary: Mapping[str, Any]) -> str:
    outbound = summary["default"]
    return (
        f"{outbound['tag']} ({outbound['type']} {outbound['server']})" if outbound["server"] else str(outbound["tag"])
    )
